//! What vCPUs may do now: run, wait, or end. Shared by all vCPU threads and the main thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::exit::Exit;

/// How long to wait before a kick is repeated.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// What the machine is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Goal {
    Run,
    Pause,
    End(Exit),
}

/// What a vCPU that came to the gate is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Go on.
    On,
    /// Go on after having been held: time has passed that the guest did not see.
    Resumed,
    /// Do what was asked of it, then come again: the machine is held still.
    Errand,
    /// End.
    End,
}

#[derive(Debug)]
struct State {
    goal: Goal,
    /// vCPUs that wait now.
    waiting: usize,
    /// How often those that wait were sent on an errand.
    errands: u64,
}

/// Holds vCPUs while the machine is paused, and remembers the first reason to end.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Whether the goal is anything but `Run`, so that running costs no lock.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Readable once there is an [`Exit`].
    finished: EventFd,
}

impl Gate {
    /// An open gate.
    pub(crate) fn new() -> nix::Result<Self> {
        Ok(Self {
            closed: AtomicBool::new(false),
            state: Mutex::new(State { goal: Goal::Run, waiting: 0, errands: 0 }),
            changed: Condvar::new(),
            finished: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    /// Readable once the machine has ended.
    pub(crate) fn finished(&self) -> BorrowedFd<'_> {
        self.finished.as_fd()
    }

    /// Called by a vCPU before each entry; returns when it may go on or is to end. `errands` is its own count of
    /// those it was sent on, from 0.
    pub(crate) fn pass(&self, errands: &mut u64) -> Pass {
        if !self.closed.load(Ordering::Acquire) {
            return Pass::On;
        }
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while state.goal == Goal::Pause && state.errands == *errands {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        let sent = std::mem::replace(errands, state.errands) != state.errands;
        if sent && state.goal == Goal::Pause {
            return Pass::Errand;
        }
        if state.goal == Goal::Run { Pass::Resumed } else { Pass::End }
    }

    /// Ends the machine. The first reason stands.
    pub(crate) fn finish(&self, exit: Exit) {
        let mut state = self.lock();
        if matches!(state.goal, Goal::End(_)) {
            return;
        }
        state.goal = Goal::End(exit);
        self.closed.store(true, Ordering::Release);
        self.changed.notify_all();
        drop(state);
        // Cannot fail: the counter is far from full.
        let _ = self.finished.write(1);
    }

    /// Why the machine ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match &self.lock().goal {
            Goal::End(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Whether vCPUs are held.
    pub(crate) fn is_paused(&self) -> bool {
        self.lock().goal == Goal::Pause
    }

    /// Holds all `vcpus` vCPUs, calling `kick` until they have come. False if they do not by `deadline`.
    pub(crate) fn pause(&self, vcpus: usize, deadline: Instant, kick: impl Fn()) -> bool {
        let mut state = self.lock();
        if state.goal == Goal::Run {
            state.goal = Goal::Pause;
            self.closed.store(true, Ordering::Release);
        }
        while state.goal == Goal::Pause && state.waiting < vcpus {
            kick();
            if Instant::now() >= deadline {
                return false;
            }
            let waited = self.changed.wait_timeout(state, KICK_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Sends every vCPU that is held on an errand.
    pub(crate) fn send(&self) {
        self.lock().errands += 1;
        self.changed.notify_all();
    }

    /// Lets vCPUs go on.
    pub(crate) fn resume(&self) {
        let mut state = self.lock();
        if state.goal == Goal::Pause {
            state.goal = Goal::Run;
            self.closed.store(false, Ordering::Release);
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn gate() -> Gate {
        Gate::new().unwrap()
    }

    #[test]
    fn a_paused_vcpu_waits_and_goes_on() {
        let gate = Arc::new(gate());
        let vcpu = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || while gate.pass(&mut 0) != Pass::End {})
        };
        assert!(gate.pause(1, Instant::now() + Duration::from_secs(10), || ()));
        assert!(gate.is_paused());
        gate.resume();
        assert!(!gate.is_paused());
        gate.finish(Exit::Stopped);
        vcpu.join().unwrap();
    }

    #[test]
    fn held_vcpus_go_on_each_errand_once_and_are_held_again() {
        let gate = Arc::new(gate());
        let (done, doing) = std::sync::mpsc::channel();
        let vcpus: Vec<_> = (0..2)
            .map(|id| {
                let (gate, done) = (Arc::clone(&gate), done.clone());
                std::thread::spawn(move || {
                    let mut errands = 0;
                    loop {
                        match gate.pass(&mut errands) {
                            Pass::Errand => done.send(id).unwrap(),
                            Pass::End => return,
                            Pass::On | Pass::Resumed => {}
                        }
                    }
                })
            })
            .collect();
        let patience = Duration::from_secs(10);
        for _ in 0..3 {
            assert!(gate.pause(2, Instant::now() + patience, || ()));
            for _ in 0..2 {
                gate.send();
                let mut went = [0, 1].map(|_| doing.recv_timeout(patience).unwrap());
                went.sort_unstable();
                assert_eq!(went, [0, 1]);
                assert!(gate.is_paused());
            }
            gate.resume();
        }
        gate.finish(Exit::Stopped);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        assert!(doing.try_recv().is_err(), "nobody went twice");
    }

    #[test]
    fn a_paused_vcpu_can_be_ended() {
        let gate = Arc::new(gate());
        let vcpu = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || while gate.pass(&mut 0) != Pass::End {})
        };
        assert!(gate.pause(1, Instant::now() + Duration::from_secs(10), || ()));
        gate.finish(Exit::Stopped);
        vcpu.join().unwrap();
    }

    #[test]
    fn the_first_reason_stands() {
        let gate = gate();
        gate.finish(Exit::Reboot);
        gate.finish(Exit::Shutdown);
        gate.resume();
        assert_eq!(gate.exit(), Some(Exit::Reboot));
        assert_eq!(gate.pass(&mut 0), Pass::End);
    }

    #[test]
    fn a_vcpu_that_never_comes_is_reported() {
        assert!(!gate().pause(1, Instant::now(), || ()));
    }
}
