//! Tells a hung emulated host from a slow one, in seconds and whatever the load: the second stage's heartbeat, one a
//! virtual second, against the processor time QEMU has had since.

use std::time::{Duration, Instant};

use mvm_runtime::usage::processor_time;

/// Processor time in which a living host beats several times over: a virtual second was measured at 5 to 6 s of it, and
/// at 25 s when one guest after the other began.
const BUSY: Duration = Duration::from_secs(100);
/// Wall time without a beat after which a QEMU that hardly ran counts as hung: an idle host's clock follows ours.
const IDLE: Duration = Duration::from_secs(30);
/// What "hardly ran" is.
const HARDLY: Duration = Duration::from_secs(1);

/// When the emulated host last showed life.
#[derive(Debug)]
pub(super) struct Pulse {
    process: u32,
    /// Processor time at the last beat.
    at_beat: Duration,
    /// Since when QEMU has hardly run, and its processor time then.
    quiet: (Instant, Duration),
}

impl Pulse {
    pub(super) fn new(process: u32) -> Self {
        Self { process, at_beat: Duration::ZERO, quiet: (Instant::now(), Duration::ZERO) }
    }

    /// The host has beaten.
    pub(super) fn beat(&mut self) {
        let used = processor_time(self.process).unwrap_or_default();
        self.at_beat = used;
        self.quiet = (Instant::now(), used);
    }

    /// The host has hung; to be asked every few seconds.
    pub(super) fn stopped(&mut self) -> bool {
        processor_time(self.process).is_ok_and(|used| self.verdict(Instant::now(), used))
    }

    fn verdict(&mut self, now: Instant, used: Duration) -> bool {
        let (since, then) = self.quiet;
        if used.saturating_sub(then) >= HARDLY {
            self.quiet = (now, used);
            return used.saturating_sub(self.at_beat) >= BUSY;
        }
        now.saturating_duration_since(since) >= IDLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Feels the pulse every two seconds while QEMU gets `share` ms of processor time a second; when it stopped.
    fn stops_after(pulse: &mut Pulse, share: u64, seconds: u64) -> Option<u64> {
        let (start, used) = pulse.quiet;
        (0..seconds)
            .step_by(2)
            .find(|&at| pulse.verdict(start + s(at), used + Duration::from_millis(share * at)))
    }

    #[test]
    fn a_host_starved_by_load_has_not_hung() {
        assert_eq!(stops_after(&mut Pulse::new(0), 60, 1600), None);
    }

    #[test]
    fn a_host_that_spins_without_a_beat_has_hung() {
        assert_eq!(stops_after(&mut Pulse::new(0), 1000, 400), Some(100));
        assert_eq!(stops_after(&mut Pulse::new(0), 2000, 400), Some(50));
    }

    #[test]
    fn a_host_that_stops_after_a_busy_start_has_hung() {
        let mut pulse = Pulse::new(0);
        assert_eq!(stops_after(&mut pulse, 1000, 20), None);
        assert_eq!(stops_after(&mut pulse, 0, 100), Some(30));
    }
}
