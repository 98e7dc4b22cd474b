//! What can go wrong between host and agent.

use std::io;

use mvm_protocol::{DecodeError, EncodeError, Failure, FailureKind, Version, limits::MAX_GUEST_TEXT};

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
    /// The answer is not one to this request.
    #[error("the guest's agent answered with something else")]
    WrongReply,
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
    text.char_indices().take_while(whole).flat_map(|(_, character)| escape(character)).collect()
}

fn escape(character: char) -> impl Iterator<Item = char> {
    let (plain, escaped) = match character.is_control() {
        true => (None, Some(character.escape_default())),
        false => (Some(character), None),
    };
    plain.into_iter().chain(escaped.into_iter().flatten())
}
