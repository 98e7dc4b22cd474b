//! Processes: how they are started, addressed and how they end.

use serde::{Deserialize, Serialize};

use crate::Confinement;

/// Names one stdio stream. Chosen by the host at random: a container can dial the stream port too, and
/// must not be able to guess another process's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token(pub u64);

/// A process to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The id all later messages name it by; chosen by the host, never reused.
    pub process: u64,
    /// The container root it runs in; `None` is the agent's own.
    pub root: Option<String>,
    /// The program and its arguments. A name without `/` is looked for in `PATH` of `env`, in the root.
    pub args: Vec<String>,
    /// The whole environment, `NAME=value` each.
    pub env: Vec<String>,
    /// Working directory, absolute, made if it is missing.
    pub cwd: String,
    /// Who it runs as.
    pub user: User,
    /// Its standard streams.
    pub stdio: Stdio,
    /// Which PID name space it lives in.
    pub pid_namespace: PidNamespace,
    /// `/proc/<pid>/oom_score_adj`, -1000 to 1000.
    pub oom_score_adj: i16,
    /// What confines it.
    pub confinement: Confinement,
}

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    /// Numbers as they are.
    Ids {
        /// User id.
        uid: u32,
        /// Primary group id.
        gid: u32,
        /// Supplementary group ids.
        groups: Vec<u32>,
    },
    /// `user[:group]`, names or numbers, looked up in the root's `/etc/passwd` and `/etc/group` as an
    /// image's `User` is. Empty is root.
    Named(String),
}

/// A process's standard streams. A stream that is `None` is `/dev/null`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// Three pipes.
    Pipes {
        /// Towards the process.
        stdin: Option<Token>,
        /// From the process.
        stdout: Option<Token>,
        /// From the process.
        stderr: Option<Token>,
    },
    /// A pseudo-terminal of its own, both directions on one stream.
    Terminal {
        /// Both directions.
        stream: Token,
        /// Its size at the start.
        size: WindowSize,
    },
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

/// Which PID name space a process lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidNamespace {
    /// The agent's own.
    Agent,
    /// A new one, with this process as its PID 1; when it ends the kernel kills the rest.
    New,
    /// That of a running process, by the id it was started with.
    Join(u64),
}

/// Who gets a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SignalTarget {
    /// The process.
    Process,
    /// Its process group.
    Group,
    /// Every process of its container root.
    Everyone,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The code a shell would show: the exit code, or 128 + signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// A process on the agent's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// The id it was started with.
    pub process: u64,
    /// Its number in the agent's PID name space.
    pub pid: u32,
    /// How it ended; `None` while it runs.
    pub exited: Option<ExitStatus>,
}
