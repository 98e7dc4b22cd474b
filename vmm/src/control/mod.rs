//! The control socket: one JSON object per line each way. A request gets one reply, in order.
//!
//! `{"command":"pause"}` is answered by `{"ok":{}}`, `{"error":"…"}`, or `{"busy":"…"}`. Files that a request names come with it
//! (`SCM_RIGHTS`), no later than its last byte; the request names each by its place, from 0.

pub(crate) mod server;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mvm_devices::virtio::DeviceSpec;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

/// Most bytes of a request, with its newline.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Most bytes of a reply a client accepts.
const MAX_REPLY_BYTES: u64 = 64 * 1024;

/// What can be asked of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Gives the guest memory beyond what it booted with, or takes such back, and says where that stands.
    Memory {
        /// MiB the machine is to have in all. What it booted with it keeps. Unless given, nothing changes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size_mib: Option<u64>,
    },
    /// Where the memory it was saved with lies.
    MemoryMap,
    /// Counters.
    Metrics,
    /// Puts a further device on the PCI bus. The guest finds it when it looks again
    /// (`echo 1 > /sys/bus/pci/rescan`).
    Attach {
        /// The device. Its slots are places in the request's files, from 0.
        device: DeviceSpec,
    },
    /// Takes a device off the PCI bus and closes its files. The guest gives it up first
    /// (`echo 1 > /sys/bus/pci/devices/…/remove`).
    Detach {
        /// Which.
        device: DeviceName,
        /// Even if the guest's driver uses it: as if it were pulled out. A Linux guest lives on, but waits for
        /// ever once it resets that device, as it does to remove it or to shut down.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
    /// Saves the machine, which is held meanwhile. The request's first file becomes the state, the second the
    /// memory; what was in them is gone. [`crate::config::Restore`] takes both.
    Snapshot {
        /// Whether the machine goes on afterwards. One that was paused before stays so in any case.
        #[serde(default = "yes")]
        resume: bool,
        /// What is in the machine, such as the digests of kernel and agent: compared when it is restored.
        #[serde(default)]
        contents: String,
        /// Whether there is a third file: the whole memory of another snapshot of a machine of this size, of which the
        /// memory becomes the changes only. It is read, and [`crate::config::Restore`] takes it as well.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        base: bool,
    },
}

fn yes() -> bool {
    true
}

/// By what a device on the bus is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum DeviceName {
    /// Its number: the guest's PCI address is `0000:00:NN.0`, in hexadecimal.
    Number(u8),
    /// The serial number of a disk.
    Serial(String),
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Ok(Answer),
    /// It was not done, and why.
    Error(String),
    /// It was not done because something is busy at this moment: asked again it may be.
    Busy(String),
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
    /// To [`Request::Memory`].
    Memory(Memory),
    /// To [`Request::MemoryMap`].
    MemoryMap(MemoryMap),
    /// To [`Request::Attach`].
    Attached(Attached),
    /// To [`Request::Snapshot`].
    Snapshot(Snapshot),
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
    /// Devices, in order of their numbers; those a virtual CPU waits in are left out.
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

/// How much memory a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// MiB it is to have: what was asked for, rounded up to whole blocks of 2 beyond what it booted with, or that if it is more.
    pub size_mib: u64,
    /// MiB it has, as its driver has plugged them. What it does not give back it goes on having.
    pub plugged_mib: u64,
    /// MiB it can have at most.
    pub max_mib: u64,
    /// MiB it can touch: what it boots with, and whatever it was to have at any time, in whole blocks of its kernel. A
    /// snapshot has as much.
    pub usable_mib: u64,
}

/// Where a machine's process has the memory that the machine went on with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// Id of the snapshot it went on from; none if it booted.
    pub snapshot: Option<[u8; 16]>,
    /// The parts of it, in order of guest address.
    pub regions: Vec<MappedRegion>,
}

/// Memory in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRegion {
    /// Its address there.
    pub host: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Where an attached device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Its number: the guest's PCI address is `0000:00:NN.0`, in hexadecimal.
    pub device: u8,
}

/// What was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Bytes of memory that were written; the rest of the file is holes.
    pub memory_bytes: u64,
    /// Bytes of the state.
    pub state_bytes: u64,
    /// How long the machine was held for it, in nanoseconds.
    pub held_ns: u64,
}

/// A device's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// Its number on the bus.
    pub device: u8,
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

    /// How long a reply is waited for, from the next request on.
    ///
    /// # Errors
    /// The host's reason.
    pub fn set_patience(&self, time: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(time))
    }

    /// Sends a request and waits for its reply; a reply that is an error becomes one, of the kind
    /// [`io::ErrorKind::ResourceBusy`] if it can be asked again.
    pub fn call(&mut self, request: &Request) -> io::Result<Answer> {
        self.call_with(request, &[])
    }

    /// As [`Client::call`], with the files the request names.
    pub fn call_with(&mut self, request: &Request, files: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
        line.push(b'\n');
        let sent = self.send(&line, files)?;
        self.stream.get_mut().write_all(line.get(sent..).unwrap_or_default())?;
        let mut reply = String::new();
        self.stream.by_ref().take(MAX_REPLY_BYTES).read_line(&mut reply)?;
        if reply.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match serde_json::from_str(&reply).map_err(io::Error::other)? {
            Reply::Ok(answer) => Ok(answer),
            Reply::Error(text) => Err(io::Error::other(text)),
            Reply::Busy(text) => Err(io::Error::new(io::ErrorKind::ResourceBusy, text)),
        }
    }

    /// Sends the first bytes of `line`, and `files` with them.
    fn send(&mut self, line: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &[][..] } else { &control[..] };
        let (socket, line) = (self.stream.get_ref().as_raw_fd(), [IoSlice::new(line)]);
        loop {
            match sendmsg::<()>(socket, &line, control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(nix::Error::EINTR) => {}
                sent => return Ok(sent?),
            }
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
        for (text, size_mib) in [("", None), (r#","size_mib":640"#, Some(640))] {
            let text = format!(r#"{{"command":"memory"{text}}}"#);
            let request: Request = serde_json::from_str(&text).unwrap();
            assert_eq!(
                (serde_json::to_string(&request).unwrap(), request),
                (text, Request::Memory { size_mib })
            );
        }
        assert_eq!(serde_json::to_string(&Reply::Ok(Answer::Done {})).unwrap(), r#"{"ok":{}}"#);
        assert_eq!(serde_json::to_string(&Reply::Error("x".into())).unwrap(), r#"{"error":"x"}"#);
        assert_eq!(serde_json::to_string(&Reply::Busy("x".into())).unwrap(), r#"{"busy":"x"}"#);
        assert!(serde_json::from_str::<Request>(r#"{"command":"fly"}"#).is_err());
    }

    #[test]
    fn devices_are_attached_as_configured_and_detached_by_number_or_serial() {
        let text = r#"{"command":"attach","device":{"type":"block","disk":0,"serial":"data"}}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        let Request::Attach { device: DeviceSpec::Block(block) } = request else { panic!("{request:?}") };
        assert_eq!((block.disk.0, block.serial.as_str()), (0, "data"));
        for (text, device, force) in [
            (r#"{"command":"detach","device":7}"#, DeviceName::Number(7), false),
            (r#"{"command":"detach","device":"7","force":true}"#, DeviceName::Serial("7".into()), true),
        ] {
            let request: Request = serde_json::from_str(text).unwrap();
            assert_eq!(request, Request::Detach { device, force });
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
        }
    }

    #[test]
    fn a_machine_is_saved_whole_unless_a_base_is_named() {
        for (text, base) in [
            (r#"{"command":"snapshot","resume":true,"contents":"k"}"#, false),
            (r#"{"command":"snapshot","resume":true,"contents":"k","base":true}"#, true),
        ] {
            let request: Request = serde_json::from_str(text).unwrap();
            assert_eq!(request, Request::Snapshot { resume: true, contents: "k".into(), base });
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
        }
    }

    #[test]
    fn every_answer_survives_the_wire() {
        let info = Info { id: "a".into(), pid: 1, state: MachineState::Paused, cpus: 2, memory_mib: 128 };
        let balloon = Answer::Balloon(Balloon { target_mib: 2, actual_mib: 1 });
        let memory =
            Answer::Memory(Memory { size_mib: 256, plugged_mib: 128, max_mib: 1024, usable_mib: 256 });
        let attached = Answer::Attached(Attached { device: 3 });
        let metrics = Answer::Metrics(Metrics::default());
        let regions = vec![MappedRegion { host: 1 << 40, bytes: 4096 }];
        let map = Answer::MemoryMap(MemoryMap { snapshot: Some([7; 16]), regions });
        let saved = Answer::Snapshot(Snapshot { memory_bytes: 4096, state_bytes: 1, held_ns: 2 });
        for answer in [Answer::Info(info), metrics, balloon, memory, map, attached, saved, Answer::Done {}] {
            let text = serde_json::to_string(&Reply::Ok(answer.clone())).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), Reply::Ok(answer));
        }
    }
}
