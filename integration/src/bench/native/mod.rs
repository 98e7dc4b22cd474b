//! Figures of this machine's own KVM: a flat guest, so that only the VMM counts.

mod crowd;
mod pvh;
mod subject;

use std::io;
use std::time::Duration;

use super::stats::Pairs;
use super::{Bound, Figure, Wanted};
use subject::{Running, Setup, Subject};

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
    let _bound = Bound::new("measuring on this machine", TIME, subject::kill_all);
    let mut figures = Vec::new();
    if wanted.has("native.start_over_floor") || wanted.has("native.teardown_ms") {
        figures.extend(against_floor(&setup)?);
    }
    if wanted.has("native.start_over_qemu") {
        figures.push(against_qemu(&setup)?);
    }
    if wanted.has("native.memory_per_vm_kb") || wanted.has("native.starts_per_s") {
        figures.extend(crowd::figures(&setup)?);
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
    Subject::Floor.start(&setup)?.end()?;
    let running = Subject::Floor.start(&setup)?;
    Ok(ms(running.own_ns.unwrap_or(0)))
}

/// Starts and ends machines of ours and of a peer's, interleaved, so that both meet the same load.
fn interleave(
    setup: &Setup,
    peer: Subject,
    blocks: usize,
    mut pair: impl FnMut(Running, Running) -> io::Result<()>,
) -> io::Result<()> {
    // Once each, so that files are in memory.
    Subject::Mvm.start(setup)?.end()?;
    peer.start(setup)?.end()?;
    let hold = |first: Subject, second: Subject| -> io::Result<(Running, Running)> {
        Ok((first.start(setup)?, second.start(setup)?))
    };
    for _ in 0..blocks {
        let (ours, theirs) = hold(Subject::Mvm, peer)?;
        pair(ours, theirs)?;
        let (theirs, ours) = hold(peer, Subject::Mvm)?;
        pair(ours, theirs)?;
    }
    Ok(())
}

fn against_floor(setup: &Setup) -> io::Result<Vec<Figure>> {
    let (mut starts, mut ends) = (Pairs::default(), Pairs::default());
    interleave(setup, Subject::Floor, FLOOR_BLOCKS, |ours, floor| {
        let own = |running: &Running| ms(running.own_ns.unwrap_or(0));
        starts.add(own(&ours), own(&floor));
        ends.add(ms(ours.end()?), ms(floor.end()?));
        Ok(())
    })?;
    let (ours, floor) = starts.medians();
    let start = Figure::new(
        "native.start_over_floor",
        starts.ratio(),
        "x",
        "spawn to first guest instruction (both stamp it themselves on CLOCK_MONOTONIC), flat guest, 128 MiB: median \
         of the ratios of 40 pairs, interleaved ours-floor-floor-ours",
    )
    .peer("mvm_ms", ours)
    .peer("floor_ms", floor)
    .raw(starts.rows("mvm_ms", "floor_ms"));
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
    let mut starts = Pairs::default();
    interleave(setup, Subject::Qemu, QEMU_BLOCKS, |ours, qemu| {
        starts.add(ms(ours.seen_ns), ms(qemu.seen_ns));
        ours.end()?;
        qemu.end().map(drop)
    })?;
    let (ours, qemu) = starts.medians();
    Ok(Figure::new(
        "native.start_over_qemu",
        starts.ratio(),
        "x",
        "spawn until the parent has read the report of the first guest instruction, flat guest, 128 MiB, against \
         qemu -M microvm with everything optional off: median of the ratios of 20 pairs, interleaved",
    )
    .peer("mvm_ms", ours)
    .peer("qemu_ms", qemu)
    .raw(starts.rows("mvm_ms", "qemu_ms")))
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
