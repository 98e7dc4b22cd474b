//! Processes of the host, and waiting for what nothing announces.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// Longest anything may take before a test fails, a call included. What the shim itself waits for takes up to ten
/// seconds, and what would hold it up for ever in these tests takes a minute or more.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The processes a process has started.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// How many threads of this name a process has.
pub(crate) fn threads(pid: i32, name: &str) -> usize {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    names.filter(|comm| comm.trim_end() == name).count()
}

pub(crate) fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Waits until a process that is no child of the test is gone.
pub(crate) fn wait_gone(pid: i32) {
    wait_until(&format!("process {pid} is gone"), || !is_alive(pid));
}

/// Waits for what nothing announces.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
