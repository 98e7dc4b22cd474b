//! Memory of the whole host and of one process.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Readings that must agree.
const READINGS: usize = 4;
/// Between readings.
const INTERVAL: Duration = Duration::from_millis(50);
/// What counts as agreement, in kB: other programs never rest quite.
const AGREEMENT: i64 = 512;
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

/// MemAvailable in kB.
///
/// # Errors
/// The host does not tell.
pub fn available() -> io::Result<i64> {
    field(&fs::read_to_string("/proc/meminfo")?, "MemAvailable:")
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// kB that process `pid` has to itself.
///
/// # Errors
/// The process is gone.
pub fn smaps_kib(pid: i32) -> io::Result<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let part = |name| field(&text, name).unwrap_or(0);
    Ok(part("Private_Dirty:") + part("Private_Clean:"))
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
}
