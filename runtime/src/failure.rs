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
    refusal: bool,
}

impl Failure {
    /// A failure without a cause below it. `what` names operation and operand, lower case, no full stop.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: None, help: None, refusal: false }
    }

    /// A failure brought about by `cause`, whose own sources follow it.
    pub fn because(what: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), cause: Some(cause.into()), help: None, refusal: false }
    }

    /// Adds what to do next, unless a more precise hint is there already.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.get_or_insert_with(|| help.into());
        self
    }

    /// Marks it as a refusal: nothing broke, but what was asked for cannot be had of what there is.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.refusal = true;
        self
    }

    /// Whether this failure or one of its causes is a refusal ([`Failure::refused`]).
    pub fn is_refusal(&self) -> bool {
        let mut cause = self.source();
        let mut found = self.refusal;
        while let Some(error) = cause {
            found |= error.downcast_ref::<Self>().is_some_and(|failure| failure.refusal);
            cause = error.source();
        }
        found
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
        self.caused_by().map(std::io::Error::kind)
    }

    /// The nearest of its causes that is an `E`.
    pub fn caused_by<E: Error + 'static>(&self) -> Option<&E> {
        let mut cause = self.source();
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<E>() {
                return Some(error);
            }
            cause = error.source();
        }
        None
    }

    /// The whole text, several lines, as printed after a program's name. It may name what a guest or an image has
    /// called something: a terminal obeys none of it.
    pub fn report(&self) -> String {
        let mut text = shown(&self.what);
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(&format!("\n  because: {}", shown(&error.to_string())));
            cause = error.source();
        }
        if let Some(help) = self.remedy() {
            text.push_str(&format!("\n  help:    {}", shown(help)));
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

/// A cause may be another process's report, which has lines of its own.
fn shown(text: &str) -> String {
    text.split('\n').map(escaped).collect::<Vec<_>>().join("\n")
}

/// Text that a terminal shows and does not obey: control characters are escaped.
pub fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
}

/// Cuts a text to at most so many bytes, at a character's end.
pub fn cut(text: &mut String, most: usize) {
    if text.len() > most {
        let end = (0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
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
    fn a_report_has_nothing_that_a_terminal_obeys() {
        let cause = std::io::Error::other("\u{1b}]0;owned\u{7}\r\u{9b}2Jä");
        let report = Failure::because("cannot read a\u{1b}[2Jb", cause).help("\u{8}").report();
        assert_eq!(report.chars().filter(|it| it.is_control() && *it != '\n').count(), 0, "{report}");
        assert!(
            report.contains("a\\u{1b}[2Jb") && report.ends_with("\\u{8}") && report.contains('ä'),
            "{report}"
        );
    }

    #[test]
    fn the_outer_help_wins_over_the_inner_one() {
        let inner = Failure::new("no such image").help("inner");
        assert_eq!(Failure::because("cannot run it", inner).help("outer").remedy(), Some("outer"));
    }

    #[test]
    fn a_refusal_is_one_however_deep_it_lies_and_nothing_else_is() {
        let refused = || Failure::new("it is paused").refused();
        let deep = Failure::because("cannot restore it", Failure::because("it does not fit", refused()));
        assert!(refused().is_refusal() && deep.is_refusal());
        let broken = Failure::because("cannot read it", std::io::Error::from_raw_os_error(libc::EIO));
        assert!(!broken.is_refusal());
    }
}
