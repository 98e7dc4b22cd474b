//! The control socket: one JSON object per line each way. A request gets one reply, in order.
//!
//! `{"command":"pause"}` is answered by `{"ok":{}}` or `{"error":"…"}`.

pub(crate) mod server;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Most bytes of a request, with its newline.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Most bytes of a reply a client accepts.
const MAX_REPLY_BYTES: u64 = 64 * 1024;

/// What can be asked of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the machine is and does.
    Info,
    /// Holds the virtual CPUs.
    Pause,
    /// Lets them go on.
    Resume,
    /// Ends the machine at once, without asking the guest.
    Stop,
    /// Asks the guest to give memory back, or lets it have it again.
    Balloon {
        /// MiB the guest is to do without.
        target_mib: u64,
    },
    /// Counters.
    Metrics,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Ok(Answer),
    /// It was not done, and why.
    Error(String),
}

/// What a successful request brought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// To [`Request::Info`].
    Info(Info),
    /// To [`Request::Metrics`].
    Metrics(Metrics),
    /// To [`Request::Balloon`].
    Balloon(Balloon),
    /// To everything else.
    Done {},
}

/// What a machine is and does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Name.
    pub id: String,
    /// Process.
    pub pid: u32,
    /// What it does.
    pub state: MachineState,
    /// Virtual CPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// The guest runs.
    Running,
    /// The virtual CPUs are held.
    Paused,
}

/// Counters since the machine started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Returns from the guest, by kind.
    pub exits: Exits,
    /// Devices, in order of the configuration.
    pub devices: Vec<DeviceMetrics>,
    /// Bytes of serial output that were lost.
    pub serial_dropped: u64,
    /// Log lines that were suppressed.
    pub log_suppressed: u64,
}

/// Where a balloon stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// MiB the guest is to do without: what was asked for, or the most a guest can spare.
    pub target_mib: u64,
    /// MiB the guest says it does without so far: a claim, not a fact.
    pub actual_mib: u64,
}

/// A device's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// What it is, as in the configuration.
    pub name: String,
    /// Whether the guest's driver has it running.
    pub driver_ready: bool,
    /// Whether it stopped and waits for the driver to reset it.
    pub needs_reset: bool,
    /// Counts by name.
    pub counts: BTreeMap<String, u64>,
}

/// Returns from the guest to this process, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// `IN` instructions.
    pub port_reads: u64,
    /// `OUT` instructions.
    pub port_writes: u64,
    /// Reads outside RAM.
    pub mmio_reads: u64,
    /// Writes outside RAM.
    pub mmio_writes: u64,
    /// Of these, accesses that nobody answered.
    pub unclaimed: u64,
    /// For a signal.
    pub interrupted: u64,
    /// All others.
    pub other: u64,
}

/// A connection to a machine's control socket.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(Self::new)
    }

    /// Uses a connected stream. Set time-outs on it first.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// Sends a request and waits for its reply; a reply that is an error becomes one.
    pub fn call(&mut self, request: &Request) -> io::Result<Answer> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut reply = String::new();
        self.stream.by_ref().take(MAX_REPLY_BYTES).read_line(&mut reply)?;
        if reply.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match serde_json::from_str(&reply).map_err(io::Error::other)? {
            Reply::Ok(answer) => Ok(answer),
            Reply::Error(text) => Err(io::Error::other(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_look_as_documented() {
        let request: Request = serde_json::from_str(r#"{"command":"balloon","target_mib":64}"#).unwrap();
        assert_eq!(request, Request::Balloon { target_mib: 64 });
        assert_eq!(serde_json::to_string(&Reply::Ok(Answer::Done {})).unwrap(), r#"{"ok":{}}"#);
        assert_eq!(serde_json::to_string(&Reply::Error("x".into())).unwrap(), r#"{"error":"x"}"#);
        assert!(serde_json::from_str::<Request>(r#"{"command":"fly"}"#).is_err());
    }

    #[test]
    fn every_answer_survives_the_wire() {
        let info = Info { id: "a".into(), pid: 1, state: MachineState::Paused, cpus: 2, memory_mib: 128 };
        let balloon = Answer::Balloon(Balloon { target_mib: 2, actual_mib: 1 });
        for answer in [Answer::Info(info), Answer::Metrics(Metrics::default()), balloon, Answer::Done {}] {
            let text = serde_json::to_string(&Reply::Ok(answer.clone())).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), Reply::Ok(answer));
        }
    }
}
