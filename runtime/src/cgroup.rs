//! Control groups of the host, of either version: where this process is in them, and how one goes.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

/// Where hierarchies are mounted: version 2 itself, those of version 1 by their controllers' names.
const MOUNTS: &str = "/sys/fs/cgroup";
/// How often, and how long apart, a group is tried to be removed: a process that was killed leaves it some time
/// after it counts as ended.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// A hierarchy, and this process's group in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Where the hierarchy is mounted.
    pub root: PathBuf,
    /// The group, below it.
    pub group: PathBuf,
}

/// This process's group in the hierarchy of `controller`: of version 1 if that has it, else of version 2. `None` on a
/// host that has neither.
pub fn own(controller: &str) -> Option<Own> {
    find(&fs::read_to_string("/proc/self/cgroup").ok()?, controller)
}

pub(crate) fn find(text: &str, controller: &str) -> Option<Own> {
    let of = |wanted: &str| {
        text.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            parts.next()?.split(',').any(|name| name == wanted).then(|| parts.next().unwrap_or_default())
        })
    };
    let below = |root: PathBuf, path: &str| Own { group: root.join(path.trim_start_matches('/')), root };
    of(controller)
        .map(|path| below(Path::new(MOUNTS).join(controller), path))
        .or_else(|| of("").map(|path| below(MOUNTS.into(), path)))
}

/// Removes `group` once nobody is in it. One that others have made themselves at home in stays, and so does what is no
/// group.
///
/// # Errors
/// The host's reason.
pub(crate) fn remove(group: &Path) -> io::Result<()> {
    if !is_cgroup(group) {
        return Ok(());
    }
    for _ in 0..TRIES {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => thread::sleep(PAUSE),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => break,
        }
    }
    Ok(())
}

fn is_cgroup(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| [CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&fs.filesystem_type()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_of_version_1_is_taken_before_version_2() {
        let mixed = "9:name=systemd:/\n8:pids,cpu:/a/b\n0::/c\n";
        let own = |root: &str, group: &str| Some(Own { root: root.into(), group: group.into() });
        assert_eq!(find(mixed, "pids"), own("/sys/fs/cgroup/pids", "/sys/fs/cgroup/pids/a/b"));
        assert_eq!(find(mixed, "memory"), own("/sys/fs/cgroup", "/sys/fs/cgroup/c"));
        assert_eq!(find("0::/\n", "pids"), own("/sys/fs/cgroup", "/sys/fs/cgroup/"));
        assert_eq!(find("", "pids"), None);
        let shared = "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n";
        assert_eq!(find(shared, "memory"), own("/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/a/b"));
        assert_eq!(find("3:cpu:/\n", "memory"), None);
    }

    #[test]
    fn a_directory_that_is_no_group_stays() {
        let dir = tempfile::tempdir().unwrap();
        remove(dir.path()).unwrap();
        assert!(dir.path().exists());
        remove(&dir.path().join("none")).unwrap();
    }
}
