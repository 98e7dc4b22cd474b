//! What a command line exits with when something about a container has failed.

use crate::container::NotRunnable;
use crate::failure::Failure;

/// mvm itself failed, as with docker: nothing can be said of the container.
pub const FAILED: u8 = 125;

/// Another process's report of why it could not do something.
#[derive(Debug, thiserror::Error)]
#[error("{report}")]
pub struct Refused {
    report: String,
    exit_code: u8,
}

impl Refused {
    /// The report, and what a command line exits with for it.
    pub fn new(report: String, exit_code: u8) -> Self {
        Self { report, exit_code }
    }
}

/// The exit code that a failure stands for: [`FAILED`] unless it is about the container's program, here or in
/// another process's report.
pub fn exit_code(failure: &Failure) -> u8 {
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        if let Some(program) = error.downcast_ref::<NotRunnable>() {
            return program.exit_code;
        }
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return refused.exit_code;
        }
        cause = error.source();
    }
    FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Error as AgentError;
    use crate::container::start_failure;

    #[test]
    fn a_missing_program_is_told_from_a_failure_of_mvm_through_another_process_too() {
        let kind = mvm_protocol::FailureKind::Exec;
        let message = "x".to_owned();
        let error = AgentError::Refused { kind, errno: libc::ENOENT, message, source: None };
        let missing = start_failure("/bin/x", error);
        assert_eq!(exit_code(&missing), 127);
        let report = Refused::new(missing.report(), exit_code(&missing));
        let told = Failure::because("cannot run the container", Failure::because("asked", report));
        assert_eq!(exit_code(&told), 127);
        assert_eq!(exit_code(&Failure::because("cannot boot", Failure::new("no memory"))), FAILED);
    }
}
