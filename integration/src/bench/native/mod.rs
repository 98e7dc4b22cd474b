//! Figures of this machine's own KVM: a flat guest, so that only the VMM counts.

mod crowd;
mod herd;
mod keeper;
mod pvh;
mod subject;

use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::stats::Pairs;
use super::{Bound, Figure, Wanted};
use subject::{Setup, Subject};

/// Blocks of ours, peer, peer, ours: two pairs each.
const FLOOR_BLOCKS: usize = 20;
const QEMU_BLOCKS: usize = 10;
/// Bound of all of this.
const TIME: Duration = Duration::from_secs(600);

/// Measures what is wanted.
///
/// # Errors
/// A program is missing or a machine does not start.
pub fn figures(wanted: &Wanted) -> io::Result<Vec<Figure>> {
    let setup = Setup::new()?;
    let _urgent = Urgent::new();
    let _bound = Bound::new("measuring on this machine", TIME, subject::kill_all);
    let mut figures = Vec::new();
    if wanted.has("native.start_over_floor") || wanted.has("native.teardown_ms") {
        figures.extend(against_floor(&setup)?);
    }
    if wanted.has("native.start_over_qemu") {
        figures.push(against_qemu(&setup)?);
    }
    let crowds = ["native.memory_per_vm_kb", "native.memory_charged_per_vm_kb", "native.starts_per_s"];
    if crowds.iter().any(|id| wanted.has(id)) {
        figures.extend(crowd::figures(&setup)?);
    }
    if wanted.any("native.herd") {
        figures.extend(herd::figures(&setup)?);
    }
    figures.retain(|figure| wanted.has(&figure.id));
    Ok(figures)
}

/// From spawning the floor program to its guest's first instruction, in milliseconds.
///
/// # Errors
/// As [`figures`].
pub fn floor_start_ms() -> io::Result<f64> {
    let setup = Setup::new()?;
    Life::of(Subject::Floor, &setup)?;
    Ok(Life::of(Subject::Floor, &setup)?.own_ms)
}

/// While it exists this process and all it starts from now on, ours and peers alike, have real-time priority
/// if the host allows it: a wait for a busy neighbour's time slice is longer than a start.
struct Urgent;

impl Urgent {
    fn new() -> Self {
        schedule(["-r", "-p", "1"]);
        Self
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        schedule(["-o", "-p", "0"]);
    }
}

fn schedule(policy: [&str; 3]) {
    let mut chrt = Command::new("chrt");
    chrt.args(policy).arg(std::process::id().to_string()).stdout(Stdio::null()).stderr(Stdio::null());
    // Without the right to it, or without the program, neighbours are met as they are.
    let _ = chrt.status();
}

/// One machine: how long it took to start and to end.
#[derive(Clone, Copy, Debug)]
struct Life {
    /// To the first instruction, by the program's own stamp if it has one.
    own_ms: f64,
    /// To the first instruction, as this process saw it.
    seen_ms: f64,
    end_ms: f64,
}

impl Life {
    fn of(subject: Subject, setup: &Setup) -> io::Result<Self> {
        let running = subject.start(setup)?;
        let (own_ms, seen_ms) = (ms(running.own_ns.unwrap_or(running.seen_ns)), ms(running.seen_ns));
        Ok(Self { own_ms, seen_ms, end_ms: ms(running.end()?) })
    }
}

/// One machine after the other: ours, peer, peer, ours, so that both meet the same load. Calls `pair` with
/// ours and the peer's.
fn interleave(
    setup: &Setup,
    peer: Subject,
    blocks: usize,
    mut pair: impl FnMut(Life, Life),
) -> io::Result<()> {
    // Once each, so that files are in memory.
    Life::of(Subject::Mvm, setup)?;
    Life::of(peer, setup)?;
    for _ in 0..blocks {
        let ours = Life::of(Subject::Mvm, setup)?;
        pair(ours, Life::of(peer, setup)?);
        let theirs = Life::of(peer, setup)?;
        pair(Life::of(Subject::Mvm, setup)?, theirs);
    }
    Ok(())
}

fn against_floor(setup: &Setup) -> io::Result<Vec<Figure>> {
    let (mut starts, mut ends) = (Pairs::default(), Pairs::default());
    interleave(setup, Subject::Floor, FLOOR_BLOCKS, |ours, floor| {
        starts.add(ours.own_ms, floor.own_ms);
        ends.add(ours.end_ms, floor.end_ms);
    })?;
    let start = Figure::ratio(
        "native.start_over_floor",
        &starts,
        ["mvm_ms", "floor_ms"],
        "spawn to first guest instruction (both stamp it themselves on CLOCK_MONOTONIC), flat guest, 128 MiB: median \
         of the ratios of 40 pairs, one machine at a time, ours-floor-floor-ours, all at real-time priority if allowed",
    );
    let (ours, floor) = ends.medians();
    let end = Figure::new(
        "native.teardown_ms",
        ours,
        "ms",
        "SIGTERM to process reaped, flat guest halted: median of 40, interleaved with the floor's",
    )
    .peer("floor_ms", floor)
    .peer("over_floor", ends.ratio())
    .raw(ends.rows("mvm_ms", "floor_ms"));
    Ok(vec![start, end])
}

fn against_qemu(setup: &Setup) -> io::Result<Figure> {
    let (mut starts, mut seen) = (Pairs::default(), Pairs::default());
    interleave(setup, Subject::Qemu, QEMU_BLOCKS, |ours, qemu| {
        starts.add(ours.own_ms, qemu.seen_ms);
        seen.add(ours.seen_ms, qemu.seen_ms);
    })?;
    let (ours, qemu) = starts.medians();
    let mut rows = starts.rows("mvm_ms", "qemu_seen_ms");
    rows.extend(seen.rows("mvm_seen_ms", "qemu_seen_ms"));
    Ok(Figure::new(
        "native.start_over_qemu",
        starts.ratio(),
        "x",
        "spawn to first guest instruction, flat guest, 128 MiB, against qemu -M microvm with everything optional off: \
         median of the ratios of 20 pairs, order and priority as against the floor; ours by its own stamp, QEMU's, \
         which has none, when its parent has read its report, about 0.2 ms late; seen_ratio has both so",
    )
    .peer("mvm_ms", ours)
    .peer("qemu_ms", qemu)
    .peer("seen_ratio", seen.ratio())
    .raw(rows))
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
