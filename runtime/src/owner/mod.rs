//! The process that owns a container: it keeps its record, writes its log and serves other processes of mvm.
//!
//! The owner is `mvm run` itself, or one that `mvm run --detach` leaves behind.

mod client;
mod log;
mod serve;
mod wire;

pub use client::{Client, Control, Refused, Started};
pub use log::{Line, Log, MAX_LOG, read as read_log};
pub use wire::{Exec, Reply, Request};

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_protocol::SignalTarget;
use oci_spec::runtime::Process as OciProcess;

use crate::failure::{Context, Failure};
use crate::sandbox::Sandbox;
use crate::state::events::{self, Kind};
use crate::state::{CONTROL, Condition, Home, LOG, Owned, ProcessId, Record, now};

/// Time a container's processes have to be gone after SIGKILL.
const KILL_TIME: Duration = Duration::from_secs(10);

/// A container that this process owns.
#[derive(Clone)]
pub struct Owner(Arc<Inner>);

struct Inner {
    home: Home,
    owned: Mutex<Option<Owned>>,
    log: Log,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    record: Record,
    run: Option<Run>,
    /// Somebody had it stopped: it is not started again.
    stopped: bool,
}

/// A container's machine and first process, while they run.
#[derive(Clone)]
pub struct Run {
    /// The machine.
    pub sandbox: Arc<dyn Sandbox>,
    /// The container's id in it.
    pub container: String,
    /// Its first process.
    pub process: u64,
    /// What that was made of; others that are run in it take after it.
    pub spec: OciProcess,
}

impl Owner {
    /// Takes a container on: its record is written, requests are served from now on.
    ///
    /// # Errors
    /// Its directory cannot be written.
    pub fn new(home: &Home, owned: Owned, record: Record) -> Result<Self, Failure> {
        owned.write(&record)?;
        let socket = owned.path().join(CONTROL);
        // The directory is its owner's alone, so the socket is.
        let listener =
            UnixListener::bind(&socket).context(|| format!("cannot listen on {}", socket.display()))?;
        let log = Log::new(owned.path().join(LOG), MAX_LOG);
        let state = State { record, run: None, stopped: false };
        let inner = Inner {
            home: home.clone(),
            owned: Mutex::new(Some(owned)),
            log,
            state: Mutex::new(state),
            changed: Condvar::new(),
        };
        let owner = Self(Arc::new(inner));
        owner.emit(Kind::Create, None);
        serve::begin(&owner, listener)?;
        Ok(owner)
    }

    /// Where the container's output is kept.
    pub fn log(&self) -> &Log {
        &self.0.log
    }

    /// The record as it is now.
    pub fn record(&self) -> Record {
        self.lock().record.clone()
    }

    /// The container runs.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn started(&self, run: Run) -> Result<(), Failure> {
        if self.lock().stopped {
            return Err(Failure::new("the container was stopped while it was started"));
        }
        self.change(|state| {
            state.record.machine = i32::try_from(run.sandbox.pid()).ok().and_then(ProcessId::of);
            state.record.started = Some(now());
            state.record.condition = Condition::Running;
            state.run = Some(run);
        })?;
        self.emit(Kind::Start, None);
        Ok(())
    }

    /// The container's process has ended. Its sandbox is to be ended by the caller.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn exited(&self, code: u8) -> Result<(), Failure> {
        self.emit(Kind::Exit, Some(code));
        self.change(|state| {
            state.record.condition = Condition::Exited { code, at: now() };
            state.record.machine = None;
            state.run = None;
        })
    }

    /// Whether it is to be started again; counts it if so.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn again(&self, code: u8) -> Result<bool, Failure> {
        let mut again = false;
        self.change(|state| {
            again = !state.stopped && state.record.restart.applies(code, state.record.restarts);
            if again {
                state.record.restarts = state.record.restarts.saturating_add(1);
                state.record.condition = Condition::Starting;
            }
        })?;
        Ok(again)
    }

    /// Waits before the container is started again, longer each time; false if it was stopped meanwhile.
    pub fn pause_before_restart(&self) -> bool {
        let mut state = self.lock();
        let doublings = state.record.restarts.min(10);
        let end = Instant::now() + Duration::from_millis(50) * 2_u32.pow(doublings);
        while !state.stopped {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Nothing more will be done for the container: it is removed, if that was wished, or its record kept.
    ///
    /// # Errors
    /// Something of it is left behind.
    pub fn finish(self) -> Result<(), Failure> {
        let owned = self.0.owned.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(owned) = owned else { return Ok(()) };
        owned.ledger()?.settle()?;
        if self.record().remove {
            self.emit(Kind::Remove, None);
            let directory = owned.path().to_owned();
            return owned.remove().context(|| format!("cannot remove {}", directory.display()));
        }
        let _ = std::fs::remove_file(owned.path().join(CONTROL));
        Ok(())
    }

    /// The container never came to be: nothing of it is kept.
    ///
    /// # Errors
    /// Something of it is left behind.
    pub fn abandon(self) -> Result<(), Failure> {
        self.lock().record.remove = true;
        self.finish()
    }

    fn run(&self) -> Result<Run, Failure> {
        let state = self.lock();
        state.run.clone().ok_or_else(|| {
            Failure::new(format!("container {} is not running", state.record.name))
                .help("`mvm ps` lists what runs")
        })
    }

    /// Has it end and waits until it has.
    fn stop(&self, grace: Duration) -> Result<(), Failure> {
        let run = {
            let mut state = self.lock();
            state.stopped = true;
            self.0.changed.notify_all();
            match state.run.clone() {
                Some(run) => run,
                None => return Ok(()),
            }
        };
        // One that is held would not hear of it.
        if matches!(self.record().condition, Condition::Paused) {
            let _ = self.set_paused(false);
        }
        // A guest that does not answer is not waited for.
        let sent = |signal| run.sandbox.signal(run.process, signal, SignalTarget::Process).is_ok();
        if sent(libc::SIGTERM) && self.await_end(grace) {
            return Ok(());
        }
        if sent(libc::SIGKILL) && self.await_end(KILL_TIME) {
            return Ok(());
        }
        // A guest that does not even do that has no say any more.
        run.sandbox.end()
    }

    fn await_end(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut state = self.lock();
        while state.run.is_some() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn set_paused(&self, paused: bool) -> Result<(), Failure> {
        let run = self.run()?;
        if paused { run.sandbox.pause(&run.container) } else { run.sandbox.resume(&run.container) }?;
        self.emit(if paused { Kind::Pause } else { Kind::Resume }, None);
        self.change(|state| {
            if state.run.is_some() {
                state.record.condition = if paused { Condition::Paused } else { Condition::Running };
            }
        })
    }

    /// Changes the state, writes the record and tells whoever waits.
    fn change(&self, action: impl FnOnce(&mut State)) -> Result<(), Failure> {
        let mut state = self.lock();
        action(&mut state);
        self.0.changed.notify_all();
        match &*self.0.owned.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(owned) => owned.write(&state.record),
            None => Ok(()),
        }
    }

    fn emit(&self, kind: Kind, code: Option<u8>) {
        let record = self.record();
        events::emit(&self.0.home, &record.id, &record.name, kind, code);
    }

    /// Order of locks: this one, then that of `owned`.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("record", &self.lock().record).finish_non_exhaustive()
    }
}
