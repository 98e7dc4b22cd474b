//! What a container is and how it fares, as any process can read it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::process::ProcessId;
use crate::failure::{Context, Failure};

/// Largest record that is read, in bytes.
const MAX_RECORD: u64 = 1 << 20;

/// A container's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// Its name; the id where none was given.
    pub name: String,
    /// What its user marked it with.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The image, as it was named.
    pub image: String,
    /// The command, as it runs.
    pub command: Vec<String>,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// When its process was last started, in seconds since 1970.
    pub started: Option<u64>,
    /// How it fares.
    pub condition: Condition,
    /// The process that owns it.
    pub owner: ProcessId,
    /// The process that is its machine, while there is one.
    pub machine: Option<ProcessId>,
    /// It is removed once it has ended.
    pub remove: bool,
    /// Whether it is started again when it has ended.
    #[serde(default)]
    pub restart: Restart,
    /// How often that has happened.
    #[serde(default)]
    pub restarts: u32,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Ports of the host that lead to it, as they were given.
    #[serde(default)]
    pub ports: Vec<String>,
}

/// How a container fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Condition {
    /// Its machine is being made.
    #[default]
    Starting,
    /// Its process runs.
    Running,
    /// Its processes are stopped.
    Paused,
    /// Its process has ended.
    Exited {
        /// As a shell would show it.
        code: u8,
        /// When, in seconds since 1970.
        at: u64,
    },
    /// Its owner died without a word; how its process ended is not known.
    Lost {
        /// When that was seen, in seconds since 1970.
        at: u64,
    },
}

impl Condition {
    /// Nothing of it runs any more.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Exited { .. } | Self::Lost { .. })
    }
}

/// Whether a container is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When it fails, at most so often; 0 is without end.
    OnFailure(u32),
    /// Whenever it ends, unless it was stopped.
    Always,
}

impl Restart {
    /// Whether a container that has been restarted `restarts` times and has ended with `code` is started again.
    pub fn applies(self, code: u8, restarts: u32) -> bool {
        match self {
            Self::No => false,
            Self::OnFailure(most) => code != 0 && (most == 0 || restarts < most),
            Self::Always => true,
        }
    }
}

impl FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no restart policy: no, on-failure[:N] or always");
        match text.split_once(':') {
            None if text == "no" => Ok(Self::No),
            None if text == "always" => Ok(Self::Always),
            None if text == "on-failure" => Ok(Self::OnFailure(0)),
            Some(("on-failure", most)) => most.parse().map(Self::OnFailure).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl Record {
    /// What is said to whoever wants something of the container that only one that runs can do.
    pub fn not_running(&self) -> Failure {
        Failure::new(format!("container {} is not running", self.name)).help("`mvm ps` lists what runs")
    }

    /// It has ended and is not started again, though its owner may not have gone yet.
    pub fn is_over(&self) -> bool {
        matches!(self.condition, Condition::Exited { code, .. } if !self.restart.applies(code, self.restarts))
    }

    /// Reads a record.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let failed = || format!("cannot read {}", path.display());
        let mut text = Vec::new();
        fs::File::open(path).context(failed)?.take(MAX_RECORD).read_to_end(&mut text).context(failed)?;
        serde_json::from_slice(&text).context(failed)
    }

    /// Replaces a record: a reader sees the old or the new one.
    pub(super) fn write(&self, path: &Path) -> Result<(), Failure> {
        let failed = || format!("cannot write {}", path.display());
        let text = serde_json::to_vec_pretty(self).context(failed)?;
        let new = path.with_extension("new");
        let mut file = fs::File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)
            .context(failed)?;
        file.write_all(&text).and_then(|()| file.sync_all()).context(failed)?;
        fs::rename(&new, path).context(failed)
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        let record = Record {
            id: "a".into(),
            condition: Condition::Exited { code: 3, at: 9 },
            restart: Restart::OnFailure(2),
            labels: [("k".to_owned(), "v".to_owned())].into(),
            ..Record::default()
        };
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        // What a crash leaves of the next one does no harm.
        fs::write(path.with_extension("new"), "{").unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
    }

    #[test]
    fn restart_policies_are_read_and_apply() {
        assert_eq!("on-failure:3".parse(), Ok(Restart::OnFailure(3)));
        for bad in ["", "yes", "always:1", "on-failure:x", "on-failure:"] {
            assert!(bad.parse::<Restart>().is_err(), "{bad}");
        }
        assert!(!Restart::No.applies(1, 0));
        assert!(Restart::Always.applies(0, 99));
        assert!(Restart::OnFailure(0).applies(1, 99) && !Restart::OnFailure(0).applies(0, 0));
        assert!(Restart::OnFailure(2).applies(1, 1) && !Restart::OnFailure(2).applies(1, 2));
    }
}
