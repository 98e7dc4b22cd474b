//! What containers can leave on a host: a picture before, a picture after, and the difference by name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::daemon::BRIDGE;

/// How long what ends on its own may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between looks: nothing tells that the last of a family of processes and mounts is gone.
const INTERVAL: Duration = Duration::from_millis(100);
/// Directories whose every entry counts.
const WATCHED: [&str; 6] = ["/run/containerd", "/run/netns", "/run/mvm", "/dev/shm", "/dev/mqueue", "/tmp"];
/// What stays by design, by its end: parents of what a container has, and the last address that was given out.
const STAYS: [&str; 17] = [
    "cgroup /default",
    "cgroup /k8s.io",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/containerd/runc/default",
    "/run/containerd/runc/k8s.io",
    "/run/containerd/s",
    "/run/mvm/default",
    "/run/mvm/k8s.io",
    "/run/mvm/s",
    "/run/mvm/starts",
    "v1.cri/containers",
    "v1.cri/sandboxes",
    ".task/default",
    ".task/k8s.io",
    "/last_reserved_ip.0",
    "/lock",
];

/// Everything that could be left behind, one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture(BTreeSet<String>);

impl Picture {
    /// The host as it is now; files of the daemon's state below `dir` count, what it stores for good does not.
    #[must_use]
    pub fn take(dir: &Path) -> Self {
        let mut found = BTreeSet::new();
        processes(dir, &mut found);
        mounts(&mut found);
        links(&mut found);
        sockets(&mut found);
        directories(Path::new("/sys/fs/cgroup"), &mut found);
        for root in WATCHED.iter().map(PathBuf::from).chain([dir.join("state"), dir.join("leases/mvm-test")])
        {
            files(&root, dir, &mut found);
        }
        found.retain(|line| !STAYS.iter().any(|end| line.ends_with(end)));
        Self(found)
    }

    /// Waits until nothing is there that was not there at this picture's time.
    ///
    /// # Errors
    /// What is left, one line each.
    pub fn still_holds(&self, dir: &Path) -> Result<(), String> {
        let began = Instant::now();
        loop {
            let now = Self::take(dir);
            let left: Vec<_> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(left.join("\n"));
            }
            thread::sleep(INTERVAL);
        }
    }
}

/// Every process with a command line (the kernel's own have none) but the daemon and its client, which restarts change.
fn processes(dir: &Path, found: &mut BTreeSet<String>) {
    let (daemon, client) = (format!("--config {}", dir.display()), " -n default events");
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
        let words = words.join(" ").trim_end().to_owned();
        if !words.is_empty() && !words.contains(&daemon) && !words.ends_with(client) {
            found.insert(format!("process {pid} {words}"));
        }
    }
}

fn mounts(found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    found.extend(table.lines().filter_map(|line| Some(format!("mount {}", line.split(' ').nth(4)?))));
}

/// `/sys` shows the links of the name space it was mounted from, so the kernel is asked by netlink.
fn links(found: &mut BTreeSet<String>) {
    let output = Command::new("ip").args(["-o", "link"]).output().expect("iproute2");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split(": ").nth(1));
    found.extend(names.filter(|name| *name != BRIDGE).map(|name| format!("link {name}")));
}

/// Sockets with a path; those of processes elsewhere are found as files.
fn sockets(found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let paths = table.lines().filter_map(|line| line.split_whitespace().nth(7));
    found.extend(paths.filter(|path| path.starts_with('/')).map(|path| format!("socket {path}")));
}

fn directories(root: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let name = entry.path();
            let name = name.strip_prefix("/sys/fs/cgroup").unwrap_or(&name);
            found.insert(format!("cgroup /{}", name.display()));
            directories(&entry.path(), found);
        }
    }
}

/// Files, fifos and sockets below `root`, but neither the daemon's store nor what lies in a root file system, which is
/// counted as a mount.
fn files(root: &Path, store: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == store {
            continue;
        }
        found.insert(format!("file {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "rootfs" {
            files(&path, store, found);
        }
    }
}
