//! A process of the host, told apart from a later one of the same number.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process by number and the time it started at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the host did (proc(5), `stat` field 22).
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may hold any of them; the last one ends it.
        let (_, fields) = stat.rsplit_once(')')?;
        let started = fields.split_whitespace().nth(19)?.parse().ok()?;
        // One that has exited and was not waited for holds nothing any more.
        (fields.split_whitespace().next() != Some("Z")).then_some(Self { pid, started })
    }

    /// This process.
    pub fn own() -> Self {
        let pid = nix::unistd::getpid().as_raw();
        Self::of(pid).unwrap_or(Self { pid, started: 0 })
    }

    /// Whether it runs.
    pub fn is_alive(self) -> bool {
        self.pid > 0 && Self::of(self.pid) == Some(self)
    }

    /// Kills it and waits until it is gone, but no longer than `time`; whether it is.
    pub fn end(self, time: Duration) -> bool {
        self.kill();
        self.await_end(Instant::now() + time)
    }

    /// Waits until it is gone, but not beyond `deadline`; whether it is.
    pub fn await_end(self, deadline: Instant) -> bool {
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            // It may be no child of this process: nothing but looking tells.
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Kills it if it is there.
    pub fn kill(self) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_until_it_has_ended_and_its_successor_is_another() {
        let own = ProcessId::own();
        assert!(own.is_alive());
        assert!(!ProcessId { started: own.started + 1, ..own }.is_alive());
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(id.is_alive());
        id.kill();
        child.wait().unwrap();
        assert!(!id.is_alive());
        assert!(!ProcessId { pid: 0, started: 0 }.is_alive());
    }
}
