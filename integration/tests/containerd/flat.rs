//! Many in a row: descriptors, threads and memory stay where they were.

use std::fs;

use mvm_integration::bench::memory;
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

fn count() -> usize {
    std::env::var(COUNT).ok().and_then(|text| text.parse().ok()).unwrap_or(FEW)
}

/// Descriptors and threads of a process.
fn held(pid: Pid) -> (usize, usize) {
    let entries = |name: &str| fs::read_dir(format!("/proc/{pid}/{name}")).expect("it lives").count();
    (entries("fd"), entries("task"))
}

fn containers(context: &Context) {
    let daemon = Pid::from_raw(context.daemon.pid().try_into().expect("a process id"));
    (0..WARM).for_each(|_| drop(context.sh(&[], "true")));
    let (descriptors, threads) = held(daemon);
    let available = memory::settled().expect("meminfo");
    (0..count()).for_each(|_| drop(context.sh(&[], "true")));
    let (now, running) = held(daemon);
    assert!(now <= descriptors + 2, "{descriptors} descriptors became {now}");
    // Go starts a thread whenever all others are in system calls, and keeps it.
    assert!(running <= threads + 4, "{threads} threads became {running}");
    let lost = available - memory::settled().expect("meminfo");
    let bound = KEPT * i64::try_from(count()).expect("few") + 16 * 1024;
    assert!(lost < bound, "{lost} kB less, {bound} would do");
}

fn processes(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    let shim = shim_of(context, &task.id);
    (0..WARM).for_each(|_| drop(task.sh("true")));
    let (descriptors, threads) = held(shim);
    let private = memory::smaps_kib(shim.as_raw()).expect("it lives");
    (0..count()).for_each(|_| drop(task.sh("true")));
    let (now, running) = held(shim);
    assert!(now <= descriptors, "{descriptors} descriptors became {now}");
    assert!(running <= threads + 2, "{threads} threads became {running}");
    let grown = memory::smaps_kib(shim.as_raw()).expect("it lives") - private;
    assert!(grown < 4096, "{private} kB grew by {grown}");
    task.end();
}
