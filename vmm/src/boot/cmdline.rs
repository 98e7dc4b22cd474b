//! The kernel command line: what was configured, and what this machine's kernel should know.

use super::{Error, Platform, Result};
use crate::layout;

/// Adds the machine's own arguments to `configured`, unless it speaks of them already, and ends it with a NUL.
pub(super) fn complete(configured: &str, platform: &Platform) -> Result<String> {
    let mut line = configured.trim().to_owned();
    let mut add = |argument: &str| {
        let (key, _) = argument.split_once('=').unwrap_or((argument, ""));
        let given = line.split_ascii_whitespace().any(|word| word.split('=').next() == Some(key));
        if !given {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(argument);
        }
    };
    // Early quirks look for real chipsets by port I/O that this machine does not have: 76 exits.
    add("pci=noearly");
    if !platform.serial {
        add("8250.nr_uarts=0");
    }
    if line.len() >= layout::CMDLINE_SIZE {
        return Err(Error::CmdlineTooLong(line.len()));
    }
    line.push('\0');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_comes_first_and_wins() {
        let platform = Platform { cpus: 1, serial: true };
        assert_eq!(complete("quiet", &platform).unwrap(), "quiet pci=noearly\0");
        assert_eq!(complete("pci=off", &platform).unwrap(), "pci=off\0");
        assert_eq!(complete("", &platform).unwrap(), "pci=noearly\0");
    }

    #[test]
    fn a_line_that_does_not_fit_is_refused() {
        let platform = Platform { cpus: 1, serial: false };
        let error = complete(&"x".repeat(layout::CMDLINE_SIZE - 20), &platform).unwrap_err();
        assert!(matches!(error, Error::CmdlineTooLong(_)));
    }
}
