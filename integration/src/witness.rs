//! What a host says of itself and of its machines when a test has failed on it: clocks, kernel messages, and whether
//! virtual CPUs still run. For whoever has nothing but a log.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Write as _, stderr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, abort};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use mvm_runtime::usage::time_of;

/// Bound of one test: the longest takes minutes in an emulated host.
const BOUND: Duration = Duration::from_secs(600);
/// Time over which counters are compared.
const APART: Duration = Duration::from_secs(1);
/// Where KVM counts, if debugfs is mounted: in the lab it is.
const COUNTERS: &str = "/sys/kernel/debug/kvm";
/// What is read there of a machine; counters but for the last two, which are of its first virtual CPU.
const KVM: [&str; 9] = [
    "exits",
    "halt_exits",
    "halt_wakeup",
    "irq_exits",
    "irq_injections",
    "mmio_exits",
    "hypercalls",
    "vcpu0/tsc-offset",
    "vcpu0/lapic_timer_advance_ns",
];

/// Runs the test of this name; when it panics the host is described on standard error, while what is stuck is still
/// there. One that has no end within ten minutes is named as well, and this program with it aborted: whoever waits
/// for a line or a process waits without a bound of its own.
///
/// # Errors
/// What it panicked with.
pub fn watched(name: &str, test: impl FnOnce()) -> thread::Result<()> {
    let name = name.to_owned();
    bounded(BOUND, test, move || {
        let _ = writeln!(stderr(), "{name} has not ended within {BOUND:?}\n{}", testimony());
        abort();
    })
}

/// Runs a test, and `give_up` on a thread if it takes longer than `time`.
fn bounded(
    time: Duration,
    test: impl FnOnce(),
    give_up: impl FnOnce() + Send + 'static,
) -> thread::Result<()> {
    let (running, ended) = mpsc::channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
            give_up();
        }
    });
    let result = catch_unwind(AssertUnwindSafe(test));
    drop(running);
    if result.is_err() {
        let _ = writeln!(stderr(), "{}", testimony());
    }
    result
}

/// The host as it is now; takes a second.
fn testimony() -> String {
    let mut text = String::new();
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    for path in ["/proc/uptime", "/proc/loadavg", clock] {
        let _ = writeln!(text, "{path}: {}", read(Path::new(path)));
    }
    let before = counters();
    thread::sleep(APART);
    let after = counters();
    for (name, then) in before {
        let now = after.get(&name).map_or("gone", String::as_str);
        let _ = writeln!(text, "{name}: {then} -> {now}");
    }
    let log = Command::new("dmesg").output().map(|output| output.stdout).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<_> = log.lines().collect();
    let clocks = lines.iter().filter(|line| line.contains("tsc") || line.contains("clocksource"));
    for line in clocks.chain(lines.iter().rev().take(10).rev()) {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// What KVM counts for each machine, and the processor time of each machine's threads, by what they are called.
fn counters() -> BTreeMap<String, String> {
    let machines = entries(Path::new(COUNTERS)).filter(|path| path.is_dir()).map(|machine| {
        let values = KVM.map(|name| format!("{name} {}", read(&machine.join(name))));
        (machine.display().to_string(), values.join(", "))
    });
    let ours = entries(Path::new("/proc")).filter(|process| read(&process.join("comm")) == "mvm-vmm");
    let threads = ours.flat_map(|process| entries(&process.join("task"))).map(|thread| {
        let name = format!("{} {}", thread.display(), read(&thread.join("comm")));
        (name, format!("{:?}", time_of(&thread).unwrap_or_default()))
    });
    machines.chain(threads).collect()
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_does_not_end_is_given_up_and_one_that_ends_is_not() {
        let (given_up, told) = mpsc::channel();
        let late = bounded(Duration::ZERO, || told.recv().unwrap(), move || given_up.send(()).unwrap());
        assert!(late.is_ok());
        let (given_up, told) = mpsc::channel();
        let early = bounded(Duration::from_secs(60), || (), move || given_up.send(()).unwrap());
        assert!(early.is_ok());
        assert!(told.recv().is_err(), "the watch has ended without a word");
    }

    #[test]
    fn the_host_is_described() {
        let text = testimony();
        assert!(text.contains("/proc/uptime: "), "{text}");
    }
}
