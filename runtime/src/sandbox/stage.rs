//! The stages of a sandbox's machine: planned, running, ended; and the thread that waits for the last.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::agent::AgentClient;
use crate::failure::{Context, Failure};
use crate::machine::Machine;

/// A machine that runs.
#[derive(Debug)]
pub(super) struct Live {
    /// Its agent.
    pub(super) agent: AgentClient,
    /// Its process.
    pub(super) pid: u32,
    /// Held only for calls that return at once.
    machine: Mutex<Machine>,
}

/// Where a machine is in its life.
#[derive(Clone)]
enum Stage {
    /// It has not been started.
    Planned,
    /// It runs.
    Running(Arc<Live>),
    /// It has ended: how, and what it had told by then.
    Ended(String, Option<Arc<Live>>),
}

/// The stage, and word when it changes.
pub(super) struct Stages {
    stage: Mutex<Stage>,
    changed: Condvar,
    /// Its end is being brought about by [`Stages::kill`].
    killed: AtomicBool,
}

impl fmt::Debug for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self.lock() {
            Stage::Planned => "planned",
            Stage::Running(_) => "running",
            Stage::Ended(..) => "ended",
        })
    }
}

impl Live {
    /// The machine; nothing done under this lock waits for the guest.
    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stages {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            stage: Mutex::new(Stage::Planned),
            changed: Condvar::new(),
            killed: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the machine has yet to be started.
    pub(super) fn is_planned(&self) -> bool {
        matches!(*self.lock(), Stage::Planned)
    }

    /// The running machine, if it runs.
    pub(super) fn live(&self) -> Option<Arc<Live>> {
        match &*self.lock() {
            Stage::Running(live) => Some(Arc::clone(live)),
            Stage::Planned | Stage::Ended(..) => None,
        }
    }

    /// The machine that runs or ran: what it told before its end can still be read.
    pub(super) fn live_or_last(&self) -> Option<Arc<Live>> {
        match &*self.lock() {
            Stage::Running(live) => Some(Arc::clone(live)),
            Stage::Planned => None,
            Stage::Ended(_, last) => last.clone(),
        }
    }

    /// The running machine.
    ///
    /// # Errors
    /// It was not started, or has ended.
    pub(super) fn running(&self) -> Result<Arc<Live>, Failure> {
        match &*self.lock() {
            Stage::Running(live) => Ok(Arc::clone(live)),
            Stage::Planned => Err(Failure::new("the machine has not been started")),
            Stage::Ended(how, _) => Err(Failure::new(format!("the machine has ended: {how}"))),
        }
    }

    /// The machine runs: from now on its end is waited for.
    ///
    /// # Errors
    /// The sandbox was ended meanwhile, or no thread can be had; the machine is gone then.
    pub(super) fn start(
        self: &Arc<Self>,
        machine: Machine,
        agent: AgentClient,
    ) -> Result<Arc<Live>, Failure> {
        let failed = || "cannot watch the machine".to_owned();
        let ended = machine.ended().try_clone_to_owned().context(failed)?;
        let pid = machine.pid().unsigned_abs();
        let live = Arc::new(Live { agent, pid, machine: Mutex::new(machine) });
        {
            let mut stage = self.lock();
            if !matches!(*stage, Stage::Planned) {
                return Err(Failure::new("the sandbox was ended while its machine was started"));
            }
            *stage = Stage::Running(Arc::clone(&live));
        }
        let (stages, watched) = (Arc::clone(self), Arc::clone(&live));
        let spawned = std::thread::Builder::new().name("machine".to_owned()).spawn(move || {
            let how = wait(&ended).and_then(|()| {
                watched.machine().wait().map(|exit| exit.to_string()).map_err(io::Error::other)
            });
            let how = match how {
                _ if stages.killed.load(Ordering::Relaxed) => "it was ended".to_owned(),
                Ok(how) => how,
                Err(error) => error.to_string(),
            };
            stages.end(how, Some(watched));
        });
        if let Err(error) = spawned {
            let _ = self.kill(&live);
            self.end(failed(), None);
            return Err(Failure::because(failed(), error));
        }
        Ok(live)
    }

    /// The machine is never started.
    pub(super) fn abandon(&self, why: &str) {
        let mut stage = self.lock();
        if let Stage::Planned = *stage {
            *stage = Stage::Ended(why.to_owned(), None);
            self.changed.notify_all();
        }
    }

    /// Ends the machine at once.
    pub(super) fn kill(&self, live: &Live) -> Result<(), Failure> {
        self.killed.store(true, Ordering::Relaxed);
        live.machine().kill()
    }

    /// How the machine ended, waiting for it.
    pub(super) fn wait(&self) -> String {
        let mut stage = self.lock();
        loop {
            if let Stage::Ended(how, _) = &*stage {
                return how.clone();
            }
            stage = self.changed.wait(stage).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the machine has ended within `time`.
    pub(super) fn wait_at_most(&self, time: Duration) -> bool {
        let stage = self.lock();
        let ended = |stage: &mut Stage| !matches!(stage, Stage::Ended(..));
        let waited = self.changed.wait_timeout_while(stage, time, ended);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn end(&self, how: String, last: Option<Arc<Live>>) {
        *self.lock() = Stage::Ended(how, last);
        self.changed.notify_all();
    }
}

/// Waits until a process has ended.
fn wait(process: &OwnedFd) -> io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
