//! The figures: each a ratio in one run, or virtual time in the deterministic lab, with its raw rows.

pub mod cgroup;
pub mod emulated;
pub mod exchange;
pub mod inside;
pub mod memory;
pub mod native;
pub mod report;
pub mod stats;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub use report::{Figure, Report};

/// Every figure's stable name, in the order of the report.
pub const IDS: &[&str] = &[
    "native.start_over_floor",
    "native.start_over_qemu",
    "native.memory_per_vm_kb",
    "native.memory_charged_per_vm_kb",
    "native.starts_per_s",
    "native.teardown_ms",
    "lab.agent_ready_ms",
    "lab.blk_read_4k_us",
    "lab.blk_read_4k_over_qemu",
    "lab.blk_read_1m_mbs",
    "lab.blk_read_1m_over_qemu",
    "lab.net_rtt_us",
    "lab.net_stream_mbs",
    "lab.vsock_rtt_us",
    "lab.vsock_stream_mbs",
    "lab.vm_memory_mb",
    "lab.ctr_run_over_runc_cold",
    "lab.exec_over_runc",
    "shim.private_kb",
    "lab.ten_pods_p99_over_p50",
];

/// Those that are measured under containerd, in a run of their own.
pub const ENGINE: &[&str] =
    &["lab.ctr_run_over_runc_cold", "lab.exec_over_runc", "shim.private_kb", "lab.ten_pods_p99_over_p50"];

/// Names what `integration/containerd/fetch.sh` left.
pub const FETCHED: &str = "MVM_TEST_CONTAINERD";

/// Which figures are wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Option<Vec<String>>);

impl Wanted {
    /// All, or those of a comma-separated list.
    ///
    /// # Errors
    /// The first name that is no figure's.
    pub fn parse(list: Option<&str>) -> Result<Self, String> {
        let Some(list) = list else { return Ok(Self(None)) };
        let names: Vec<_> = list.split(',').map(str::to_owned).collect();
        match names.iter().find(|name| !IDS.contains(&name.as_str())) {
            None => Ok(Self(Some(names))),
            Some(name) => Err(format!("{name} is no figure; there are: {}", IDS.join(" "))),
        }
    }

    /// Whether the figure `id` is wanted.
    pub fn has(&self, id: &str) -> bool {
        self.0.as_ref().is_none_or(|names| names.iter().any(|name| name == id))
    }

    /// Those of the wanted figures that are, or are not, in `list`.
    #[must_use]
    pub fn only(&self, list: &[&str], inside: bool) -> Self {
        let some = IDS.iter().filter(|id| self.has(id) && list.contains(id) == inside);
        Self(Some(some.map(|id| (*id).to_owned()).collect()))
    }

    /// The wanted figures, separated by commas.
    pub fn list(&self) -> String {
        IDS.iter().filter(|id| self.has(id)).copied().collect::<Vec<_>>().join(",")
    }

    /// Whether any figure whose name begins with `prefix` is wanted.
    pub fn any(&self, prefix: &str) -> bool {
        IDS.iter().any(|id| id.starts_with(prefix) && self.has(id))
    }
}

/// A program built with this one.
///
/// # Errors
/// It is not there.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    if path.is_file() { Ok(path) } else { Err(io::Error::other(format!("{} is not built", path.display()))) }
}

/// Ends the process if this still exists after a time: what is measured may hang.
#[derive(Debug)]
pub struct Bound(Arc<AtomicBool>);

impl Bound {
    /// Gives `what` this much time, then calls `before` and ends the process.
    pub fn new(what: &'static str, time: Duration, before: fn()) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        thread::spawn(move || {
            thread::sleep(time);
            if !seen.load(Ordering::Acquire) {
                before();
                let _ = writeln!(io::stderr(), "bench: {what} took longer than {time:?}");
                std::process::exit(1);
            }
        });
        Self(over)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_figures_are_refused_by_name() {
        assert!(Wanted::parse(Some("native.speed")).unwrap_err().contains("native.speed"));
        let some = Wanted::parse(Some("lab.net_rtt_us,native.teardown_ms")).unwrap();
        assert!(some.has("lab.net_rtt_us") && !some.has("lab.vm_memory_mb"));
        assert!(some.any("native.") && !some.any("lab.blk"));
        let engine = Wanted::default().only(ENGINE, true);
        assert_eq!(engine.list(), ENGINE.join(","));
        assert!(!Wanted::default().only(ENGINE, false).has("shim.private_kb"));
    }
}
