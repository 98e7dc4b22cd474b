//! The process that owns a container: it keeps its record, writes its log and serves other processes of mvm.
//!
//! The owner is `mvm run` itself, or one that `mvm run --detach` leaves behind.

mod client;
mod exit_code;
mod job;
mod log;
mod output;
mod save;
mod serve;
pub(crate) mod wire;

pub use client::{Client, Control, Started};
pub use exit_code::{FAILED, Refused, exit_code};
pub use job::{Job, JobNetwork};
pub use log::{Line, Log, MAX_LOG, read as read_log};
pub use output::{Output, Outputs};
pub use wire::{Exec, Reply, Request};

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use mvm_protocol::SignalTarget;
use oci_spec::runtime::Process as OciProcess;

use crate::failure::{Context, Failure};
use crate::sandbox::Sandbox;
use crate::state::events::{self, Kind};
use crate::state::{CONTROL, Condition, Home, LOG, Owned, ProcessId, Record, Resource, now};

/// Time a container's processes have to be gone after SIGKILL.
const KILL_TIME: Duration = Duration::from_secs(10);
/// Time in which the end of a process is known here that the guest knew of already.
const NEWS_TIME: Duration = Duration::from_secs(2);
/// Time from the end of a container's process to that of its machine, at the most: its output is read to the end, what
/// it wrote is brought where it belongs, and its guest shuts down.
const TEARDOWN_TIME: Duration = Duration::from_secs(150);
/// Time a container's machine has to be started, or to be found unable to: more than its agent is waited for.
const START_TIME: Duration = Duration::from_secs(90);

/// A container that this process owns.
#[derive(Clone)]
pub struct Owner(Arc<Inner>);

struct Inner {
    home: Home,
    owned: Mutex<Option<Owned>>,
    log: Log,
    state: Mutex<State>,
    changed: Condvar,
    /// Held alone while the machine is saved, and by whoever asks something of its guest that would be refused then.
    quiet: RwLock<()>,
}

struct State {
    record: Record,
    run: Option<Run>,
    /// Its first process has ended; its machine may have to yet.
    process_ended: bool,
    /// Somebody had it stopped: it is not started again.
    stopped: bool,
}

impl State {
    fn is_ending(&self) -> bool {
        self.process_ended || self.record.condition.has_ended()
    }
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
    /// What the container is run of.
    pub job: Arc<Job>,
}

impl Owner {
    /// Takes a container on: its record is written, requests are served from now on.
    ///
    /// # Errors
    /// Its directory cannot be written.
    pub fn new(home: &Home, owned: Owned, record: Record) -> Result<Self, Failure> {
        owned.write(&record)?;
        let socket = owned.path().join(CONTROL);
        owned.ledger()?.note(&Resource::File { path: socket.clone() })?;
        // The directory is its owner's alone, so the socket is.
        let listener =
            UnixListener::bind(&socket).context(|| format!("cannot listen on {}", socket.display()))?;
        let log = Log::new(owned.path().join(LOG), MAX_LOG);
        let state = State { record, run: None, process_ended: false, stopped: false };
        let inner = Inner {
            home: home.clone(),
            owned: Mutex::new(Some(owned)),
            log,
            state: Mutex::new(state),
            changed: Condvar::new(),
            quiet: RwLock::new(()),
        };
        let owner = Self(Arc::new(inner));
        owner.emit(Kind::Create, None);
        serve::begin(&owner, listener)?;
        Ok(owner)
    }

    /// Notes something of the host that is about to be made for the container.
    ///
    /// # Errors
    /// It cannot be written down: then it must not be made.
    pub fn note(&self, resource: &Resource) -> Result<(), Failure> {
        match &*self.0.owned.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(owned) => owned.ledger()?.note(resource),
            None => Err(Failure::new("the container is no longer owned")),
        }
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
        let machine = i32::try_from(run.sandbox.pid()).ok().and_then(ProcessId::of);
        let mut stopped = false;
        self.change(|state| {
            stopped = state.stopped;
            if !stopped {
                state.record.machine = machine;
                state.record.started = Some(now());
                state.record.condition = Condition::Running;
                state.run = Some(run);
                state.process_ended = false;
            }
        })?;
        if stopped {
            return Err(Failure::new("the container was stopped while it was started"));
        }
        self.emit(Kind::Start, None);
        Ok(())
    }

    /// The container's process has ended; its sandbox has yet to.
    pub fn process_ended(&self) {
        self.lock().process_ended = true;
        self.0.changed.notify_all();
    }

    /// The container has ended, and its sandbox.
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

    /// Whether it is to be started again, by its policy and unless somebody has it stopped; waits before it is,
    /// longer each time.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn again(&self, code: u8) -> Result<bool, Failure> {
        let record = self.record();
        if !record.restart.applies(code, record.restarts) {
            return Ok(false);
        }
        let pause = Duration::from_millis(50) * 2_u32.pow(record.restarts.saturating_add(1).min(10));
        self.await_state(pause, |state| state.stopped);
        let mut again = false;
        self.change(|state| {
            again = !state.stopped;
            if again {
                state.record.restarts = state.record.restarts.saturating_add(1);
                state.record.condition = Condition::Starting;
            }
        })?;
        Ok(again)
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
        state.run.clone().ok_or_else(|| state.record.not_running())
    }

    /// Has it end and waits until it has.
    fn stop(&self, grace: Duration) -> Result<(), Failure> {
        let run = {
            let mut state = self.lock();
            state.stopped = true;
            self.0.changed.notify_all();
            state.run.clone()
        };
        // One that is being started ends as soon as it would run.
        let Some(run) = run else {
            return match self.await_end(START_TIME) {
                true => Ok(()),
                false => Err(Failure::new("the container is still being started").help("try again")),
            };
        };
        // One that is held would not hear of it.
        if matches!(self.record().condition, Condition::Paused) {
            let _ = self.set_paused(false);
        }
        // A guest that does not answer is not waited for.
        let heeded = |signal, time| {
            let sent = run.sandbox.signal(run.process, signal, SignalTarget::Process).is_ok();
            self.await_state(if sent { time } else { NEWS_TIME }, State::is_ending)
        };
        // Whoever runs it ends its machine. Ended by two, that would be ended in disorder.
        if (heeded(libc::SIGTERM, grace) || heeded(libc::SIGKILL, KILL_TIME)) && self.await_end(TEARDOWN_TIME)
        {
            return Ok(());
        }
        // A guest that does not even do that has no say any more.
        run.sandbox.end()
    }

    fn await_end(&self, time: Duration) -> bool {
        self.await_state(time, |state| state.record.condition.has_ended())
    }

    /// Whether the state becomes so within `time`.
    fn await_state(&self, time: Duration, becomes: impl Fn(&State) -> bool) -> bool {
        let state = self.lock();
        let waited = self.0.changed.wait_timeout_while(state, time, |state| !becomes(state));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use mvm_protocol::WindowSize;

    use super::*;
    use crate::state::Restart;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn owner(record: Record) -> (tempfile::TempDir, Owner) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let owned = home.create("c").unwrap();
        (dir, Owner::new(&home, owned, record).unwrap())
    }

    #[test]
    fn whoever_stops_a_container_that_is_being_started_waits_until_it_has_ended() {
        let (_dir, owner) = owner(Record::default());
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = scope.spawn(|| owner.stop(Duration::ZERO).map(|()| ended.load(Ordering::SeqCst)));
            assert!(owner.await_state(PATIENCE, |state| state.stopped));
            ended.store(true, Ordering::SeqCst);
            owner.exited(FAILED).unwrap();
            assert!(stop.join().unwrap().unwrap());
        });
    }

    #[test]
    fn whoever_is_not_served_is_told_so_and_not_that_the_container_has_ended() {
        let (dir, owner) = owner(Record { name: "web".to_owned(), ..Record::default() });
        let seen = Home::at(dir.path()).find("web").unwrap();
        let connect = || std::os::unix::net::UnixStream::connect(seen.directory.join(CONTROL)).unwrap();
        let _busy: Vec<_> = (0..serve::MAX_CONNECTIONS).map(|_| connect()).collect();
        let refused = Client::connect(&seen).unwrap().stop(0).unwrap_err().report();
        assert!(refused.contains("too much at once") || refused.contains("cannot ask"), "{refused}");
        assert!(!owner.record().condition.has_ended());
    }

    #[test]
    fn a_container_that_is_stopped_before_it_is_started_again_is_not_and_has_ended() {
        let record = Record { restart: Restart::Always, restarts: 20, ..Record::default() };
        let (_dir, owner) = owner(record);
        owner.exited(3).unwrap();
        std::thread::scope(|scope| {
            let again = scope.spawn(|| owner.again(3));
            owner.stop(Duration::ZERO).unwrap();
            assert!(!again.join().unwrap().unwrap());
        });
        assert!(matches!(owner.record().condition, Condition::Exited { code: 3, .. }));
    }

    #[test]
    fn a_container_is_started_again_as_often_as_its_policy_says() {
        let (_dir, owner) = owner(Record { restart: Restart::OnFailure(1), ..Record::default() });
        assert!(!owner.again(0).unwrap());
        assert!(owner.again(1).unwrap());
        assert_eq!((owner.record().restarts, owner.record().condition), (1, Condition::Starting));
        assert!(!owner.again(1).unwrap());
    }

    #[test]
    fn what_concerns_a_process_of_its_connection_is_refused_where_there_is_none() {
        let (dir, owner) = owner(Record::default());
        let stream = UnixStream::connect(dir.path().join("containers/c").join(CONTROL)).unwrap();
        let mut wire = wire::Wire::new(stream);
        wire.send(&Request::Resize(WindowSize::default()), &[]).unwrap();
        let Some((Reply::Failed { report, .. }, _)) = wire.receive().unwrap() else { panic!("not refused") };
        assert_eq!(report, "this request needs a process of its connection");
        owner.finish().unwrap();
    }

    #[test]
    fn a_container_that_has_ended_keeps_its_record_and_nothing_else_but_its_log() {
        let (dir, owner) = owner(Record::default());
        let directory = dir.path().join("containers/c");
        assert!(directory.join(CONTROL).exists());
        owner.finish().unwrap();
        assert!(directory.join("record.json").exists() && !directory.join(CONTROL).exists());
        assert_eq!(crate::state::collect(&Home::at(dir.path())).unwrap().len(), 1, "it never exited");
    }
}
