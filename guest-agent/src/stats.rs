//! The guest's use of memory and CPU, from /proc.

use std::fs;

use mvm_protocol::Stats;

/// Nanoseconds of one tick of /proc/stat; `USER_HZ` is 100 on every Linux.
const TICK_NS: u64 = 10_000_000;

/// Reads the figures; what cannot be read is 0.
pub(crate) fn read(processes: usize) -> Stats {
    let text = |path| fs::read_to_string(path).unwrap_or_default();
    let mut stats = parse(&text("/proc/meminfo"), &text("/proc/stat"));
    stats.processes = u32::try_from(processes).unwrap_or(u32::MAX);
    stats
}

fn parse(meminfo: &str, stat: &str) -> Stats {
    let bytes = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        kib.map_or(0, |kib: u64| kib.saturating_mul(1024))
    };
    let all_cpus = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    let ticks: Vec<u64> = all_cpus.split_whitespace().map_while(|it| it.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let sum = |columns: &[usize]| {
        let ticks =
            columns.iter().filter_map(|&at| ticks.get(at)).fold(0_u64, |sum, it| sum.saturating_add(*it));
        ticks.saturating_mul(TICK_NS)
    };
    Stats {
        memory_total: bytes("MemTotal"),
        memory_available: bytes("MemAvailable"),
        memory_cached: bytes("Cached"),
        cpu_user_ns: sum(&[0, 1]),
        cpu_system_ns: sum(&[2, 5, 6]),
        cpu_steal_ns: sum(&[7]),
        processes: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_come_from_their_columns() {
        let meminfo =
            "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable: 500 kB\nSwapCached: 7 kB\nCached: 20 kB\n";
        let stats = parse(meminfo, "cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 9 9 9 9\n");
        assert_eq!(stats.memory_total, 1_024_000);
        assert_eq!(stats.memory_available, 512_000);
        assert_eq!(stats.memory_cached, 20_480);
        assert_eq!(stats.cpu_user_ns, 30_000_000);
        assert_eq!(stats.cpu_system_ns, 160_000_000);
        assert_eq!(stats.cpu_steal_ns, 80_000_000);
    }

    #[test]
    fn figures_that_are_not_there_are_zero() {
        assert_eq!(parse("", ""), Stats::default());
    }
}
