//! What was found out about a herd.

use std::collections::BTreeMap;
use std::time::Duration;

use mvm_runtime::failure::escaped;
use serde::Serialize;

/// Parts into which the curve of start times is cut for people.
const PARTS: usize = 5;

/// One start that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Start {
    /// Which, from 1.
    pub number: u32,
    /// From the call of `mvm run` to its return, when the container's process runs.
    pub ms: f64,
    /// MemAvailable of the host then, not waited for to stand still.
    pub available_kib: i64,
}

/// Start times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Quantiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// Memory of one container, the mean of all, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Memory {
    /// By how much the host's MemAvailable is less: all that they cost.
    pub taken_kib: f64,
    /// Of that, pages of the guest that are its own.
    pub guest_private_kib: f64,
    /// The guest's share of pages that machines have in common; counted above only in so far as nobody had them before.
    pub guest_shared_kib: f64,
    /// The machine's process without its guest, with its share of pages that such processes have in common.
    pub vmm_kib: f64,
    /// Of that, what is its own.
    pub vmm_private_kib: f64,
    /// What is its own of the process that owns the container: with containerd a shim would be in its place.
    pub owner_kib: f64,
    /// What the kernel keeps for them.
    pub kernel: Kernel,
    /// The rest: pages of files that came into memory, and what else happened on the host.
    pub rest_kib: f64,
}

/// What the kernel keeps for one container, the mean of all, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Kernel {
    pub stacks_kib: f64,
    /// Those of processes and those of guests.
    pub page_tables_kib: f64,
    pub slab_kib: f64,
    pub percpu_kib: f64,
}

impl Kernel {
    pub(super) fn total_kib(&self) -> f64 {
        self.stacks_kib + self.page_tables_kib + self.slab_kib + self.percpu_kib
    }
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub asked: u32,
    pub started: usize,
    /// What was complained of, and how often.
    pub failures: BTreeMap<String, u32>,
    /// A signal ended the measurement.
    pub stopped: bool,
    pub start_ms: Option<Quantiles>,
    pub starts_per_s: f64,
    pub memory: Option<Memory>,
    /// Share of one CPU, in percent, that a thousand of them use while they idle.
    pub idle_cpu_percent_per_1000: Option<f64>,
    pub teardown_s: f64,
    /// By how much the host's MemAvailable is less than before the first was started, now that all are gone.
    pub kept_kib: Option<i64>,
    /// What is still there of them.
    pub left: Vec<String>,
    pub starts: Vec<Start>,
}

impl Report {
    pub(super) fn new(asked: u32, starts: &[Start], failures: BTreeMap<String, u32>, time: Duration) -> Self {
        let mut starts = starts.to_vec();
        starts.sort_by_key(|start| start.number);
        Self {
            asked,
            started: starts.len(),
            failures,
            stopped: false,
            start_ms: quantiles(starts.iter().map(|start| start.ms)),
            starts_per_s: starts.len() as f64 / time.as_secs_f64(),
            memory: None,
            idle_cpu_percent_per_1000: None,
            teardown_s: 0.0,
            kept_kib: None,
            left: Vec::new(),
            starts,
        }
    }

    /// All were started, and nothing is left.
    pub(super) fn is_flawless(&self) -> bool {
        u32::try_from(self.started) == Ok(self.asked) && self.left.is_empty()
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| text.push_str(&format!("{name:<22} {value}\n"));
        line("containers", format!("{} of {} started", self.started, self.asked));
        for (cause, count) in &self.failures {
            line("  failed", format!("{count} times: {}", escaped(cause)));
        }
        if let Some(q) = self.start_ms {
            line("start", format!("{:.1} ms p50, {:.1} p90, {:.1} p99", q.p50, q.p90, q.p99));
            line("  over the herd", format!("{} ms p50", self.curve().join(", ")));
            line("  rate", format!("{:.1} per second", self.starts_per_s));
        }
        if let Some(m) = self.memory {
            line("memory of each", format!("{} taken from MemAvailable", mib(m.taken_kib)));
            line("  guest", format!("{} own, {} shared", mib(m.guest_private_kib), mib(m.guest_shared_kib)));
            line(
                "  machine's process",
                format!("{}, {} of it its own", mib(m.vmm_kib), mib(m.vmm_private_kib)),
            );
            line("  owner", format!("{} (in place of a shim)", mib(m.owner_kib)));
            let (tables, slab) = (mib(m.kernel.page_tables_kib), mib(m.kernel.slab_kib));
            let (stacks, percpu) = (mib(m.kernel.stacks_kib), mib(m.kernel.percpu_kib));
            line("  kernel", format!("{tables} page tables, {slab} slab, {stacks} stacks, {percpu} per CPU"));
            line("  rest", mib(m.rest_kib));
        }
        if let Some(percent) = self.idle_cpu_percent_per_1000 {
            line("idle", format!("{percent:.2} % of a CPU for 1000"));
        }
        line("removal", format!("{:.2} s", self.teardown_s));
        if let Some(kept) = self.kept_kib {
            line("  memory kept", format!("{} of the host in all", mib(kept as f64)));
        }
        match self.left.as_slice() {
            [] => line("left", "nothing".to_owned()),
            left => line("left", left.join(", ")),
        }
        text
    }

    /// Medians of consecutive parts of the herd.
    fn curve(&self) -> Vec<String> {
        let part = self.starts.len().div_ceil(PARTS).max(1);
        let medians =
            self.starts.chunks(part).filter_map(|part| quantiles(part.iter().map(|start| start.ms)));
        medians.map(|q| format!("{:.1}", q.p50)).collect()
    }
}

/// Nearest ranks; nothing of nothing.
pub(super) fn quantiles(values: impl Iterator<Item = f64>) -> Option<Quantiles> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let rank = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
    Some(Quantiles { p50: rank(50)?, p90: rank(90)?, p99: rank(99)? })
}

fn mib(kib: f64) -> String {
    format!("{:.2} MiB", kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(starts: u32, failures: u32) -> Report {
        let starts: Vec<_> = (1..=starts)
            .map(|number| Start { number, ms: f64::from(number), available_kib: 1000 - i64::from(number) })
            .collect();
        let causes = [("cannot \u{1b}[2J".to_owned(), failures)].into_iter().filter(|(_, count)| *count > 0);
        Report::new(100, &starts, causes.collect(), Duration::from_secs(10))
    }

    #[test]
    fn quantiles_are_nearest_ranks() {
        let of = |count: u32| quantiles((1..=count).rev().map(f64::from));
        assert_eq!(of(100), Some(Quantiles { p50: 50.0, p90: 90.0, p99: 99.0 }));
        assert_eq!(of(1), Some(Quantiles { p50: 1.0, p90: 1.0, p99: 1.0 }));
        assert_eq!(of(0), None);
    }

    #[test]
    fn a_herd_is_flawless_if_all_came_and_all_went() {
        let mut whole = report(100, 0);
        assert!(whole.is_flawless());
        whole.left.push("process 7".to_owned());
        assert!(!whole.is_flawless());
        assert!(!report(99, 1).is_flawless());
    }

    #[test]
    fn the_text_has_causes_and_obeys_none_of_them() {
        let text = report(10, 3).text();
        assert!(text.contains("10 of 100 started"), "{text}");
        assert!(text.contains("3 times: cannot \\u{1b}[2J"), "{text}");
        assert!(text.contains("1.0, 3.0, 5.0, 7.0, 9.0 ms p50"), "{text}");
        assert!(text.contains("1.0 per second"), "{text}");
        assert!(report(0, 100).text().contains("left                   nothing"));
    }
}
