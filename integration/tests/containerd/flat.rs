//! Many in a row: descriptors, threads and memory stay where they were.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use mvm_integration::containerd::Runtime;
use mvm_runtime::usage;
use nix::unistd::Pid;

use crate::context::{Context, Test};
use crate::faults::shim_of;

pub(crate) const TESTS: &[Test] = &[
    ("containers_in_a_row_leave_containerd_as_it_was", containers),
    ("processes_in_a_row_leave_the_shim_as_it_was", processes),
];

/// How many; an emulated host takes seconds for each.
const COUNT: &str = "MVM_TEST_ROW";
const FEW: usize = 8;
/// Runs before the first count: caches fill, threads start.
const WARM: usize = 3;
/// What an ended container may cost the host for good, in kB.
const KEPT: i64 = 512;
/// How long what has ended may hold on to what it had.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between looks.
const INTERVAL: Duration = Duration::from_millis(100);

fn count() -> usize {
    std::env::var(COUNT).ok().and_then(|text| text.parse().ok()).unwrap_or(FEW)
}

/// Descriptors and threads of a process.
fn held(pid: Pid) -> (usize, usize) {
    let entries = |name: &str| fs::read_dir(format!("/proc/{pid}/{name}")).expect("it lives").count();
    (entries("fd"), entries("task"))
}

/// Descriptors and threads of a process once they are no more than `most`, or after a while: what ended closes its own
/// a moment after it is told, and nothing tells of that.
fn held_at_last(pid: Pid, most: (usize, usize)) -> (usize, usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = held(pid);
        if (now.0 <= most.0 && now.1 <= most.1) || Instant::now() > deadline {
            return now;
        }
        thread::sleep(INTERVAL);
    }
}

fn containers(context: &Context) {
    let daemon = Pid::from_raw(context.daemon.pid().try_into().expect("a process id"));
    (0..WARM).for_each(|_| drop(context.sh(&[], "true")));
    let (descriptors, threads) = held(daemon);
    let available = usage::settled().expect("meminfo");
    (0..count()).for_each(|_| drop(context.sh(&[], "true")));
    // Go starts a thread whenever all others are in system calls, and keeps it.
    let most = (descriptors + 2, threads + 4);
    let (now, running) = held_at_last(daemon, most);
    assert!(now <= most.0, "{descriptors} descriptors became {now}");
    assert!(running <= most.1, "{threads} threads became {running}");
    let lost = available - usage::settled().expect("meminfo");
    let bound = KEPT * i64::try_from(count()).expect("few") + 16 * 1024;
    assert!(lost < bound, "{lost} kB less, {bound} would do");
}

fn processes(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    let shim = shim_of(context, &task.id);
    (0..WARM).for_each(|_| drop(task.sh("true")));
    let (descriptors, threads) = held(shim);
    let private = usage::private_kib(shim.as_raw()).expect("it lives");
    (0..count()).for_each(|_| drop(task.sh("true")));
    // runc's shim was seen to open one more after a while; ours has no such freedom.
    let spare = usize::from(context.runtime == Runtime::Runc);
    let most = (descriptors + spare, threads + 2);
    let (now, running) = held_at_last(shim, most);
    assert!(now <= most.0, "{descriptors} descriptors became {now}");
    assert!(running <= most.1, "{threads} threads became {running}");
    let grown = usage::private_kib(shim.as_raw()).expect("it lives") - private;
    assert!(grown < 4096, "{private} kB grew by {grown}");
    task.end();
}
