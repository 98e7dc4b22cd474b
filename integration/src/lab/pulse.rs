//! Tells a hung emulated host from a slow one, in seconds and whatever the load: the second stage's heartbeat, one a
//! virtual second, against the processor time QEMU has had since.

use std::time::{Duration, Instant};

/// Processor time in which a living host beats several times over: a virtual second was measured at 5 to 6 s of it.
const BUSY: Duration = Duration::from_secs(25);
/// Wall time without a beat after which a QEMU that hardly ran counts as hung: an idle host's clock follows ours.
const IDLE: Duration = Duration::from_secs(45);
/// What "hardly ran" is.
const HARDLY: Duration = Duration::from_secs(2);

/// When the emulated host last showed life.
#[derive(Debug)]
pub(super) struct Pulse {
    process: u32,
    beat: Instant,
    used: Duration,
}

impl Pulse {
    pub(super) fn new(process: u32) -> Self {
        Self { process, beat: Instant::now(), used: Duration::ZERO }
    }

    pub(super) fn beat(&mut self) {
        self.beat = Instant::now();
        self.used = processor_time(self.process).unwrap_or_default();
    }

    /// The host has hung.
    pub(super) fn stopped(&self) -> bool {
        let Some(used) = processor_time(self.process) else { return false };
        verdict(self.beat.elapsed(), used.saturating_sub(self.used))
    }
}

fn verdict(silent: Duration, used: Duration) -> bool {
    used >= BUSY || (silent >= IDLE && used < HARDLY)
}

/// User and system time of all threads of `process`.
fn processor_time(process: u32) -> Option<Duration> {
    parse(&std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?)
}

/// Fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms on every Linux; the name before them may hold anything.
fn parse(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<u64>);
    let (user, system) = (ticks.next()?.ok()?, ticks.next()?.ok()?);
    Some(Duration::from_millis(user.saturating_add(system).saturating_mul(10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_host_starved_by_load_has_not_hung() {
        assert!(!verdict(s(200), s(20)));
    }

    #[test]
    fn a_host_that_spins_or_sleeps_without_a_beat_has_hung() {
        assert!(verdict(s(26), s(26)));
        assert!(verdict(s(46), s(1)));
        assert!(!verdict(s(44), s(1)));
    }

    #[test]
    fn the_processor_time_is_read_past_any_name() {
        let stat = "42 (a ) b) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20";
        assert_eq!(parse(stat), Some(Duration::from_millis(1750)));
        assert_eq!(parse("42 (x) S 1"), None);
    }

    #[test]
    fn this_process_has_a_processor_time() {
        assert!(processor_time(std::process::id()).is_some());
        assert!(processor_time(u32::MAX).is_none());
    }
}
