//! What machines use of their host: memory of all of it, memory and processor time of one process.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Readings that must agree.
const READINGS: usize = 4;
/// Between readings.
const INTERVAL: Duration = Duration::from_millis(50);
/// What counts as agreement, in kB: other programs never rest quite.
const AGREEMENT: i64 = 512;
/// A page, in kB.
const PAGE_KIB: i64 = 4;
/// Longest wait for agreement; the last reading is taken then.
const PATIENCE: Duration = Duration::from_secs(5);

/// MemAvailable in kB, once it stands still.
///
/// # Errors
/// The host does not tell.
pub fn settled() -> io::Result<i64> {
    standing_still(available)
}

/// What `read` finds in kB, once it stands still.
///
/// # Errors
/// As `read`.
pub fn standing_still(read: impl Fn() -> io::Result<i64>) -> io::Result<i64> {
    let end = Instant::now() + PATIENCE;
    let mut readings = Vec::new();
    loop {
        readings.push(read()?);
        let last = readings.iter().rev().take(READINGS);
        let (low, high) = (last.clone().min(), last.clone().max());
        let still = readings.len() >= READINGS
            && matches!((low, high), (Some(low), Some(high)) if high - low <= AGREEMENT);
        if still || Instant::now() > end {
            return Ok(*readings.last().unwrap_or(&0));
        }
        thread::sleep(INTERVAL);
    }
}

/// MemAvailable in kB, with the free pages that each CPU keeps for itself.
///
/// The kernel does not count the latter, though it has them back when it wants them; where much was freed at once they
/// are a hundred megabytes, and go down in seconds.
///
/// # Errors
/// The host does not tell.
pub fn available() -> io::Result<i64> {
    let kept = fs::read_to_string("/proc/zoneinfo").map_or(0, |zones| kept_by_cpus(&zones));
    Ok(of_host("MemAvailable:")?.saturating_add(kept))
}

/// The free pages in the lists of all CPUs, in kB.
pub(crate) fn kept_by_cpus(zoneinfo: &str) -> i64 {
    let counts = zoneinfo.lines().filter_map(|line| line.trim_start().strip_prefix("count:"));
    let pages = counts.filter_map(|count| count.trim().parse::<i64>().ok());
    pages.fold(0, i64::saturating_add).saturating_mul(PAGE_KIB)
}

/// MemFree in kB: what nobody uses, not even for a cache.
///
/// # Errors
/// The host does not tell.
pub fn free() -> io::Result<i64> {
    of_host("MemFree:")
}

fn of_host(name: &str) -> io::Result<i64> {
    field(&fs::read_to_string("/proc/meminfo")?, name).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What the kernel keeps for what runs on it, in kB; counts of the whole host, to be compared with earlier ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelMemory {
    /// Stacks of threads.
    pub stacks: i64,
    /// Page tables of processes, and of the guests of KVM.
    pub page_tables: i64,
    /// Objects that cannot be reclaimed.
    pub slab: i64,
    /// Memory of which each CPU has its own.
    pub percpu: i64,
}

impl KernelMemory {
    /// That of this host now.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn now() -> io::Result<Self> {
        Ok(Self::of(&fs::read_to_string("/proc/meminfo")?))
    }

    /// Older kernels do not count all of it: what is missing is 0.
    pub(crate) fn of(meminfo: &str) -> Self {
        let part = |name| field(meminfo, name).unwrap_or(0);
        Self {
            stacks: part("KernelStack:"),
            page_tables: part("PageTables:").saturating_add(part("SecPageTables:")),
            slab: part("SUnreclaim:"),
            percpu: part("Percpu:"),
        }
    }
}

/// kB that process `pid` has to itself.
///
/// # Errors
/// The process is gone.
pub fn private_kib(pid: i32) -> io::Result<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let part = |name| field(&text, name).unwrap_or(0);
    Ok(part("Private_Dirty:") + part("Private_Clean:"))
}

/// User and system time of all threads of process `pid`.
///
/// # Errors
/// The process is gone.
pub fn processor_time(pid: u32) -> io::Result<Duration> {
    time_of(Path::new(&format!("/proc/{pid}")))
}

/// User and system time of what has this directory in `/proc`: a process with all its threads, or one thread.
///
/// # Errors
/// It is gone.
pub fn time_of(directory: &Path) -> io::Result<Duration> {
    let stat = fs::read_to_string(directory.join("stat"))?;
    parse_stat(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms on every Linux; the name before them may hold anything.
pub(crate) fn parse_stat(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<u64>);
    let (user, system) = (ticks.next()?.ok()?, ticks.next()?.ok()?);
    Some(Duration::from_millis(user.saturating_add(system).saturating_mul(10)))
}

fn field(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "MemFree:  12 kB\nMemAvailable:   3456 kB\n";
        assert_eq!(field(text, "MemAvailable:"), Some(3456));
        assert_eq!(field(text, "Mem:"), None);
        assert!(available().unwrap() > 0);
    }

    #[test]
    fn free_pages_that_cpus_keep_are_those_in_their_lists() {
        let zones = "Node 0, zone   DMA32\n  pages free     900\n  pagesets\n    cpu: 0\n              \
                     count:    27514\n              high:     30000\n    cpu: 1\n              count:    486\n";
        assert_eq!(kept_by_cpus(zones), 28_000 * 4);
        assert_eq!(kept_by_cpus("count: many\ncounted: 7\n"), 0);
    }

    #[test]
    fn page_tables_of_guests_count_as_page_tables_and_what_is_not_told_is_nothing() {
        let text = "SUnreclaim: 9 kB\nKernelStack: 16 kB\nPageTables: 100 kB\nSecPageTables: 20 kB\n";
        let memory = KernelMemory::of(text);
        assert_eq!(memory, KernelMemory { stacks: 16, page_tables: 120, slab: 9, percpu: 0 });
        assert!(KernelMemory::now().unwrap().slab > 0);
    }

    #[test]
    fn the_processor_time_is_read_past_any_name() {
        let stat = "42 (a ) b) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20";
        assert_eq!(parse_stat(stat), Some(Duration::from_millis(1750)));
        assert_eq!(parse_stat("42 (x) S 1"), None);
    }

    #[test]
    fn this_process_has_a_processor_time_and_memory() {
        assert!(processor_time(std::process::id()).is_ok());
        assert!(processor_time(u32::MAX).is_err());
        assert!(private_kib(i32::try_from(std::process::id()).unwrap()).unwrap() > 0);
    }
}
