//! A container's figures: texts of cgroup v2 files as the guest gives them, into containerd's metrics.
//!
//! The texts are the guest's, and may be anything: what is no number where one belongs is left out.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;
use mvm_protocol::RootStats;

/// The package of the metrics' messages.
pub(crate) const PACKAGE: &str = "io.containerd.cgroups.v2";
/// Block devices that are listed; a guest that claims more is not believed.
const MAX_DEVICES: usize = 64;

/// The metrics these files give.
pub(crate) fn metrics(stats: &RootStats) -> Metrics {
    let files = Files(stats);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: files.number("pids.current"),
            limit: files.number("pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&files)),
        memory: MessageField::some(memory(&files)),
        io: MessageField::some(io(&files)),
        memory_events: MessageField::some(memory_events(&files)),
        ..Default::default()
    }
}

fn cpu(files: &Files<'_>) -> CPUStat {
    let stat = files.table("cpu.stat");
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: files.pressure("cpu.pressure"),
        ..Default::default()
    }
}

fn memory(files: &Files<'_>) -> MemoryStat {
    let stat = files.table("memory.stat");
    MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        // Linux has counted the two kinds apart since 5.9.
        workingset_refault: stat
            .get("workingset_refault_anon")
            .saturating_add(stat.get("workingset_refault_file"))
            .max(stat.get("workingset_refault")),
        workingset_activate: stat
            .get("workingset_activate_anon")
            .saturating_add(stat.get("workingset_activate_file"))
            .max(stat.get("workingset_activate")),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.number("memory.max"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.number("memory.swap.max"),
        max_usage: files.number("memory.peak"),
        swap_max_usage: files.number("memory.swap.peak"),
        psi: files.pressure("memory.pressure"),
        ..Default::default()
    }
}

fn memory_events(files: &Files<'_>) -> MemoryEvents {
    let events = files.table("memory.events");
    MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..Default::default()
    }
}

/// Lines such as `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(files: &Files<'_>) -> IOStat {
    let device = |line: &str| {
        let (device, counters) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let counter = |name: &str| {
            let mut pairs = counters.split_whitespace().filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).map_or(0, |(_, value)| number(value))
        };
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: counter("rbytes"),
            wbytes: counter("wbytes"),
            rios: counter("rios"),
            wios: counter("wios"),
            ..Default::default()
        })
    };
    let usage = files.text("io.stat").lines().filter_map(device).take(MAX_DEVICES).collect();
    IOStat { usage, psi: files.pressure("io.pressure"), ..Default::default() }
}

/// The files by name.
struct Files<'a>(&'a RootStats);

impl<'a> Files<'a> {
    fn text(&self, name: &str) -> &'a str {
        self.0.files.iter().find(|(file, _)| file == name).map_or("", |(_, text)| text)
    }

    /// A file that holds one number.
    fn number(&self, name: &str) -> u64 {
        number(self.text(name).trim())
    }

    /// A file of lines `name number`.
    fn table(&self, name: &str) -> Table<'a> {
        Table(self.text(name))
    }

    /// A file of stall times: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and `full` alike.
    fn pressure(&self, name: &str) -> MessageField<PSIStats> {
        let text = self.text(name);
        let line = |kind: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '));
            line.map(pressure_line).into()
        };
        let stats = PSIStats { some: line("some"), full: line("full"), ..Default::default() };
        if text.is_empty() { MessageField::none() } else { MessageField::some(stats) }
    }
}

fn pressure_line(line: &str) -> PSIData {
    let value = |name: &str| {
        line.split_whitespace().filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name)
    };
    let average = |name: &str| {
        let value = value(name).and_then(|(_, value)| value.parse::<f64>().ok());
        value.filter(|value| value.is_finite()).unwrap_or(0.0)
    };
    PSIData {
        avg10: average("avg10"),
        avg60: average("avg60"),
        avg300: average("avg300"),
        total: value("total").map_or(0, |(_, value)| number(value)),
        ..Default::default()
    }
}

struct Table<'a>(&'a str);

impl Table<'_> {
    fn get(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(key, _)| *key == name).map_or(0, |(_, value)| number(value.trim()))
    }
}

/// A number, or no limit.
fn number(text: &str) -> u64 {
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stats(files: &[(&str, &str)]) -> RootStats {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        RootStats { files, pids: Vec::new() }
    }

    #[test]
    fn the_kernels_files_become_metrics() {
        let metrics = metrics(&stats(&[
            ("pids.current", "7\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 100\nuser_usec 60\nsystem_usec 40\nnr_periods 5\n"),
            ("cpu.pressure", "some avg10=1.50 avg60=0.25 avg300=0.00 total=99\n"),
            ("memory.stat", "anon 10\nfile 20\nworkingset_refault_anon 1\nworkingset_refault_file 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "67108864\n"),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 wios=9\n"),
        ]));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (7, u64::MAX));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.system_usec, metrics.cpu.nr_periods), (100, 40, 5));
        assert_eq!((metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total), (1.5, 99));
        assert!(metrics.cpu.psi.full.is_none());
        assert_eq!((metrics.memory.anon, metrics.memory.workingset_refault), (10, 3));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (4096, 64 << 20));
        assert!(metrics.memory.psi.is_none());
        assert_eq!((metrics.memory_events.oom, metrics.memory_events.oom_kill), (3, 4));
        let io: Vec<_> = metrics.io.usage.iter().map(|e| (e.major, e.minor, e.rbytes, e.wios)).collect();
        assert_eq!(io, [(254, 0, 1, 4), (8, 16, 0, 9)]);
    }

    #[test]
    fn a_guest_that_invents_devices_is_listed_as_far_as_any_could_have() {
        let text: String = (0..10_000).map(|minor| format!("8:{minor} rbytes=1\n")).collect();
        assert_eq!(metrics(&stats(&[("io.stat", &text)])).io.usage.len(), MAX_DEVICES);
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(name in "(cpu|memory|io)\\.(stat|pressure|max|events)", text in ".{0,400}") {
            let _ = metrics(&stats(&[(&name, &text)]));
        }

        #[test]
        fn numbers_that_are_none_count_nothing(value in "[-+.eE0-9xa-f]{1,30}") {
            let read = metrics(&stats(&[("memory.current", &value)])).memory.usage;
            prop_assert_eq!(read, value.parse().unwrap_or(0));
        }
    }
}
