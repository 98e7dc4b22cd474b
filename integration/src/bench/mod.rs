//! The figures: each a ratio in one run, or virtual time in the deterministic lab, with its raw rows.

pub mod cgroup;
pub mod emulated;
pub mod exchange;
pub mod inside;
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

/// What is measured in a run of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Flat guests, on this machine's KVM.
    Native,
    /// Linux guests, in the lab.
    Machines,
    /// Those that go on from templates and snapshots, in the lab.
    Clones,
    /// Those of containerd, in the lab.
    Engine,
    /// Those of containerd, in the lab but by the wall clock; those of many pods at once too, because on virtual time the
    /// emulated host hung in every other try.
    Wall,
}

/// Every figure's stable name, in the order of the report.
pub const FIGURES: &[(&str, Part)] = &[
    ("native.start_over_floor", Part::Native),
    ("native.start_over_qemu", Part::Native),
    ("native.memory_per_vm_kb", Part::Native),
    ("native.memory_charged_per_vm_kb", Part::Native),
    ("native.starts_per_s", Part::Native),
    ("native.teardown_ms", Part::Native),
    ("native.herd_count", Part::Native),
    ("native.herd_start_p50_last_over_first", Part::Native),
    ("native.herd_idle_cpu_percent_per_1000", Part::Native),
    ("lab.agent_ready_ms", Part::Machines),
    ("lab.blk_read_4k_us", Part::Machines),
    ("lab.blk_read_4k_over_qemu", Part::Machines),
    ("lab.blk_read_1m_mbs", Part::Machines),
    ("lab.blk_read_1m_over_qemu", Part::Machines),
    ("lab.net_rtt_us", Part::Machines),
    ("lab.net_stream_mbs", Part::Machines),
    ("lab.vsock_rtt_us", Part::Machines),
    ("lab.vsock_stream_mbs", Part::Machines),
    ("lab.vm_memory_mb", Part::Machines),
    ("lab.clone_over_floor_ms", Part::Clones),
    ("lab.clone_over_cold", Part::Clones),
    ("lab.exec_rtt_ms", Part::Clones),
    ("lab.container_memory_mb_clone_50", Part::Clones),
    ("lab.container_memory_mb_cold_50", Part::Clones),
    ("lab.restore_over_clone_ms", Part::Clones),
    ("lab.save_over_writes", Part::Clones),
    ("lab.freed_returned_percent", Part::Clones),
    ("lab.ctr_run_over_runc_cold", Part::Engine),
    ("lab.ctr_run_over_runc_clone", Part::Engine),
    ("lab.first_byte_over_runc_cold", Part::Engine),
    ("lab.first_byte_over_runc_clone", Part::Engine),
    ("lab.exec_over_runc", Part::Engine),
    ("shim.private_kb", Part::Engine),
    ("lab.ctr_run_over_runc_clone_wall", Part::Wall),
    ("lab.first_byte_over_runc_clone_wall", Part::Wall),
    ("lab.ten_pods_p99_over_p50", Part::Wall),
];

/// The names alone.
pub fn names() -> impl Iterator<Item = &'static str> {
    FIGURES.iter().map(|(name, _)| *name)
}

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
        match names.iter().find(|name| !self::names().any(|there| there == *name)) {
            None => Ok(Self(Some(names))),
            Some(name) => {
                let there: Vec<_> = self::names().collect();
                Err(format!("{name} is no figure; there are: {}", there.join(" ")))
            }
        }
    }

    /// Whether the figure `id` is wanted.
    pub fn has(&self, id: &str) -> bool {
        self.0.as_ref().is_none_or(|names| names.iter().any(|name| name == id))
    }

    /// Those of the wanted figures that are of `part`.
    #[must_use]
    pub fn of(&self, part: Part) -> Self {
        let some = FIGURES.iter().filter(|(name, of)| *of == part && self.has(name));
        Self(Some(some.map(|(name, _)| (*name).to_owned()).collect()))
    }

    /// The wanted figures, separated by commas.
    pub fn list(&self) -> String {
        names().filter(|name| self.has(name)).collect::<Vec<_>>().join(",")
    }

    /// Whether any figure whose name begins with `prefix` is wanted.
    pub fn any(&self, prefix: &str) -> bool {
        names().any(|name| name.starts_with(prefix) && self.has(name))
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
        assert_eq!(some.of(Part::Machines).list(), "lab.net_rtt_us");
        assert!(some.of(Part::Engine).list().is_empty());
        let all = Wanted::default();
        assert_eq!(all.of(Part::Engine).list().split(',').count(), 6);
        assert!(
            all.of(Part::Engine).has("shim.private_kb") && !all.of(Part::Machines).has("shim.private_kb")
        );
    }

    #[test]
    fn every_figure_is_native_s_or_the_lab_s_by_its_name() {
        for (name, part) in FIGURES.iter().filter(|(name, _)| !name.starts_with("shim.")) {
            assert_eq!(name.starts_with("native."), *part == Part::Native, "{name}");
        }
    }
}
