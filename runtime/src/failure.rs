//! A failure as a person reads it: what could not be done, why, and what to do next.

use std::error::Error;
use std::fmt;

/// One failed operation with its causes and, where a person can mend it, the remedy.
///
/// Prints as one line of what, a `because:` line for each cause, and at most one `help:` line.
#[derive(Debug)]
pub struct Failure {
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
    help: Option<String>,
}

impl Failure {
    /// A failure without a cause below it. `what` names operation and operand, lower case, no full stop.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: None, help: None }
    }

    /// A failure brought about by `cause`, whose own sources follow it.
    pub fn because(what: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), cause: Some(cause.into()), help: None }
    }

    /// Adds what to do next, unless a more precise hint is there already.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.get_or_insert_with(|| help.into());
        self
    }

    /// The remedy, this failure's own or that of the nearest cause that has one.
    pub fn remedy(&self) -> Option<&str> {
        if let Some(help) = &self.help {
            return Some(help);
        }
        let mut cause = self.source();
        while let Some(error) = cause {
            if let Some(failure) = error.downcast_ref::<Self>() {
                return failure.remedy();
            }
            cause = error.source();
        }
        None
    }

    /// The host's word on what kind of error lies at the bottom, if an operating system error does.
    pub fn source_kind(&self) -> Option<std::io::ErrorKind> {
        let mut cause = self.source();
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<std::io::Error>() {
                return Some(error.kind());
            }
            cause = error.source();
        }
        None
    }

    /// The whole text, several lines, as printed after a program's name.
    pub fn report(&self) -> String {
        let mut text = self.what.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(&format!("\n  because: {error}"));
            cause = error.source();
        }
        if let Some(help) = self.remedy() {
            text.push_str(&format!("\n  help:    {help}"));
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
    }
}

/// Puts the operation in front of an error.
pub trait Context<T> {
    /// Turns an error into a [`Failure`] of the operation `what`.
    ///
    /// # Errors
    /// The failure, if this was one.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|cause| Failure::because(what(), cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_what_because_and_the_nearest_help() {
        let io = std::io::Error::from_raw_os_error(libc::EACCES);
        let inner = Failure::because("cannot open /dev/kvm", io).help("add yourself to the kvm group");
        let outer = Failure::because("cannot start machine \"otter\"", inner);
        assert_eq!(
            outer.report(),
            "cannot start machine \"otter\"\n  because: cannot open /dev/kvm\n  because: Permission denied (os error 13)\n  help:    add yourself to the kvm group"
        );
    }

    #[test]
    fn the_outer_help_wins_over_the_inner_one() {
        let inner = Failure::new("no such image").help("inner");
        assert_eq!(Failure::because("cannot run it", inner).help("outer").remedy(), Some("outer"));
    }
}
