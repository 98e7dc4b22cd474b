//! Mounts of a specification: option strings become numbers, and what lies on the host is told from what the guest
//! has itself.

use std::path::{Path, PathBuf};

use mvm_protocol::{ContainerMount, ContainerSource, DiskFilesystem};
use oci_spec::runtime::Mount;

use super::refused::{Refused, Result};

/// One mount, translated as far as it can be without looking at the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountPart {
    /// The guest makes it of what it has.
    Guest(ContainerMount),
    /// It shows something of the host's, which must be brought into the guest first.
    Host(HostMount),
}

/// A mount that shows something of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMount {
    /// File, directory or block device of the host, absolute.
    pub source: PathBuf,
    /// The file system on it, if it is to be mounted as one; `None` is a bind mount.
    pub filesystem: Option<DiskFilesystem>,
    /// Where in the container.
    pub target: String,
    /// `MS_*` of mount(2), without propagation.
    pub flags: u64,
    /// `MS_PRIVATE` and the like; 0 leaves it.
    pub propagation: u64,
    /// Options of the file system.
    pub data: String,
}

impl HostMount {
    /// The container may not write to it.
    pub fn read_only(&self) -> bool {
        self.flags & libc::MS_RDONLY != 0
    }

    /// The mount in the guest, once its source is there.
    #[must_use]
    pub fn from(&self, source: ContainerSource) -> ContainerMount {
        ContainerMount {
            source,
            target: self.target.clone(),
            flags: self.flags,
            propagation: self.propagation,
            data: self.data.clone(),
        }
    }
}

/// File systems that need no device and that every guest has.
const WITHOUT_DEVICE: [&str; 5] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue"];

/// Translates all mounts, in order. Relative sources of bind mounts are in `bundle`.
///
/// # Errors
/// The first mount that cannot be honoured.
pub(super) fn mounts(given: &[Mount], bundle: &Path) -> Result<Vec<MountPart>> {
    given.iter().map(|mount| translate(mount, bundle)).collect()
}

fn translate(mount: &Mount, bundle: &Path) -> Result<MountPart> {
    let destination = mount.destination().to_str();
    let destination = destination.ok_or_else(|| Refused::new("mounts.destination", "a path is not UTF-8"))?;
    let target = match destination.starts_with('/') {
        true => destination.to_owned(),
        false => format!("/{destination}"),
    };
    for (field, mappings) in [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())] {
        if mappings.as_ref().is_some_and(|mappings| !mappings.is_empty()) {
            let reason = format!("{target} is to be mapped to other owners: no user name space is made");
            return Err(Refused::new(format!("mounts.{field}"), reason));
        }
    }
    let options = Options::parse(mount.options().as_deref().unwrap_or_default(), &target)?;
    let kind = mount.typ().as_deref().unwrap_or_default();
    if kind == "bind" || options.flags & libc::MS_BIND != 0 {
        let source = source(mount, &target)?;
        return Ok(MountPart::Host(options.host(bundle.join(source), None, target)));
    }
    let filesystem = match kind {
        "ext4" => Some(DiskFilesystem::Ext4),
        "erofs" => Some(DiskFilesystem::Erofs),
        _ => None,
    };
    if filesystem.is_some() {
        let source = source(mount, &target)?;
        return Ok(MountPart::Host(options.host(bundle.join(source), filesystem, target)));
    }
    let (name, data) = match kind {
        // Options of cgroup v1 name controllers; the guest has them all in one.
        "cgroup" | "cgroup2" => ("cgroup2", String::new()),
        name if WITHOUT_DEVICE.contains(&name) => (name, options.data),
        other => {
            let reason = format!(
                "{target}: the guest mounts no {other:?}, but {}, cgroup, ext4 and erofs disks, and bind mounts",
                WITHOUT_DEVICE.join(", ")
            );
            return Err(Refused::new("mounts.type", reason));
        }
    };
    Ok(MountPart::Guest(ContainerMount {
        source: ContainerSource::Filesystem(name.to_owned()),
        target,
        flags: options.flags,
        propagation: options.propagation,
        data,
    }))
}

fn source<'a>(mount: &'a Mount, target: &str) -> Result<&'a Path> {
    let missing = || Refused::new("mounts.source", format!("{target} has none"));
    mount.source().as_deref().filter(|source| !source.as_os_str().is_empty()).ok_or_else(missing)
}

/// Options of a mount, sorted out.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    flags: u64,
    propagation: u64,
    data: String,
}

impl Options {
    fn parse(given: &[String], target: &str) -> Result<Self> {
        let mut options = Self::default();
        let mut data: Vec<&str> = Vec::new();
        for option in given {
            if let Some(propagation) = propagation(option) {
                options.propagation = propagation;
            } else if let Some((set, flag)) = flag(option) {
                options.flags = if set { options.flags | flag } else { options.flags & !flag };
            } else if refused(option) {
                let reason = format!("{option:?} of {target}: the guest cannot do that");
                return Err(Refused::new("mounts.options", reason));
            } else {
                data.push(option);
            }
        }
        options.data = data.join(",");
        Ok(options)
    }

    fn host(self, source: PathBuf, filesystem: Option<DiskFilesystem>, target: String) -> HostMount {
        let Self { flags, propagation, data } = self;
        // The guest binds or mounts as it must; options of a bind mount that are no flags say nothing.
        let data = if filesystem.is_some() { data } else { String::new() };
        let flags = flags & !(libc::MS_BIND | libc::MS_REC);
        HostMount { source, filesystem, target, flags, propagation, data }
    }
}

/// Extensions of other runtimes that change what a container sees.
fn refused(option: &str) -> bool {
    matches!(option, "tmpcopyup" | "copy-symlink" | "idmap" | "ridmap" | "remount")
}

/// The propagation of a mount or of the root, by its name.
pub(super) fn propagation(name: &str) -> Option<u64> {
    let (recursive, name) = match name.strip_prefix('r') {
        Some(rest) => (libc::MS_REC, rest),
        None => (0, name),
    };
    let kind = match name {
        "private" => libc::MS_PRIVATE,
        "slave" => libc::MS_SLAVE,
        "shared" => libc::MS_SHARED,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

/// The flag an option sets or clears. Of an option that begins with `r` and reaches what is mounted below, the guest
/// takes the flag: below what it mounts there is nothing yet.
fn flag(option: &str) -> Option<(bool, u64)> {
    Some(match option {
        "defaults" => (true, 0),
        "bind" => (true, libc::MS_BIND),
        "rbind" => (true, libc::MS_BIND | libc::MS_REC),
        "ro" | "rro" => (true, libc::MS_RDONLY),
        "rw" | "rrw" => (false, libc::MS_RDONLY),
        "nosuid" | "rnosuid" => (true, libc::MS_NOSUID),
        "suid" | "rsuid" => (false, libc::MS_NOSUID),
        "nodev" | "rnodev" => (true, libc::MS_NODEV),
        "dev" | "rdev" => (false, libc::MS_NODEV),
        "noexec" | "rnoexec" => (true, libc::MS_NOEXEC),
        "exec" | "rexec" => (false, libc::MS_NOEXEC),
        "sync" => (true, libc::MS_SYNCHRONOUS),
        "async" => (false, libc::MS_SYNCHRONOUS),
        "dirsync" => (true, libc::MS_DIRSYNC),
        "mand" => (true, libc::MS_MANDLOCK),
        "nomand" => (false, libc::MS_MANDLOCK),
        "noatime" | "rnoatime" => (true, libc::MS_NOATIME),
        "atime" | "ratime" => (false, libc::MS_NOATIME),
        "nodiratime" | "rnodiratime" => (true, libc::MS_NODIRATIME),
        "diratime" | "rdiratime" => (false, libc::MS_NODIRATIME),
        "relatime" | "rrelatime" => (true, libc::MS_RELATIME),
        "norelatime" | "rnorelatime" => (false, libc::MS_RELATIME),
        "strictatime" | "rstrictatime" => (true, libc::MS_STRICTATIME),
        "nostrictatime" | "rnostrictatime" => (false, libc::MS_STRICTATIME),
        "iversion" => (true, libc::MS_I_VERSION),
        "noiversion" => (false, libc::MS_I_VERSION),
        "silent" => (true, libc::MS_SILENT),
        "loud" => (false, libc::MS_SILENT),
        "lazytime" => (true, MS_LAZYTIME),
        "nolazytime" => (false, MS_LAZYTIME),
        "nosymfollow" | "rnosymfollow" => (true, MS_NOSYMFOLLOW),
        "symfollow" | "rsymfollow" => (false, MS_NOSYMFOLLOW),
        _ => return None,
    })
}

/// `MS_LAZYTIME` of `linux/mount.h`.
const MS_LAZYTIME: u64 = 1 << 25;
/// `MS_NOSYMFOLLOW` of `linux/mount.h`.
const MS_NOSYMFOLLOW: u64 = 1 << 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn translate(json: &str) -> Result<MountPart> {
        super::translate(&serde_json::from_str(json).unwrap(), Path::new("/bundle"))
    }

    fn guest(json: &str) -> ContainerMount {
        match translate(json).unwrap() {
            MountPart::Guest(mount) => mount,
            other => panic!("{other:?}"),
        }
    }

    fn host(json: &str) -> HostMount {
        match translate(json).unwrap() {
            MountPart::Host(mount) => mount,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_become_flags_propagation_and_data() {
        let mount = guest(
            r#"{"destination":"/dev","type":"tmpfs","source":"tmpfs",
                "options":["nosuid","strictatime","mode=755","ro","rw","rslave","size=65536k"]}"#,
        );
        assert_eq!(mount.source, ContainerSource::Filesystem("tmpfs".into()));
        assert_eq!(mount.flags, libc::MS_NOSUID | libc::MS_STRICTATIME);
        assert_eq!(mount.propagation, libc::MS_SLAVE | libc::MS_REC);
        assert_eq!(mount.data, "mode=755,size=65536k");
    }

    #[test]
    fn either_cgroup_is_the_one_the_guest_has() {
        for kind in ["cgroup", "cgroup2"] {
            let mount = guest(&format!(
                r#"{{"destination":"/sys/fs/cgroup","type":"{kind}","source":"cgroup","options":["ro","none"]}}"#
            ));
            assert_eq!(mount.source, ContainerSource::Filesystem("cgroup2".into()));
            assert_eq!((mount.flags, mount.data.as_str()), (libc::MS_RDONLY, ""));
        }
    }

    #[test]
    fn a_bind_mount_is_known_by_its_type_or_its_options_and_found_from_the_bundle() {
        let by_option = host(
            r#"{"destination":"etc/hosts","source":"hosts","options":["rbind","rprivate","ro","uid=1"]}"#,
        );
        assert_eq!(by_option.source, Path::new("/bundle/hosts"));
        assert_eq!((by_option.target.as_str(), by_option.data.as_str()), ("/etc/hosts", ""));
        assert!(by_option.read_only());
        assert_eq!(by_option.flags, libc::MS_RDONLY);
        let by_type = host(r#"{"destination":"/x","type":"bind","source":"/h"}"#);
        assert_eq!((by_type.source.as_path(), by_type.read_only()), (Path::new("/h"), false));
    }

    #[test]
    fn what_the_guest_cannot_mount_is_refused_by_name() {
        for (json, field) in [
            (r#"{"destination":"/x","type":"nfs","source":"a:/b"}"#, "mounts.type"),
            (r#"{"destination":"/x","type":"bind"}"#, "mounts.source"),
            (r#"{"destination":"/x","type":"tmpfs","options":["tmpcopyup"]}"#, "mounts.options"),
            (
                r#"{"destination":"/x","type":"bind","source":"/h","uidMappings":[{"hostID":1,"containerID":0,"size":1}]}"#,
                "mounts.uidMappings",
            ),
        ] {
            let refused = translate(json).unwrap_err();
            assert_eq!(refused.field, field);
            assert!(refused.reason.contains("/x"), "{refused}");
        }
    }
}
