//! The stages of a sandbox's machine: planned, running, ended; and the thread that waits for the last.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::agent::AgentClient;
use crate::failure::{Context, Failure};
use crate::machine::{Control, LOST_TIME, Machine, explain};

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
    /// Its guest was asked to end: its agent may leave before it.
    ending: AtomicBool,
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
    /// What the machine is controlled by, for calls that may take longer than the machine may be locked.
    pub(super) fn control(&self) -> Control {
        self.machine().control().clone()
    }

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
            ending: AtomicBool::new(false),
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
            let how = stages.watch(ended.as_fd(), &watched).unwrap_or_else(|error| error.to_string());
            stages.end(how, Some(watched));
        });
        if let Err(error) = spawned {
            let _ = self.kill(&live);
            self.end(failed(), None);
            return Err(Failure::because(failed(), error));
        }
        Ok(live)
    }

    /// Waits for the end of a machine, and brings it about if nobody can reach its guest any more; tells how it ended.
    fn watch(&self, ended: BorrowedFd<'_>, live: &Live) -> io::Result<String> {
        if first(&[ended, live.agent.lost()], None)? == Some(1)
            && first(&[ended], Some(LOST_TIME))?.is_none()
            && !self.ending.load(Ordering::Relaxed)
        {
            self.kill(live).map_err(io::Error::other)?;
            return Ok("the connection to its agent was lost".to_owned());
        }
        first(&[ended], None)?;
        let how = live.machine().wait();
        match how {
            _ if self.killed.load(Ordering::Relaxed) => Ok("it was ended".to_owned()),
            how => how.map(|exit| exit.to_string()).map_err(io::Error::other),
        }
    }

    /// The guest is about to be asked to end: that its agent leaves is in order.
    pub(super) fn expect_end(&self) {
        self.ending.store(true, Ordering::Relaxed);
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

    /// Asks something of the machine's guest, and ends the machine if that takes until `end`: whatever is waited for
    /// fails then.
    pub(super) fn ask_by<T>(&self, live: &Live, end: Instant, asking: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            let (through, waits) = mpsc::channel::<()>();
            let watch = move || {
                let left = end.saturating_duration_since(Instant::now());
                if waits.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                    log::warn!("the machine is killed: its guest takes too long to end");
                    // It is tried again, and told, by whoever waits for the end.
                    let _ = self.kill(live);
                }
            };
            // Without the thread there is still an end to each thing that is asked.
            let _ = std::thread::Builder::new().name("ending".to_owned()).spawn_scoped(scope, watch);
            let asked = asking();
            drop(through);
            asked
        })
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

    /// What was asked of the guest failed: if that is because its agent is lost, how the machine ended is why.
    pub(super) fn explain(&self, failure: Failure) -> Failure {
        explain(failure, || match self.wait_at_most(2 * LOST_TIME) {
            true => Some(self.wait()),
            false => None,
        })
    }

    fn end(&self, how: String, last: Option<Arc<Live>>) {
        *self.lock() = Stage::Ended(how, last);
        self.changed.notify_all();
    }
}

/// Which of these is readable or has hung up first; `None` if none is within the time.
fn first(fds: &[BorrowedFd<'_>], time: Option<Duration>) -> io::Result<Option<usize>> {
    let deadline = time.map(|time| Instant::now() + time);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
        });
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        match poll(&mut polled, timeout) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(None),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(polled.iter().position(|fd| fd.any().unwrap_or(true))),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::hostile::client;
    use crate::machine::machine;

    #[test]
    fn a_machine_whose_agent_is_lost_ends_and_is_named_by_its_process_after_that() {
        let (agent, guest) = client();
        let stages = Stages::new();
        let live = stages.start(machine("/bin/sleep", 60), agent).unwrap();
        assert!(!stages.wait_at_most(Duration::from_millis(50)));
        drop(guest);
        assert_eq!(stages.wait(), "the connection to its agent was lost");
        assert!(stages.live().is_none());
        assert_eq!(stages.live_or_last().unwrap().pid, live.pid);
        assert!(crate::state::ProcessId::of(live.pid.cast_signed()).is_none(), "it is not waited for");
    }

    #[test]
    fn a_call_that_fails_because_the_machine_has_ended_says_how_that_ended() {
        let (agent, guest) = client();
        let stages = Stages::new();
        stages.start(machine("/bin/false", 0), agent).unwrap();
        drop(guest);
        let call = || stages.live_or_last().unwrap().agent.wait(1, None).context(|| "cannot wait".to_owned());
        let report = stages.explain(call().unwrap_err()).report();
        assert!(report.starts_with("cannot wait\n  because: the machine has ended: "), "{report}");
        let other = stages.explain(Failure::because("cannot read", io::Error::from(io::ErrorKind::NotFound)));
        assert!(!other.report().contains("the machine has ended"), "{}", other.report());
    }

    #[test]
    fn a_guest_that_was_asked_to_end_may_do_without_its_agent_for_as_long_as_it_was_given() {
        let (agent, guest) = client();
        let stages = Stages::new();
        let live = stages.start(machine("/bin/sleep", 60), agent).unwrap();
        stages.expect_end();
        drop(guest);
        assert!(!stages.wait_at_most(LOST_TIME + Duration::from_millis(500)), "it was killed meanwhile");
        stages.kill(&live).unwrap();
        assert_eq!(stages.wait(), "it was ended");
    }

    #[test]
    fn a_machine_whose_guest_is_asked_for_too_long_is_ended_and_another_lives() {
        let (agent, _guest) = client();
        let stages = Stages::new();
        let live = stages.start(machine("/bin/sleep", 60), agent).unwrap();
        assert_eq!(stages.ask_by(&live, Instant::now() + Duration::from_secs(60), || 5), 5);
        assert!(!stages.wait_at_most(Duration::from_millis(50)));
        let end = Instant::now() + Duration::from_millis(50);
        assert_eq!(stages.ask_by(&live, end, || stages.wait()), "it was ended");
    }

    #[test]
    fn the_first_to_hang_up_is_told_and_who_does_not_is_waited_for_no_longer_than_said() {
        let ((one, writer), (two, other)) = (io::pipe().unwrap(), io::pipe().unwrap());
        let fds = [one.as_fd(), two.as_fd()];
        assert_eq!(first(&fds, Some(Duration::from_millis(5))).unwrap(), None);
        drop(other);
        assert_eq!(first(&fds, None).unwrap(), Some(1));
        assert_eq!(first(&fds[..1], Some(Duration::ZERO)).unwrap(), None);
        drop(writer);
        assert_eq!(first(&fds, None).unwrap(), Some(0));
    }
}
