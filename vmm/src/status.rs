//! What a machine tells the process that started it: events, one JSON object per line.

use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::exit::Exit;

/// Something happened. Times are CLOCK_MONOTONIC in nanoseconds, the same clock in every process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The virtual CPUs run.
    Started {
        /// When each stage of starting was done.
        stages: Stages,
    },
    /// KVM_RUN returned for the first time.
    FirstExit {
        /// When the first virtual CPU entered KVM_RUN.
        run_ns: u64,
        /// When it returned.
        ns: u64,
    },
    /// The guest executed its first instruction and said so (port 0x3f0, value 0).
    GuestFirstInstruction {
        /// When.
        ns: u64,
    },
    /// The guest reached a milestone of its own (port 0x3f0, any other value).
    GuestMark {
        /// The value written.
        value: u8,
        /// When.
        ns: u64,
    },
    /// The machine ended; the last event.
    Exit {
        /// Why.
        #[serde(flatten)]
        exit: Exit,
        /// When.
        ns: u64,
    },
    /// The machine could not be started; the last event.
    Error {
        /// What failed.
        message: String,
        /// Why, outermost first.
        because: Vec<String>,
        /// What a person can do.
        #[serde(skip_serializing_if = "Option::is_none")]
        help: Option<String>,
    },
}

/// When each stage of starting was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stages {
    /// `main` was entered.
    pub entered_ns: u64,
    /// The configuration was read.
    pub config_ns: u64,
    /// RAM exists, kernel and initial RAM disk are in it.
    pub loaded_ns: u64,
    /// KVM has the machine and its memory.
    pub vm_ns: u64,
    /// Devices are on the bus.
    pub devices_ns: u64,
    /// Virtual CPUs are ready to run.
    pub vcpus_ns: u64,
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec()).unwrap_or(0))
}

/// Where events go. Nobody may listen, and a listener may not read: events are then lost, never waited for.
#[derive(Debug, Default)]
pub struct Stream {
    /// Shared by the main thread and the vCPUs, so that lines do not mix.
    sink: Option<Mutex<File>>,
}

impl Stream {
    /// Sends events to `sink`, which should be non-blocking.
    pub fn new(sink: Option<File>) -> Self {
        Self { sink: sink.map(Mutex::new) }
    }

    /// Whether there is a sink: whoever holds its other end tells the user.
    pub fn has_sink(&self) -> bool {
        self.sink.is_some()
    }

    /// Has `epoll` tell by `token` when nobody reads any more. A sink that cannot tell, such as a regular file, is
    /// left alone.
    pub fn watch_reader(&self, epoll: &Epoll, token: u64) {
        if let Some(sink) = &self.sink {
            let file = sink.lock().unwrap_or_else(PoisonError::into_inner);
            // Errors and hang-ups are told unasked.
            let _ = epoll.add(&*file, EpollEvent::new(EpollFlags::empty(), token));
        }
    }

    /// Sends one event.
    pub fn send(&self, event: &Event) {
        let Some(sink) = &self.sink else { return };
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        if let Ok(mut file) = sink.lock() {
            // One write per line: below PIPE_BUF it is written whole or not at all.
            let _ = file.write(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_one_flat_object() {
        let event = Event::Exit { exit: Exit::InternalError { detail: "x".into() }, ns: 5 };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(text, r#"{"event":"exit","reason":"internal-error","detail":"x","ns":5}"#);
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
    }
}
