//! A device that is held: what it asks before each request, and when it looks again.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::{Meters, What};
use crate::counter::Counter;
use crate::device::{EventSet, Io};
use crate::error::Error;

/// Rates may be raised meanwhile: a device that is held looks again after so long at the latest.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// One device's use of its machine's meters.
#[derive(Debug)]
pub(crate) struct Throttle {
    meters: Meters,
    /// Made when it is first needed: most devices are never held.
    timer: Option<TimerFd>,
    /// When it goes off.
    armed: Option<Instant>,
    /// How long what was not admitted last has to wait.
    wait: Duration,
    /// How often the device was held.
    pub(crate) held: Arc<Counter>,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            meters: Meters::default(),
            timer: None,
            armed: None,
            wait: Duration::ZERO,
            held: Counter::new("held"),
        }
    }
}

impl Throttle {
    /// From now on the device is charged at these.
    pub(crate) fn charge_at(&mut self, meters: Meters) {
        self.meters = meters;
    }

    /// The device begins, or goes on: nothing of it is watched.
    pub(crate) fn begin(&mut self) {
        (self.timer, self.armed) = (None, None);
    }

    /// Whether `what` may be carried out now. If not, nothing of it is until [`Throttle::look_again`] has led to that.
    pub(crate) fn admits(&mut self, what: What) -> bool {
        let Some(wait) = self.meters.wait(what) else { return true };
        self.held.one();
        self.wait = wait;
        false
    }

    /// Charges one operation.
    pub(crate) fn charge(&self, what: What, bytes: u64) {
        self.meters.charge(what, bytes);
    }

    /// Has the device called with `token` when what was not admitted last may be.
    ///
    /// # Errors
    /// The host has no timer to give.
    pub(crate) fn look_again(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), Error> {
        // A timer that is set to nothing never goes off.
        let wait = self.wait.clamp(Duration::from_nanos(1), LOOK_AGAIN);
        let when = Instant::now().checked_add(wait);
        if self.armed.is_some_and(|armed| when.is_none_or(|when| armed <= when)) {
            return Ok(());
        }
        let failed = |error: nix::Error| Error::device("set a timer")(error.into());
        let timer = match self.timer.take() {
            Some(timer) => timer,
            None => {
                let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
                let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(failed)?;
                // Each time it goes off wakes the loop: nobody has to read how often it did.
                io.watch(timer.as_fd().as_raw_fd(), token, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
                timer
            }
        };
        let once = Expiration::OneShot(TimeSpec::from(wait));
        self.timer.insert(timer).set(once, TimerSetTimeFlags::empty()).map_err(failed)?;
        self.armed = when;
        Ok(())
    }

    /// The timer went off.
    pub(crate) fn rang(&mut self) {
        self.armed = None;
    }
}
