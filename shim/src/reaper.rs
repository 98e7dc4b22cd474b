//! Reaps orphans. The daemon is a sub-reaper: what its children leave behind becomes its child.
//!
//! Children of its own are waited for by whoever started them. A process is an orphan's corpse only if it stayed
//! dead for longer than any of those takes.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

/// How long a dead child is left to whoever may wait for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reaps for as long as the daemon lives.
pub(crate) async fn run() {
    let Ok(mut deaths) = signal(SignalKind::child()) else { return };
    while deaths.recv().await.is_some() {
        loop {
            let before = dead_children();
            if before.is_empty() {
                break;
            }
            tokio::time::sleep(PATIENCE).await;
            for pid in dead_children().intersection(&before) {
                let _ = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
            }
        }
    }
}

/// Children of this process that ended and were not waited for.
fn dead_children() -> BTreeSet<i32> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let pids = children.flat_map(|list| {
        list.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()).collect::<Vec<_>>()
    });
    pids.filter(|pid| is_dead(*pid)).collect()
}

fn is_dead(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{Id, waitid};

    #[test]
    fn a_dead_child_is_seen_and_a_living_one_is_not() {
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        let mut alive = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = i32::try_from(dead.id()).unwrap();
        waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        let seen = dead_children();
        assert!(seen.contains(&pid));
        assert!(!seen.contains(&i32::try_from(alive.id()).unwrap()));
        dead.wait().unwrap();
        assert!(!dead_children().contains(&pid));
        alive.kill().unwrap();
        alive.wait().unwrap();
    }
}
