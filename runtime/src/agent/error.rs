//! What can go wrong between host and agent.

use std::io;

use mvm_protocol::{
    DecodeError, EncodeError, Failure, FailureKind, Version,
    limits::{MAX_GUEST_TEXT, MAX_PROCESSES},
};

use crate::failure::escaped;

/// What can go wrong between host and agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call of the host failed.
    #[error("{what}")]
    Io {
        /// Operation and operand.
        what: String,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The guest did not do something in time.
    #[error("the guest did not {what} in time")]
    Deadline {
        /// What was waited for.
        what: &'static str,
    },
    /// The control connection is gone.
    #[error("the connection to the guest's agent is lost: {reason}")]
    Lost {
        /// Why.
        reason: String,
    },
    /// The guest's first message is not a hello.
    #[error("the guest did not open with a hello")]
    NotHello,
    /// The guest's agent speaks another major version.
    #[error("the guest's agent speaks protocol {}.{}, this host {}.{}", guest.major, guest.minor, host.major, host.minor)]
    Version {
        /// What the agent speaks.
        guest: Version,
        /// What this host speaks.
        host: Version,
    },
    /// The guest's bytes are not frames.
    #[error("the guest's frames are malformed")]
    Decode(#[from] DecodeError),
    /// The request does not fit a frame.
    #[error("the request cannot be sent")]
    Encode(#[from] EncodeError),
    /// Too many requests wait for answers.
    #[error("too many requests wait for the guest's agent")]
    Busy,
    /// The guest has as many processes as it may.
    #[error("the guest has {MAX_PROCESSES} processes that have not ended, and may have no more")]
    Crowded,
    /// The process was given up.
    #[error("its end is not waited for any more")]
    Abandoned,
    /// The answer is not one to this request.
    #[error("the guest's agent answered with something else")]
    WrongReply,
    /// The answer holds more than any agent may say.
    #[error("the guest's agent answered with {count} {what}, and may with at most {most}")]
    Excess {
        /// What there are too many of.
        what: &'static str,
        /// How many.
        count: usize,
        /// As many as are taken.
        most: usize,
    },
    /// The agent refused; its own words, cut and escaped.
    #[error("{message}")]
    Refused {
        /// Which kind of failure.
        kind: FailureKind,
        /// The guest's error number, 0 when no system call failed.
        errno: i32,
        /// Operation and operand.
        message: String,
        /// The error number's text.
        #[source]
        source: Option<io::Error>,
    },
}

/// The results of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The exit code a command line shows when a program cannot be executed: 127 not found, 126 found.
    /// `None` for every other failure.
    pub fn exec_exit_code(&self) -> Option<u8> {
        match self {
            Self::Refused { kind: FailureKind::Exec, errno: libc::ENOENT, .. } => Some(127),
            Self::Refused { kind: FailureKind::Exec, .. } => Some(126),
            _ => None,
        }
    }
}

/// A list of a guest's is no longer than it may be.
pub(super) fn at_most(what: &'static str, count: usize, most: usize) -> Result<()> {
    if count > most { Err(Error::Excess { what, count, most }) } else { Ok(()) }
}

impl Error {
    /// Whether the agent has answered, be it by a refusal: the next call is worth its time.
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::WrongReply | Self::Excess { .. })
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        // Only numbers Linux knows become a source: its text comes from the host's C library.
        let known = (1..=133).contains(&failure.errno);
        Self::Refused {
            kind: failure.kind,
            errno: failure.errno,
            message: printable(&failure.message),
            source: known.then(|| io::Error::from_raw_os_error(failure.errno)),
        }
    }
}

/// Text of the guest's that is safe to show: cut to its bound, control characters escaped.
pub(super) fn printable(text: &str) -> String {
    let whole = |&(at, character): &(usize, char)| at.saturating_add(character.len_utf8()) <= MAX_GUEST_TEXT;
    escaped(&text.char_indices().take_while(whole).map(|(_, character)| character).collect::<String>())
}
