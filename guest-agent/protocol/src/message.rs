//! The messages of the control connection. The order of variants is the wire format: append only.

use serde::{Deserialize, Serialize};

use crate::{
    Configure, ExitStatus, Get, Got, Hello, HelloAck, Limits, Mount, ProcessEntry, Put, RootStats, SetupRoot,
    SignalTarget, Stamp, Start, Stdio, Token, WindowSize,
};

/// What the host sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// Answers [`GuestMessage::Hello`]; must come before any request, may share a write with them.
    HelloAck(HelloAck),
    /// Asks for something; the agent serves requests in the order they came.
    Request {
        /// Chosen by the host, never reused on a connection.
        id: u64,
        /// What is asked.
        request: Request,
    },
}

impl HostMessage {
    /// The id of the request in a payload whose verb this build may not know, so that it can be refused
    /// by name. `None` when it is no request.
    pub fn request_id_in(payload: &[u8]) -> Option<u64> {
        match postcard::take_from_bytes::<(u32, u64)>(payload) {
            Ok(((1, id), _)) => Some(id),
            _ => None,
        }
    }
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// Opens the connection.
    Hello(Hello),
    /// Answers the request of the same id, exactly once.
    Response {
        /// The request's id.
        id: u64,
        /// What came of it.
        result: Result<Reply, Failure>,
    },
    /// Something happened that nobody asked about just now.
    Event(Event),
}

/// What the host can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Are you there? Answered with [`Reply::Done`].
    Ping,
    /// Make these mounts in the agent's own name space, in order, all or none.
    Mount(Vec<Mount>),
    /// Make a container's root file system and mount name space.
    SetupRoot(Box<SetupRoot>),
    /// Host name, network, resolver.
    Configure(Configure),
    /// Run a process. Answered with [`Reply::Started`] once its program runs.
    Start(Box<Start>),
    /// Send a signal. A process that has exited is [`FailureKind::NotFound`].
    Signal {
        /// The process, by the id it was started with.
        process: u64,
        /// The signal's number in Linux on this architecture.
        signal: i32,
        /// Who gets it.
        target: SignalTarget,
    },
    /// The terminal's size has changed.
    Resize {
        /// The process, by the id it was started with.
        process: u64,
        /// Its terminal's new size.
        size: WindowSize,
    },
    /// Close the process's standard input although its stream is still open.
    CloseStdin {
        /// The process, by the id it was started with.
        process: u64,
    },
    /// Drop the record of a process that has exited; until then its exit is reported anew on each
    /// control connection, so that a host that was away cannot miss it.
    Forget {
        /// The process, by the id it was started with.
        process: u64,
    },
    /// All processes on record. Answered with [`Reply::Processes`].
    List,
    /// Memory and CPU. Answered with [`Reply::Stats`].
    Stats,
    /// Write all file systems to their disks. Answered when that is done; other requests overtake it.
    Sync,
    /// Stop everything, sync, unmount, and end the machine. Answered at once.
    Shutdown {
        /// How the machine ends.
        mode: ShutdownMode,
        /// Time between SIGTERM and SIGKILL, in milliseconds; at most [`crate::limits::MAX_SHUTDOWN_MS`].
        grace_ms: u32,
    },
    /// Change what a container's cgroup may use.
    Update {
        /// The container root's id.
        root: String,
        /// What changes.
        limits: Limits,
    },
    /// Stop or continue all processes of a container.
    Freeze {
        /// The container root's id.
        root: String,
        /// Stop them.
        frozen: bool,
    },
    /// A container's use of its resources. Answered with [`Reply::RootStats`].
    RootStats {
        /// The container root's id.
        root: String,
    },
    /// Kill what is left in a container, unmount its root and give its disks back; its id is free again.
    RemoveRoot {
        /// The container root's id.
        root: String,
    },
    /// Put files into the guest.
    Put(Put),
    /// Read a file or a directory of the guest. Answered with [`Reply::Got`].
    Get(Get),
    /// Connect to a TCP port of the guest's loopback address and join it with a stream of this token.
    Forward {
        /// The port.
        port: u16,
        /// The stream the agent opens.
        stream: Token,
    },
    /// Look for devices that were plugged in.
    Rescan,
    /// Let go of the disk of this virtio serial: it is about to be unplugged. Nothing may be mounted from it.
    Eject {
        /// The disk's virtio serial.
        serial: String,
    },
    /// The machine is about to be saved, and to go on as others, each with a host of its own. Refused as
    /// busy if there are containers or processes. Once it is answered nothing else is served but
    /// [`Request::Ping`] and [`Request::Shutdown`], nothing wakes the agent, and it dials anew as soon as
    /// this connection ends, until a host greets it.
    Prepare,
    /// What does the wall clock say? Answered with [`Reply::Clock`].
    Clock,
    /// Set the wall clock forward, or back. Unlike a time, a difference does not grow old on its way.
    AdjustClock {
        /// By so many nanoseconds.
        by_ns: i64,
    },
    /// The machine is about to be saved with what is in it. Answered once nothing more reaches its disks or the
    /// host; until [`Request::Release`] nothing else is served but [`Request::Ping`], [`Request::List`],
    /// [`Request::Attach`] and [`Request::Shutdown`]. Refused as busy unless all containers are frozen. Should this
    /// connection end meanwhile the agent dials anew: it may be in the machine that goes on from what was saved.
    Hold,
    /// Disks and streams go on after [`Request::Hold`].
    Release,
    /// Open the streams of a process anew; the host that had them is gone. Possible while the machine is held only.
    /// Answered with [`Reply::Started`] once the streams are open. One that has ended meanwhile is opened and closed.
    Attach {
        /// The process, by the id it was started with.
        process: u64,
        /// The streams; a terminal's size is not changed.
        stdio: Stdio,
    },
    /// The host of a container that goes on has another name, and its machine another id: both are told it, the id
    /// only where it was told one before.
    Rename {
        /// The container root's id.
        root: String,
        /// Its host's name; nothing leaves it as it is.
        hostname: Option<String>,
    },
    /// Let go of the network card of this hardware address: it is about to be unplugged.
    EjectCard {
        /// Its address.
        mac: [u8; 6],
    },
}

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownMode {
    /// It powers off.
    PowerOff,
    /// It resets.
    Reboot,
}

/// What a request gives when it works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Nothing but that it was done.
    Done,
    /// The process runs its program.
    Started {
        /// Its number in the agent's PID name space.
        pid: u32,
    },
    /// Every process on record.
    Processes(Vec<ProcessEntry>),
    /// The guest's use of its resources.
    Stats(Stats),
    /// A container's use of its resources.
    RootStats(RootStats),
    /// A file or a directory.
    Got(Got),
    /// The guest's wall clock, in nanoseconds since the Unix epoch.
    Clock(u64),
}

/// Why a request did not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Which kind of failure, for programs.
    pub kind: FailureKind,
    /// The Linux error number, 0 when no system call failed.
    pub errno: i32,
    /// Operation and operand, for people; the error number's text is not repeated in it.
    pub message: String,
}

/// What a program can tell failures apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The agent does not know the verb.
    Unsupported,
    /// The request contradicts itself or a limit.
    Invalid,
    /// The thing it names does not exist.
    NotFound,
    /// The thing it would make exists.
    Exists,
    /// A limit is reached; later it may work.
    Busy,
    /// A system call failed while the surroundings were set up.
    System,
    /// The program itself could not be executed: `ENOENT` not found, `EACCES` not executable.
    Exec,
}

/// What the agent reports unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A process has exited, and its output streams carry all it wrote, followed by end of file.
    Exited {
        /// The id it was started with.
        process: u64,
        /// How it ended.
        status: ExitStatus,
        /// When the agent reaped it.
        at: Stamp,
    },
    /// The kernel killed processes of a container for want of memory.
    OutOfMemory {
        /// The container root's id.
        root: String,
        /// Kills in it since it was made.
        kills: u64,
    },
}

/// The guest's use of its resources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Memory the guest kernel manages, in bytes.
    pub memory_total: u64,
    /// Memory that could be had without swapping, in bytes.
    pub memory_available: u64,
    /// Page cache, in bytes.
    pub memory_cached: u64,
    /// CPU time in user mode over all CPUs, in nanoseconds.
    pub cpu_user_ns: u64,
    /// CPU time in the kernel over all CPUs, in nanoseconds.
    pub cpu_system_ns: u64,
    /// CPU time not given by the host, over all CPUs, in nanoseconds.
    pub cpu_steal_ns: u64,
    /// Processes on record that have not exited.
    pub processes: u32,
}
