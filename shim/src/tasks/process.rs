//! A process of a container, from being asked for to being forgotten.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use mvm_protocol::WindowSize;
use mvm_runtime::agent::Process as GuestProcess;
use oci_spec::runtime::Process as OciProcess;
use tokio::sync::watch;

use crate::stdio::{Outputs, Paths, Pumps};

/// Names a process: a container's init, or one of its execs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// The container's id.
    pub(crate) container: String,
    /// The exec's id; empty for the init.
    pub(crate) exec: String,
}

/// A process, and no later one of the same name: what is told of it later may find that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) name: Name,
    pub(super) serial: u64,
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its exit code, or 128 and the signal that killed it.
    pub(crate) status: u32,
    /// When.
    pub(crate) at: SystemTime,
}

/// What a client can ask of a process's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It can be started.
    Created,
    /// It runs.
    Running,
    /// Its container is stopped for a while.
    Paused,
    /// It has ended.
    Stopped,
}

/// All a client can ask of a process.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// The container's bundle.
    pub(crate) bundle: String,
    /// The host's process it lives in.
    pub(crate) pid: u32,
    /// Its state.
    pub(crate) status: Status,
    /// Its outputs, by the client's words.
    pub(crate) stdio: Paths,
    /// How it ended.
    pub(crate) exit: Option<Exit>,
}

/// A process.
pub(super) struct Process {
    /// Tells it from others of its name.
    pub(super) serial: u64,
    pub(super) stdio: Paths,
    pub(super) state: State,
    /// It is in the guest already, and stands still until it is started.
    pub(super) restored: Option<GuestProcess>,
    /// Its terminal's size, as last told before it started.
    pub(super) size: WindowSize,
    /// The client has closed its standard input before it started.
    pub(super) stdin_closed: bool,
    /// It was killed, and is given its time to end.
    pub(super) killed: bool,
    /// How it ended, for all who wait.
    pub(super) exit: watch::Sender<Option<Exit>>,
}

/// Where a process is in its life.
pub(super) enum State {
    /// Asked for. An init's outputs are open, an exec's are opened when it starts.
    Created { process: Box<OciProcess>, outputs: Option<Outputs> },
    /// Being started.
    Starting,
    /// Running in the guest under this id.
    Running { id: u64, pumps: Pumps },
    /// A pod's sandbox: nothing runs.
    Virtual,
    /// Ended in the guest; its output is on its way.
    Ending { pumps: Pumps },
    /// Ended, and everybody was told.
    Stopped { pumps: Option<Pumps> },
}

impl Process {
    pub(super) fn new(stdio: Paths, process: Box<OciProcess>, outputs: Option<Outputs>) -> Self {
        let size = console_size(&process);
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            serial: NEXT.fetch_add(1, Ordering::Relaxed),
            stdio,
            state: State::Created { process, outputs },
            restored: None,
            size,
            stdin_closed: false,
            killed: false,
            exit: watch::Sender::new(None),
        }
    }

    /// Whether it lives in the guest, or is about to.
    pub(super) fn is_alive(&self) -> bool {
        matches!(self.state, State::Starting | State::Running { .. } | State::Virtual | State::Ending { .. })
    }

    pub(super) fn status(&self) -> Status {
        match self.state {
            State::Created { .. } | State::Starting => Status::Created,
            State::Running { .. } | State::Virtual | State::Ending { .. } => Status::Running,
            State::Stopped { .. } => Status::Stopped,
        }
    }
}

/// The size that a process's terminal is to have.
pub(super) fn console_size(process: &OciProcess) -> WindowSize {
    let size = process.console_size().map(|size| WindowSize {
        rows: u16::try_from(size.height()).unwrap_or(u16::MAX),
        columns: u16::try_from(size.width()).unwrap_or(u16::MAX),
    });
    size.unwrap_or_default()
}
