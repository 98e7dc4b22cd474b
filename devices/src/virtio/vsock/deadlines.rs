//! When connections time out: one timer file for all of them, armed only while somebody waits.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Where the time comes from: the monotonic clock, which tests may move ahead.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock {
    #[cfg(test)]
    pub(super) ahead_millis: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Clock {
    #[cfg(not(test))]
    fn now(&self) -> Instant {
        Instant::now()
    }

    #[cfg(test)]
    fn now(&self) -> Instant {
        let ahead = self.ahead_millis.load(std::sync::atomic::Ordering::SeqCst);
        Instant::now() + Duration::from_millis(ahead)
    }
}

/// A deadline that was set; needed to take it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline(Instant);

/// The set of deadlines, each of one `T`.
#[derive(Debug)]
pub(super) struct Deadlines<T> {
    waiting: BTreeSet<(Instant, T)>,
    timer: TimerFd,
    /// When the timer will fire; it may be earlier than any deadline, never later.
    armed: Option<Instant>,
    clock: Clock,
}

impl<T: Ord + Copy> Deadlines<T> {
    /// # Errors
    /// The host has no timer to give.
    pub(super) fn new(clock: Clock) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Self { waiting: BTreeSet::new(), timer, armed: None, clock })
    }

    /// The timer, to be watched for readability.
    pub(super) fn file(&self) -> RawFd {
        self.timer.as_fd().as_raw_fd()
    }

    /// `who` will be in [`Deadlines::expired`] after `after`, unless it is [cleared](Deadlines::clear).
    pub(super) fn set(&mut self, after: Duration, who: T) -> Deadline {
        let now = self.clock.now();
        let at = now.checked_add(after).unwrap_or(now);
        self.waiting.insert((at, who));
        self.arm(now);
        Deadline(at)
    }

    /// Takes a deadline back.
    pub(super) fn clear(&mut self, deadline: Deadline, who: T) {
        self.waiting.remove(&(deadline.0, who));
    }

    /// Takes back all.
    pub(super) fn clear_all(&mut self) {
        self.waiting.clear();
    }

    /// The timer fired: call [`Deadlines::expired`] until it has no more.
    pub(super) fn fired(&mut self) {
        // Nothing to read: a spurious wake-up.
        if self.timer.wait().is_ok() {
            self.armed = None;
        }
    }

    /// The next whose time has come. Arms the timer for the rest once there is none.
    pub(super) fn expired(&mut self) -> Option<T> {
        let now = self.clock.now();
        match self.waiting.first() {
            Some((at, who)) if *at <= now => {
                let who = *who;
                self.waiting.pop_first();
                Some(who)
            }
            _ => {
                self.arm(now);
                None
            }
        }
    }

    fn arm(&mut self, now: Instant) {
        let Some((first, _)) = self.waiting.first() else { return };
        if self.armed.is_some_and(|at| at <= *first) {
            return;
        }
        // A zero time would disarm.
        let after = first.saturating_duration_since(now).max(Duration::from_micros(1));
        let once = Expiration::OneShot(TimeSpec::from_duration(after));
        match self.timer.set(once, TimerSetTimeFlags::empty()) {
            Ok(()) => self.armed = Some(*first),
            Err(error) => log::warn!("cannot set a timer: {error}"),
        }
    }
}
