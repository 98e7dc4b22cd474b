//! A container's bundle: its specification, what of it makes a shim's group, and the shim's own record in it.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::state::ProcessId;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

/// CRI's word on whether a container is a pod's sandbox or one of its containers.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// CRI's id of the pod's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Largest `config.json` that is read, in bytes.
const MAX_SPEC: u64 = 16 << 20;
/// Below it each machine has its directory, by containerd's name space and the task's id.
pub(crate) const MACHINES: &str = "/run/mvm";
/// The shim's own file in a bundle.
const RECORD: &str = "mvm.json";

/// What a container is to its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The only container of a machine.
    Alone,
    /// A pod's sandbox: it makes the machine and runs nothing.
    Sandbox,
    /// A container in a pod's machine.
    Member,
}

impl Role {
    /// The role CRI's annotations give; a container without them is alone.
    pub(crate) fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().as_ref();
        match annotations.and_then(|annotations| annotations.get(CONTAINER_TYPE)).map(String::as_str) {
            Some("sandbox") => Self::Sandbox,
            Some("container") => Self::Member,
            _ => Self::Alone,
        }
    }
}

/// The specification in a bundle.
pub(crate) fn spec(bundle: &Path) -> Result<Spec, Failure> {
    let path = bundle.join("config.json");
    let text = read_spec(&path).context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).context(|| format!("cannot parse {}", path.display()))
}

/// The group a container of the bundle belongs to: its pod, or itself.
pub(crate) fn group(bundle: &Path, id: &str) -> Result<String, Failure> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    let path = bundle.join("config.json");
    let text = match read_spec(&path) {
        // A sandbox of containerd's sandbox service has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(id.to_owned()),
        other => other.context(|| format!("cannot read {}", path.display()))?,
    };
    let mut spec: Annotated =
        serde_json::from_slice(&text).context(|| format!("cannot parse {}", path.display()))?;
    Ok(spec.annotations.remove(SANDBOX_ID).unwrap_or_else(|| id.to_owned()))
}

fn read_spec(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let read = fs::File::open(path)?.take(MAX_SPEC + 1).read_to_end(&mut text)?;
    if read as u64 > MAX_SPEC { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(text) }
}

/// What `delete` must know of a daemon and its machine. It is in the bundle of the task they were made for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The machine's directory.
    pub(crate) directory: PathBuf,
    /// The daemon's socket.
    pub(crate) socket: PathBuf,
    /// The daemon.
    pub(crate) daemon: ProcessId,
    /// The machine's process, once there is one.
    pub(crate) machine: Option<ProcessId>,
}

impl Record {
    /// Writes the record into a bundle, whole or not at all.
    pub(crate) fn write(&self, bundle: &Path) -> io::Result<()> {
        replace(&bundle.join(RECORD), &serde_json::to_vec(self)?)
    }

    /// Removes the record from a bundle.
    pub(crate) fn remove(bundle: &Path) {
        let _ = fs::remove_file(bundle.join(RECORD));
    }

    /// The record in a bundle, if there is one.
    pub(crate) fn read(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(bundle.join(RECORD)).ok()?).ok()
    }
}

/// Gives a file new content so that a reader sees the old one or the new one.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let new = PathBuf::from(name);
    let mut file = fs::File::create(&new)?;
    file.write_all(content)?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_containers_share_its_group_and_others_are_their_own() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(group(bundle.path(), "me").unwrap(), "me");
        fs::write(bundle.path().join("config.json"), r#"{"ociVersion":"1.0.2"}"#).unwrap();
        assert_eq!(group(bundle.path(), "me").unwrap(), "me");
        let text = format!(r#"{{"ociVersion":"1.0.2","annotations":{{"{SANDBOX_ID}":"pod"}}}}"#);
        fs::write(bundle.path().join("config.json"), text).unwrap();
        assert_eq!(group(bundle.path(), "me").unwrap(), "pod");
        fs::write(bundle.path().join("config.json"), "{").unwrap();
        assert!(group(bundle.path(), "me").is_err());
    }

    #[test]
    fn roles_follow_cris_annotation() {
        for (kind, role) in [("sandbox", Role::Sandbox), ("container", Role::Member), ("other", Role::Alone)]
        {
            let mut spec = Spec::default();
            spec.set_annotations(Some([(CONTAINER_TYPE.to_owned(), kind.to_owned())].into()));
            assert_eq!(Role::of(&spec), role);
        }
        assert_eq!(Role::of(&Spec::default()), Role::Alone);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(bundle.path()), None);
        let machine = Some(ProcessId::own());
        let record =
            Record { directory: "/run/x".into(), socket: "/run/s".into(), daemon: ProcessId::own(), machine };
        record.write(bundle.path()).unwrap();
        assert_eq!(Record::read(bundle.path()), Some(record));
    }
}
