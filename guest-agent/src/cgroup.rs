//! A container's cgroup: all its processes at once, and word when the kernel kills one for memory.

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use mvm_protocol::{
    Limits, RootStats,
    limits::{MAX_STAT_PIDS, MAX_STAT_TEXT},
};
use nix::{errno::Errno, unistd::Pid};

use crate::{
    error::{Context, Error, Result},
    kmsg, sys,
};

/// Where a guest has cgroup v2.
pub(crate) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// How cgroup v2 is mounted, every time: the last mount from the guest's cgroup name space decides for all. A
/// container that may write to its own cgroup makes others in it, and leaves its limits alone.
pub(crate) const OPTIONS: &CStr = c"nsdelegate,memory_recursiveprot";

/// The cgroup that [`warm`] leaves, without a process; no container's starts like this.
const KEPT: &str = "template";

/// The controllers containers have limits of, as far as the kernel has them.
const CONTROLLERS: [&str; 6] = ["memory", "pids", "cpu", "io", "cpuset", "hugetlb"];

/// One container's cgroup.
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Processes are forked into it.
    pub(crate) directory: File,
    /// `memory.events`, which says when it changes.
    pub(crate) events: Option<File>,
    /// `cgroup.events`, which says when it is empty or frozen, and when that changes.
    pub(crate) state: File,
    /// Kills that were already reported.
    kills: u64,
    /// Its processes are to be stopped.
    pub(crate) freezing: bool,
}

impl Cgroup {
    /// Makes a container's cgroup; `None` where there are no cgroups, which costs the features only.
    pub(crate) fn new(mount_point: &Path, id: &str) -> Option<Self> {
        let path = mount_point.join(format!("mvm-{id}"));
        enable_controllers(mount_point);
        fs::create_dir(&path).ok()?;
        let directory = File::open(&path).ok()?;
        let events = File::open(path.join("memory.events")).ok();
        let state = File::open(path.join("cgroup.events")).ok()?;
        Some(Self { path, directory, events, state, kills: 0, freezing: false })
    }

    /// Writes limits in order.
    pub(crate) fn limit(&self, limits: &Limits) -> Result<()> {
        for (name, text) in &limits.files {
            // The cgroup's own files are the agent's to write.
            if name.contains('/')
                || !name.contains('.')
                || name.starts_with('.')
                || name.starts_with("cgroup.")
            {
                return Err(Error::Invalid(format!("{name:?} is no limit of a cgroup")));
            }
            match self.write(name, text) {
                // A kernel that lacks the file has no such limit, and nothing of what it would count.
                Err(error) if error.kind() == io::ErrorKind::NotFound && asks_nothing(name, text) => {}
                written => written.context(|| format!("cannot set {name} to {text:?}"))?,
            }
        }
        Ok(())
    }

    /// Stops its processes or lets them go on; [`Cgroup::frozen`] tells when that is done.
    pub(crate) fn freeze(&mut self, frozen: bool) -> Result<()> {
        let text = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", text).context(|| "cannot freeze or thaw the cgroup".into())?;
        self.freezing = frozen;
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        File::options().write(true).open(self.path.join(name))?.write_all(text.as_bytes())
    }

    /// Whether all its processes are stopped.
    pub(crate) fn frozen(&self) -> bool {
        self.state_is("frozen 1")
    }

    /// Whether there is no process in it.
    pub(crate) fn empty(&self) -> bool {
        self.state_is("populated 0")
    }

    fn state_is(&self, line: &str) -> bool {
        let mut bytes = [0; 256];
        let count = self.state.read_at(&mut bytes, 0).unwrap_or(0);
        std::str::from_utf8(&bytes[..count]).is_ok_and(|text| text.lines().any(|it| it == line))
    }

    /// Its use of its resources, as far as the kernel tells.
    pub(crate) fn stats(&self) -> RootStats {
        let text = |name: &&str| {
            let mut bytes = Vec::new();
            let file = File::open(self.path.join(name)).ok()?;
            file.take(MAX_STAT_TEXT as u64).read_to_end(&mut bytes).ok()?;
            Some(((*name).to_owned(), String::from_utf8(bytes).ok()?))
        };
        let files = STATS.iter().filter_map(text).collect();
        let pids = self.processes().map(|pids| pids.map(i32::unsigned_abs).take(MAX_STAT_PIDS).collect());
        RootStats { files, pids: pids.unwrap_or_default() }
    }

    fn processes(&self) -> io::Result<impl Iterator<Item = i32>> {
        let list = fs::read_to_string(self.path.join("cgroup.procs"))?;
        let pids: Vec<i32> = list.lines().filter_map(|line| line.parse().ok()).collect();
        Ok(pids.into_iter().filter(|pid| *pid > 0))
    }

    /// Sends a signal to every process in it.
    pub(crate) fn signal(&self, signal: i32) -> nix::Result<()> {
        if signal == libc::SIGKILL {
            // One write reaches even what forks at this moment.
            if self.write("cgroup.kill", "1").is_ok() {
                return Ok(());
            }
        }
        for pid in self.processes().map_err(|_| Errno::ESRCH)? {
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

/// Whether a limit is none, or one of swap where there is no swap.
fn asks_nothing(name: &str, text: &str) -> bool {
    text == "max" || (name == "memory.swap.max" && text == "0")
}

/// Removes a cgroup and those that were made in it; it has no processes.
fn remove(path: &Path) -> io::Result<()> {
    if let Err(error) = fs::remove_dir(path)
        && error.raw_os_error() == Some(libc::EBUSY)
    {
        for inner in fs::read_dir(path)?.flatten().filter(|it| it.file_type().is_ok_and(|kind| kind.is_dir()))
        {
            remove(&inner.path())?;
        }
        return fs::remove_dir(path);
    }
    Ok(())
}

/// What a container's statistics are made of.
const STATS: [&str; 18] = [
    "memory.current",
    "memory.peak",
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.stat",
    "memory.events",
    "memory.swap.current",
    "memory.swap.max",
    "memory.pressure",
    "cpu.stat",
    "cpu.max",
    "cpu.weight",
    "cpu.pressure",
    "pids.current",
    "pids.max",
    "io.stat",
    "io.pressure",
];

/// Has the kernel do what it does for the first cgroup with limits only, and not for its clones each: it switches checks
/// on all over its code, and each page that changes is one of a clone's own. Where it fails nothing is lost but that.
pub(crate) fn warm(mount_point: &Path) {
    enable_controllers(mount_point);
    let _ = fs::create_dir(mount_point.join(KEPT));
}

/// Enables what there is, in one write.
fn enable_controllers(mount_point: &Path) {
    let there = fs::read_to_string(mount_point.join("cgroup.controllers")).unwrap_or_default();
    let there: Vec<&str> = there.split_whitespace().collect();
    let wanted: Vec<String> =
        CONTROLLERS.iter().filter(|it| there.contains(it)).map(|it| format!("+{it}")).collect();
    let _ = fs::write(mount_point.join("cgroup.subtree_control"), wanted.join(" "));
}

fn oom_kills(events: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(events).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            kmsg::say(&format!("cannot remove {}: {error}", self.path.display()));
        }
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
    fn a_warm_guest_has_a_cgroup_with_all_controllers_containers_need() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu misc memory\n").unwrap();
        fs::write(dir.path().join("cgroup.subtree_control"), "").unwrap();
        warm(dir.path());
        warm(dir.path());
        assert!(dir.path().join(KEPT).is_dir());
        let enabled = fs::read_to_string(dir.path().join("cgroup.subtree_control")).unwrap();
        assert_eq!(enabled, "+memory +cpu +cpuset");
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
            state: File::open(&events).unwrap(),
            kills: 0,
            freezing: false,
        };
        assert_eq!(cgroup.new_kills(), Some(1));
        assert_eq!(cgroup.new_kills(), None);
        fs::write(&events, "oom_kill 3\n").unwrap();
        assert_eq!(cgroup.new_kills(), Some(3));
    }
}
