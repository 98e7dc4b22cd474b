//! When each stage of a container's start was reached.

use std::fmt;
use std::time::Duration;

use mvm_vmm::status::now;

use crate::failure::Failure;
use crate::machine::Machine;

/// Time for events that are on their way.
const EVENT_TIME: Duration = Duration::from_secs(1);

/// Stages with their times on CLOCK_MONOTONIC, in nanoseconds, the first being the machine's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline(Vec<(&'static str, u64)>);

impl Timeline {
    pub(crate) fn begin(spawned_ns: u64) -> Self {
        Self(vec![("machine is started", spawned_ns)])
    }

    /// A stage is reached now.
    pub fn reach(&mut self, stage: &'static str) {
        self.0.push((stage, now()));
    }

    /// Adds what the machine told of its own start.
    pub(crate) fn machine(&mut self, machine: &mut Machine) -> Result<(), Failure> {
        // The agent has called, so these events are on their way or here.
        machine.hear_of_start(EVENT_TIME)?;
        if let Some(stages) = machine.stages() {
            self.0.extend([
                ("VMM is entered", stages.entered_ns),
                ("kernel is mapped", stages.loaded_ns),
                ("KVM has memory", stages.vm_ns),
                ("devices are there", stages.devices_ns),
                ("CPUs are ready", stages.vcpus_ns),
            ]);
        }
        if let Some((run_ns, _)) = machine.first_exit() {
            self.0.push(("guest runs", run_ns));
        }
        if let Some(called_ns) = machine.called_ns() {
            self.0.push(("agent calls", called_ns));
        }
        Ok(())
    }

    /// The stages with their time since the machine's start, in nanoseconds.
    pub fn since_start(&self) -> Vec<(&'static str, u64)> {
        let start = self.0.first().map_or(0, |(_, at)| *at);
        self.0.iter().map(|(stage, at)| (*stage, at.saturating_sub(start))).collect()
    }
}

impl fmt::Display for Timeline {
    /// One line per stage: time since the start, time since the stage before, both in milliseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = 0;
        for (stage, at) in self.since_start() {
            let ms = |ns: u64| ns as f64 / 1e6;
            writeln!(f, "{:>9.2} ms  {:>+9.2}  {stage}", ms(at), ms(at.saturating_sub(before)))?;
            before = at;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_time_since_the_start_and_since_the_stage_before() {
        let timeline = Timeline(vec![("a", 5_000_000), ("b", 7_500_000), ("c", 8_000_000)]);
        let text = timeline.to_string();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        assert_eq!(lines, ["0.00 ms      +0.00  a", "2.50 ms      +2.50  b", "3.00 ms      +0.50  c"]);
    }
}
