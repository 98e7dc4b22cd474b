//! What a client is told when a call fails: one of the classes containerd's clients test for, and a text.

use containerd_shim_protos::ttrpc::{self, Code};
use mvm_runtime::container::NotRunnable;
use mvm_runtime::failure::{Failure, cut, escaped};

/// Outcome of a call.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Error {
    code: Code,
    text: String,
    /// What a task is said to have ended with whose program could not be started.
    exit_status: u32,
}

/// What clients take for "it was not started".
const NOT_STARTED: u32 = 128;
/// Longest text of a failure, in bytes: a guest's and a checkpoint's words may be in it.
const MAX_TEXT: usize = 4096;

impl Error {
    fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), exit_status: NOT_STARTED }
    }

    /// There is no such task, exec or process any more.
    pub(crate) fn not_found(text: impl Into<String>) -> Self {
        Self::new(Code::NOT_FOUND, text)
    }

    /// There is one of this name.
    pub(crate) fn already_exists(text: impl Into<String>) -> Self {
        Self::new(Code::ALREADY_EXISTS, text)
    }

    /// It cannot be done in the state the task is in.
    pub(crate) fn failed_precondition(text: impl Into<String>) -> Self {
        Self::new(Code::FAILED_PRECONDITION, text)
    }

    /// The request contradicts itself.
    pub(crate) fn invalid_argument(text: impl Into<String>) -> Self {
        Self::new(Code::INVALID_ARGUMENT, text)
    }

    /// It was tried and failed.
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::new(Code::UNKNOWN, text)
    }

    /// What the task has ended with whose program could not be started for this reason.
    pub(crate) fn exit_status(&self) -> u32 {
        self.exit_status
    }
}

/// One line: clients show errors in a line, with a prefix of their own.
impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let mut text = failure.to_string();
        let mut cause = std::error::Error::source(&failure);
        let mut not_runnable = None;
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            not_runnable = error.downcast_ref::<NotRunnable>().or(not_runnable);
            cause = error.source();
        }
        // Clients know why a program could not be executed from these words of runc's alone.
        match not_runnable.map(|error| error.exit_code) {
            Some(127) => text.push_str(": executable file not found in $PATH"),
            Some(126) => text.push_str(": permission denied"),
            _ => {}
        }
        if let Some(help) = failure.remedy() {
            text.push_str(&format!(" ({help})"));
        }
        let mut text = escaped(&text);
        cut(&mut text, MAX_TEXT);
        let exit_status = not_runnable.map_or(NOT_STARTED, |error| u32::from(error.exit_code));
        let error = if failure.is_refusal() { Self::failed_precondition(text) } else { Self::failed(text) };
        Self { exit_status, ..error }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code, error.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failure_quotes_is_shown_and_cut_not_obeyed() {
        let cause = Failure::new(format!("it ran on \u{1b}[31m{}", "\u{e4}".repeat(MAX_TEXT)));
        let Error { text, .. } = Failure::because("cannot restore", cause).into();
        assert!(text.starts_with("cannot restore: it ran on \\u{1b}[31m\u{e4}"), "{text}");
        assert!((MAX_TEXT - 1..=MAX_TEXT).contains(&text.len()), "{}", text.len());
    }
}
