//! The user's terminal: raw mode while a machine has it, and its size.

use std::io::{IsTerminal, stdin};
use std::os::fd::AsFd;

use mvm_protocol::WindowSize;
use nix::sys::signal::{SigSet, Signal};
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

/// The terminal's size; 24 by 80 if there is no terminal to ask.
pub(crate) fn size() -> WindowSize {
    let (columns, rows) =
        terminal_size::terminal_size().map_or((80, 24), |(width, height)| (width.0, height.0));
    WindowSize { rows, columns }
}

/// Signals that `mvm` passes on or acts on itself instead of dying of them.
pub(crate) fn block_signals(signals: &[Signal]) -> nix::Result<SigSet> {
    let mut set = SigSet::empty();
    for signal in signals {
        set.add(*signal);
    }
    set.thread_block()?;
    Ok(set)
}
