//! Why a request is refused, and how that crosses the wire.

use mvm_protocol::{Failure, FailureKind};
use nix::errno::Errno;

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A system call failed; the text names operation and operand.
    #[error("{what}")]
    System {
        what: String,
        #[source]
        errno: Errno,
    },
    /// The program cannot be executed.
    #[error("cannot execute {program}")]
    Exec {
        program: String,
        #[source]
        errno: Errno,
    },
    /// The request contradicts itself or a limit.
    #[error("{0}")]
    Invalid(String),
    /// The thing it names does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The thing it would make exists.
    #[error("{0}")]
    Exists(String),
    /// A limit is reached.
    #[error("{0}")]
    Busy(&'static str),
    /// The verb is of a later version.
    #[error("this agent does not know the request")]
    Unsupported,
}

/// The agent's results.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Names the operation a system call was for.
pub(crate) trait Context<T> {
    /// Operation and operand, made only when it failed.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::System { what: what(), errno })
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            Error::System { what: what(), errno }
        })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let (kind, errno) = match error {
            Error::System { errno, .. } => (FailureKind::System, errno as i32),
            Error::Exec { errno, .. } => (FailureKind::Exec, errno as i32),
            Error::Invalid(_) => (FailureKind::Invalid, 0),
            Error::NotFound(_) => (FailureKind::NotFound, 0),
            Error::Exists(_) => (FailureKind::Exists, 0),
            Error::Busy(_) => (FailureKind::Busy, 0),
            Error::Unsupported => (FailureKind::Unsupported, 0),
        };
        Self { kind, errno, message }
    }
}
