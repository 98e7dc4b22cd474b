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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    fn wait(deadlines: &Deadlines<u8>) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let file = deadlines.timer.as_fd();
        poll(&mut [PollFd::new(file, PollFlags::POLLIN)], PollTimeout::from(10_000u16)).unwrap() == 1
    }

    #[test]
    fn the_timer_fires_for_each_in_its_order_and_is_silent_then() {
        let mut deadlines = Deadlines::new(Clock::default()).unwrap();
        deadlines.set(Duration::from_millis(20), 2);
        let cleared = deadlines.set(Duration::from_millis(1), 9);
        deadlines.set(Duration::from_millis(2), 1);
        deadlines.clear(cleared, 9);
        let mut expired = Vec::new();
        while expired.len() < 2 {
            assert!(wait(&deadlines), "the timer does not fire");
            deadlines.fired();
            expired.extend(std::iter::from_fn(|| deadlines.expired()));
        }
        assert_eq!(expired, [1, 2]);
        deadlines.fired();
        assert_eq!(deadlines.timer.get().unwrap(), None, "it is not armed while nobody waits");
    }

    #[test]
    fn time_that_jumps_ahead_expires_everything_and_nothing_early() {
        let clock = Clock::default();
        let mut deadlines = Deadlines::new(clock.clone()).unwrap();
        for who in 0..3u8 {
            deadlines.set(Duration::from_secs(100 * (u64::from(who) + 1)), who);
        }
        assert_eq!(deadlines.expired(), None);
        clock.ahead_millis.store(200_001, Ordering::SeqCst);
        assert_eq!([deadlines.expired(), deadlines.expired(), deadlines.expired()], [Some(0), Some(1), None]);
        clock.ahead_millis.store(1 << 40, Ordering::SeqCst);
        assert_eq!([deadlines.expired(), deadlines.expired()], [Some(2), None]);
    }
}
