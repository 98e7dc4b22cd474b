//! The user's terminal: raw mode while a machine has it, and its size.

use std::io::{IsTerminal, stdin};
use std::os::fd::AsFd;

use mvm_protocol::WindowSize;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Raw mode of standard input, undone when dropped.
pub(crate) struct RawMode(Option<Termios>);

impl RawMode {
    /// Switches to raw mode if standard input is a terminal; otherwise there is nothing to do.
    pub(crate) fn enter() -> nix::Result<Self> {
        if !stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(stdin().as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin().as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The terminal may be gone, and then nobody misses its mode.
            let _ = tcsetattr(stdin().as_fd(), SetArg::TCSANOW, before);
        }
    }
}

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);
