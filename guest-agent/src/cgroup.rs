//! A container's cgroup: all its processes at once, and word when the kernel kills one for memory.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::{errno::Errno, unistd::Pid};

use crate::sys;

/// Where a guest has cgroup v2.
pub(crate) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// The controllers containers need.
const CONTROLLERS: &str = "+memory +pids +cpu";

/// One container's cgroup.
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Processes are forked into it.
    pub(crate) directory: File,
    /// `memory.events`, which says when it changes.
    pub(crate) events: Option<File>,
    /// Kills that were already reported.
    kills: u64,
}

impl Cgroup {
    /// Makes a container's cgroup; `None` where there are no cgroups, which costs the features only.
    pub(crate) fn new(mount_point: &Path, id: &str) -> Option<Self> {
        let path = mount_point.join(format!("mvm-{id}"));
        let _ = fs::write(mount_point.join("cgroup.subtree_control"), CONTROLLERS);
        fs::create_dir(&path).ok()?;
        let directory = File::open(&path).ok()?;
        let events = File::open(path.join("memory.events")).ok();
        Some(Self { path, directory, events, kills: 0 })
    }

    /// Sends a signal to every process in it.
    pub(crate) fn signal(&self, signal: i32) -> nix::Result<()> {
        if signal == libc::SIGKILL {
            // One write reaches even what forks at this moment.
            let written = File::options().write(true).open(self.path.join("cgroup.kill"));
            if written.and_then(|mut file| file.write_all(b"1")).is_ok() {
                return Ok(());
            }
        }
        let list = fs::read_to_string(self.path.join("cgroup.procs")).map_err(|_| Errno::ESRCH)?;
        for pid in list.lines().filter_map(|line| line.parse().ok()).filter(|pid: &i32| *pid > 0) {
            match sys::kill(Pid::from_raw(pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// The number of kills for want of memory, if it has grown since the last call.
    pub(crate) fn new_kills(&mut self) -> Option<u64> {
        let mut bytes = [0; 512];
        let count = self.events.as_ref()?.read_at(&mut bytes, 0).ok()?;
        let kills = oom_kills(&bytes[..count])?;
        let grown = kills > self.kills;
        self.kills = kills;
        grown.then_some(kills)
    }
}

fn oom_kills(events: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(events).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_read_from_their_own_line() {
        let events = b"low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 7\n";
        assert_eq!(oom_kills(events), Some(2));
        assert_eq!(oom_kills(b"low 0\n"), None);
        assert_eq!(oom_kills(b"oom_kill \xff\n"), None);
    }

    #[test]
    fn a_kill_is_news_once() {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("memory.events");
        fs::write(&events, "oom_kill 1\n").unwrap();
        let mut cgroup = Cgroup {
            path: dir.path().join("none"),
            directory: File::open(&events).unwrap(),
            events: Some(File::open(&events).unwrap()),
            kills: 0,
        };
        assert_eq!(cgroup.new_kills(), Some(1));
        assert_eq!(cgroup.new_kills(), None);
        fs::write(&events, "oom_kill 3\n").unwrap();
        assert_eq!(cgroup.new_kills(), Some(3));
    }
}
