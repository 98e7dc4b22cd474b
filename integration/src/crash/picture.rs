//! What processes of ours can leave on a host: a picture before, a picture after, and the difference by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat;

use super::world::watched;

/// How long what ends on its own may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between looks: nothing tells that the last of a family of processes is gone.
const INTERVAL: Duration = Duration::from_millis(5);
/// What the kernel's tables say of links and rules, and nothing that counts up.
const TABLES: [(&str, &[&str]); 6] = [
    ("link", &["ip", "-o", "link"]),
    ("address", &["ip", "-o", "addr"]),
    ("route", &["ip", "-o", "route", "show", "table", "all"]),
    ("rule", &["nft", "list", "ruleset"]),
    ("queue", &["tc", "qdisc", "show"]),
    ("name space", &["ip", "netns", "list"]),
];

/// Everything that could be left behind, one line each, and how often it is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture(BTreeMap<String, usize>);

impl Picture {
    /// The host as it is now.
    #[must_use]
    pub fn take() -> Self {
        let mut found = Vec::new();
        let inodes = files(&mut found);
        processes(&mut found);
        mounts(&mut found);
        tables(&mut found);
        cgroups(Path::new("/sys/fs/cgroup"), &mut found);
        sockets(&mut found);
        loops(&mut found);
        memory(&mut found);
        locks(&inodes, &mut found);
        let mut lines = BTreeMap::new();
        for line in found {
            *lines.entry(line).or_default() += 1;
        }
        Self(lines)
    }

    /// What is there that was not (`+`), and what is not there that was (`-`).
    #[must_use]
    pub fn difference(&self, before: &Self) -> Vec<String> {
        let names: BTreeSet<_> = self.0.keys().chain(before.0.keys()).collect();
        let count = |picture: &Self, name: &String| picture.0.get(name).copied().unwrap_or(0);
        let differs = |name: &&String| count(self, name) != count(before, name);
        let told = |name: &String| {
            let sign = if count(self, name) > count(before, name) { '+' } else { '-' };
            format!("{sign} {name}")
        };
        names.into_iter().filter(differs).map(told).collect()
    }

    /// Waits until the host is as it was at this picture's time; what still differs after a while.
    #[must_use]
    pub fn await_return(&self) -> Vec<String> {
        self.await_return_within(PATIENCE)
    }

    /// The same, with a patience of one's own.
    #[must_use]
    pub fn await_return_within(&self, patience: Duration) -> Vec<String> {
        let began = Instant::now();
        loop {
            let differs = Self::take().difference(self);
            if differs.is_empty() || began.elapsed() > patience {
                return differs;
            }
            thread::sleep(INTERVAL);
        }
    }
}

/// Every process there is, by name and whether it is a zombie, with its network, the files it has open, and memory
/// that is nowhere a file.
fn processes(found: &mut Vec<String>) {
    let own = std::process::id().to_string();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        // The first is the shell that set this up; this process looks, and starts those that look.
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == own || pid == "1" {
            continue;
        }
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((name, rest)) = stat.rsplit_once(')') else { continue };
        let zombie = if rest.starts_with(" Z") { " zombie" } else { "" };
        let name = name.split_once('(').map_or("", |(_, name)| name);
        found.push(format!("process {pid} {name}{zombie}"));
        if let Ok(netns) = fs::read_link(entry.path().join("ns/net")) {
            found.push(format!("network of {pid} {}", netns.display()));
        }
        for file in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            let link = fs::read_link(file.path()).unwrap_or_default();
            let link = link.to_string_lossy();
            let kind =
                if link.starts_with('/') { link.as_ref() } else { link.split(':').next().unwrap_or("") };
            found.push(format!("open file of {pid}: {kind}"));
        }
    }
}

fn mounts(found: &mut Vec<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    found.extend(table.lines().filter_map(|line| Some(format!("mount {}", line.split(' ').nth(4)?))));
}

fn tables(found: &mut Vec<String>) {
    for (kind, words) in TABLES {
        let output = Command::new(words[0]).args(&words[1..]).output();
        let Ok(output) = output else {
            found.push(format!("{kind}: {} cannot be run", words[0]));
            continue;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        found.extend(text.lines().map(|line| format!("{kind} {}", steady(line))));
    }
}

/// A line of `ip` without what changes by itself.
fn steady(line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    let mut out = Vec::new();
    let mut skip = false;
    for word in words {
        if !std::mem::take(&mut skip) {
            out.push(word);
        }
        skip = matches!(word, "state" | "expires" | "valid_lft" | "preferred_lft");
    }
    out.join(" ")
}

/// Control groups of ours: others of this host are none of our business.
fn cgroups(root: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if path.to_string_lossy().contains("mvm-crash") {
                found.push(format!("cgroup {}", path.display()));
            }
            cgroups(&path, found);
        }
    }
}

/// Files with their kinds, and what a lease of an address says. The numbers of those on which locks count.
fn files(found: &mut Vec<String>) -> BTreeMap<String, PathBuf> {
    let mut inodes = BTreeMap::new();
    let mut left = watched();
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let (path, Ok(facts)) = (entry.path(), entry.metadata()) else { continue };
            let kind = facts.file_type();
            let word = match kind {
                _ if kind.is_dir() => "directory",
                _ if kind.is_socket() => "socket file",
                _ if kind.is_fifo() => "fifo",
                _ if kind.is_symlink() => "link file",
                _ => "file",
            };
            found.push(format!("{word} {}", path.display()));
            inodes.insert(numbers(&facts), path.clone());
            if path.starts_with("/run/mvm/net") && kind.is_file() {
                let text = fs::read_to_string(&path).unwrap_or_default();
                found.push(format!("lease {}: {}", path.display(), text.trim()));
            }
            if kind.is_dir() {
                left.push(path);
            }
        }
    }
    inodes
}

fn sockets(found: &mut Vec<String>) {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let named = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7));
    found.extend(named.map(|name| match name.strip_prefix('@') {
        Some(name) => format!("abstract socket {name}"),
        None => format!("socket {name}"),
    }));
}

/// Loop devices over files of ours.
fn loops(found: &mut Vec<String>) {
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file"))
            && watched().iter().any(|dir| Path::new(file.trim()).starts_with(dir))
        {
            found.push(format!("loop device {}", entry.file_name().to_string_lossy()));
        }
    }
}

/// Shared memory segments by their keys.
fn memory(found: &mut Vec<String>) {
    let table = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().take(2).collect::<Vec<_>>());
    found.extend(lines.map(|words| format!("shared memory {}", words.join(" "))));
}

/// Locks on files that are watched: not those of another world, who has files of the same numbers on another device.
fn locks(inodes: &BTreeMap<String, PathBuf>, found: &mut Vec<String>) {
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    for line in table.lines() {
        if let Some(path) = line.split_whitespace().find_map(|word| inodes.get(word)) {
            found.push(format!("lock {}", path.display()));
        }
    }
}

/// The numbers of a file as `/proc/locks` writes them: those of its device, in hex, and its own.
fn numbers(facts: &fs::Metadata) -> String {
    let device = facts.dev();
    format!("{:02x}:{:02x}:{}", stat::major(device), stat::minor(device), facts.ino())
}
