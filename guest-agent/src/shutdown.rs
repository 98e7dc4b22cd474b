//! The orderly end: TERM to all, a while of grace, KILL, sync, unmount, power off or reset.

use std::{
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use mvm_protocol::{ShutdownMode, limits::MAX_SHUTDOWN_MS};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Shutdown as Half, shutdown},
    unistd::Pid,
};

use crate::{
    agent::Agent,
    boot::{self, Role},
    control::Control,
    sys,
};

/// How long killed processes may take to vanish; one in an uninterruptible wait never does.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// How long the host may take to read the last messages.
const LAST_WORDS: u16 = 200;

/// A shutdown under way.
pub(crate) struct Shutdown {
    mode: ShutdownMode,
    /// When it goes on even if processes are left.
    pub(crate) deadline: Instant,
    killed: bool,
}

impl Shutdown {
    /// The processes are about to be told.
    pub(crate) fn begin(mode: ShutdownMode, grace_ms: u32) -> Self {
        let grace = Duration::from_millis(grace_ms.min(MAX_SHUTDOWN_MS).into());
        Self { mode, deadline: Instant::now() + grace, killed: false }
    }
}

impl Agent {
    /// Sends a signal to everything but the agent.
    pub(crate) fn signal_all(&self, signal: i32) {
        match self.role {
            Role::Init => {
                let _ = sys::kill(Pid::from_raw(-1), signal);
            }
            // Outside a guest "everything" would be the developer's machine.
            Role::Guest => self.table.all_running().for_each(|pid| {
                let _ = sys::kill(Pid::from_raw(-pid.as_raw()), signal);
            }),
        }
    }

    /// Takes a shutdown as far as it can go by now.
    pub(crate) fn advance_shutdown(&mut self) {
        let Some(Shutdown { mode, deadline, killed }) = self.shutdown else {
            return;
        };
        let children = !matches!(sys::has_children(), Err(Errno::ECHILD));
        if children && Instant::now() < deadline {
            return;
        }
        if children && !killed {
            self.signal_all(libc::SIGKILL);
            self.shutdown = Some(Shutdown { mode, deadline: Instant::now() + AFTER_KILL, killed: true });
            return;
        }
        if let Some(control) = self.take_control() {
            say_goodbye(control);
        }
        self.containers.unmount_all();
        boot::end(self.role, mode)
    }
}

/// Waits until the host has read everything and closed, but not for long: what the kernel still holds for
/// it is lost with the machine.
fn say_goodbye(mut control: Control) {
    let wait = |control: &Control, events| {
        let mut fds = [PollFd::new(control.socket(), events)];
        matches!(poll(&mut fds, PollTimeout::from(LAST_WORDS)), Ok(1))
    };
    while control.has_unsent() && wait(&control, PollFlags::POLLOUT) && control.flush().is_ok() {}
    if shutdown(control.socket().as_raw_fd(), Half::Write).is_ok() {
        while wait(&control, PollFlags::POLLIN) && control.receive().is_ok() {}
    }
}
