//! A token bucket: how much of what a guest sends the host lets through.

use std::time::{Duration, Instant};

/// Allows a burst at once and a rate in the long run.
#[derive(Clone, Debug)]
pub struct Bucket {
    burst: u32,
    /// Tokens per second.
    rate: u32,
    tokens: u32,
    refilled: Instant,
}

impl Bucket {
    /// A full bucket of `burst` tokens that earns `rate` tokens per second.
    pub fn new(burst: u32, rate: u32, now: Instant) -> Self {
        Self { burst, rate, tokens: burst, refilled: now }
    }

    /// Takes up to `n` tokens; returns how many there were. Time that runs backwards earns nothing.
    pub fn take(&mut self, n: u32, now: Instant) -> u32 {
        if self.tokens < n {
            self.refill(now);
        }
        let taken = n.min(self.tokens);
        self.tokens = self.tokens.saturating_sub(taken);
        taken
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled).as_nanos();
        let earned = elapsed.saturating_mul(self.rate.into()).checked_div(NANOS).unwrap_or(0);
        let Some(earned) = u32::try_from(earned).ok().filter(|earned| *earned < self.burst) else {
            (self.tokens, self.refilled) = (self.burst, now);
            return;
        };
        if earned == 0 {
            return;
        }
        self.tokens = self.tokens.saturating_add(earned).min(self.burst);
        // Only the time that was paid for is spent, or frequent asking would earn nothing.
        let spent = u64::from(earned).saturating_mul(NANOS_PER_SECOND).div_ceil(self.rate.into());
        self.refilled = self.refilled.checked_add(Duration::from_nanos(spent)).unwrap_or(now);
    }
}

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const NANOS: u128 = NANOS_PER_SECOND as u128;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, 10, start);
        assert_eq!(bucket.take(1000, start), 100);
        assert_eq!(bucket.take(1000, start), 0);
        assert_eq!(bucket.take(1000, start + Duration::from_millis(100)), 1);
        assert_eq!(bucket.take(1000, start + Duration::from_secs(1)), 9);
        assert_eq!(bucket.take(1000, start + Duration::from_secs(3600)), 100);
    }

    #[test]
    fn frequent_asking_earns_no_less() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1, 1000, start);
        bucket.take(1, start);
        let taken: u32 =
            (1..=100_000u64).map(|n| bucket.take(1, start + Duration::from_micros(10 * n))).sum();
        assert_eq!(taken, 1000, "in one second");
    }

    proptest! {
        #[test]
        fn p_12_never_more_than_burst_and_rate_and_never_an_overflow(
            burst: u32,
            rate: u32,
            steps in proptest::collection::vec((0u64..10_000_000_000_000, any::<u32>()), 1..50),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(burst, rate, start);
            let (mut nanos, mut taken) = (0u64, 0u128);
            for (step, n) in steps {
                nanos += step;
                let got = bucket.take(n, start + Duration::from_nanos(nanos));
                prop_assert!(got <= n);
                taken += u128::from(got);
                prop_assert!(taken <= u128::from(burst) + u128::from(rate) * u128::from(nanos) / NANOS + 1);
            }
            prop_assert!(bucket.take(u32::MAX, start) <= burst, "time that runs backwards is survived");
        }
    }
}
