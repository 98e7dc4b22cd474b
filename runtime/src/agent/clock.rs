//! The guest's wall clock, compared with the host's and put right.

use std::time::{Duration, Instant};

use mvm_protocol::{Reply, Request};

use super::client::{AgentClient, CALL_TIME};
use super::error::{Error, Result};
use super::identity::wall_clock_ns;

/// A comparison that took no longer than this is not repeated.
const GOOD: Duration = Duration::from_millis(5);
/// Most comparisons: on a host that is busy each takes its time, and some take less than others.
const MOST: usize = 16;
/// Time after which no other is begun.
const TIME: Duration = Duration::from_secs(1);
/// A difference that is as good as none, in nanoseconds.
const TOLERANCE_NS: u64 = 500_000;

/// What one comparison has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Comparison {
    /// What must be added to the guest's clock, in nanoseconds.
    offset_ns: i64,
    /// By how much that may be wrong either way: half the time it took to ask.
    doubt_ns: u64,
}

impl Comparison {
    /// The guest said `guest` some time after the host's clock said `asked`, and before it said `answered`.
    fn of(asked: u64, guest: u64, answered: u64) -> Self {
        let doubt_ns = answered.saturating_sub(asked) / 2;
        let middle = asked.saturating_add(doubt_ns);
        Self { offset_ns: i64::try_from(i128::from(middle) - i128::from(guest)).unwrap_or(0), doubt_ns }
    }

    /// By how much the guest's clock may be wrong once this is dealt with, in nanoseconds.
    fn remains_ns(self) -> u64 {
        if self.tells() { self.doubt_ns } else { self.offset_ns.unsigned_abs().saturating_add(self.doubt_ns) }
    }

    /// Whether the clocks differ, as far as can be told.
    fn tells(self) -> bool {
        self.offset_ns.unsigned_abs() > self.doubt_ns.max(TOLERANCE_NS)
    }
}

impl AgentClient {
    /// Puts the guest's wall clock right. What it was told in the hello has come late by as long as that took; here
    /// the way there and the way back are measured, and the difference alone is told. Returns by how much it may be
    /// wrong now: on a host that takes its time for an answer, nobody can tell it better.
    ///
    /// # Errors
    /// The agent does not answer, or cannot set the clock.
    pub fn correct_clock(&self) -> Result<Duration> {
        let begun = Instant::now();
        let mut best: Option<Comparison> = None;
        for _ in 0..MOST {
            let comparison = self.compare_clocks()?;
            if best.is_none_or(|best| comparison.doubt_ns < best.doubt_ns) {
                best = Some(comparison);
            }
            let good = best.is_some_and(|it| Duration::from_nanos(it.doubt_ns.saturating_mul(2)) <= GOOD);
            if good || begun.elapsed() > TIME {
                break;
            }
        }
        // At least one was made.
        let Some(best) = best else { return Ok(Duration::MAX) };
        if best.tells() {
            self.done(Request::AdjustClock { by_ns: best.offset_ns }, CALL_TIME)?;
        }
        Ok(Duration::from_nanos(best.remains_ns()))
    }

    fn compare_clocks(&self) -> Result<Comparison> {
        let asked = wall_clock_ns();
        let Reply::Clock(guest) = self.call(Request::Clock, CALL_TIME)? else {
            return Err(Error::WrongReply);
        };
        Ok(Comparison::of(asked, guest, wall_clock_ns()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_offset_is_that_from_the_middle_of_the_exchange() {
        let behind = Comparison::of(1000 * MS, 900 * MS, 1010 * MS);
        assert_eq!(behind, Comparison { offset_ns: 105_000_000, doubt_ns: 5 * MS });
        let ahead = Comparison::of(1000 * MS, 2005 * MS, 1010 * MS);
        assert_eq!(ahead, Comparison { offset_ns: -1_000_000_000, doubt_ns: 5 * MS });
        assert!(behind.tells() && ahead.tells());
        assert_eq!((behind.remains_ns(), ahead.remains_ns()), (5 * MS, 5 * MS));
    }

    #[test]
    fn a_clock_that_may_be_right_is_left_alone() {
        let alone = Comparison::of(1000 * MS, 1001 * MS, 1010 * MS);
        assert!(!alone.tells());
        assert_eq!(alone.remains_ns(), 9 * MS, "it is wrong by what it differs, give or take the doubt");
        assert!(!Comparison::of(1000 * MS, 1000 * MS, 1000 * MS).tells());
    }

    #[test]
    fn whatever_a_guest_says_and_however_the_hosts_clock_jumps_there_is_an_offset() {
        assert_eq!(Comparison::of(0, u64::MAX, 0).offset_ns, 0);
        assert_eq!(Comparison::of(10, 5, 3), Comparison { offset_ns: 5, doubt_ns: 0 });
    }
}
