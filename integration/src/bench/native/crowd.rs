//! Many machines at once: memory of each, and how fast they start.

use std::io;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use super::subject::{Running, Setup, Subject};
use crate::bench::Figure;
use crate::bench::memory::{settled, smaps_kib};
use crate::bench::stats::median;

/// Machines at once.
const MACHINES: usize = 200;
/// QEMU takes fewer: a hundred times the memory and time.
const QEMU_MACHINES: usize = 20;
/// Crowds of each.
const ROUNDS: usize = 6;

/// One crowd's measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crowd {
    /// kB of MemAvailable each took.
    taken_kb: f64,
    /// kB of MemAvailable each gave back.
    given_kb: f64,
    starts_per_s: f64,
    /// kB the process of one of them has to itself.
    process_kb: f64,
}

impl Crowd {
    fn measure(subject: Subject, machines: usize, setup: &Setup) -> io::Result<Self> {
        let before = settled()?;
        let (running, starts_per_s) = start(subject, machines, setup)?;
        let during = settled()?;
        let process_kb = running.first().map_or(Ok(0), |one| smaps_kib(one.pid()))? as f64;
        end(running)?;
        let after = settled()?;
        let each = |more: i64, less: i64| (more - less) as f64 / machines as f64;
        Ok(Self { taken_kb: each(before, during), given_kb: each(after, during), starts_per_s, process_kb })
    }

    fn row(&self, subject: Subject) -> Value {
        json!({
            "subject": format!("{subject:?}").to_lowercase(), "taken_kb": self.taken_kb, "given_back_kb": self.given_kb,
            "starts_per_s": self.starts_per_s, "process_private_kb": self.process_kb,
        })
    }
}

/// Starts machines from two threads, one after the other each. Returns them and their number per second.
fn start(subject: Subject, machines: usize, setup: &Setup) -> io::Result<(Vec<Running>, f64)> {
    let began = Instant::now();
    let some = |count: usize| (0..count).map(|_| subject.start(setup)).collect::<io::Result<Vec<_>>>();
    let mut all = thread::scope(|scope| -> io::Result<Vec<_>> {
        let half = scope.spawn(|| some(machines / 2));
        let mut all = some(machines - machines / 2)?;
        all.extend(half.join().map_err(|_| io::Error::other("a thread panicked"))??);
        Ok(all)
    })?;
    let rate = all.len() as f64 / began.elapsed().as_secs_f64();
    all.shrink_to_fit();
    Ok((all, rate))
}

fn end(running: Vec<Running>) -> io::Result<()> {
    running.into_iter().try_for_each(|one| one.end().map(drop))
}

/// Memory per machine and starts per second.
pub(super) fn figures(setup: &Setup) -> io::Result<Vec<Figure>> {
    let (mut ours, mut floors, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Ours, floor, floor, ours.
        let order = [Subject::Mvm, Subject::Floor];
        for turn in 0..2 {
            let subject = order[(turn + round) % 2];
            let crowd = Crowd::measure(subject, MACHINES, setup)?;
            rows.push(crowd.row(subject));
            if subject == Subject::Mvm { &mut ours } else { &mut floors }.push(crowd);
        }
    }
    let qemu = Crowd::measure(Subject::Qemu, QEMU_MACHINES, setup)?;
    rows.push(qemu.row(Subject::Qemu));

    let memory = |crowds: &[Crowd]| {
        median(&crowds.iter().flat_map(|crowd| [crowd.taken_kb, crowd.given_kb]).collect::<Vec<_>>())
    };
    let rate = |crowds: &[Crowd]| median(&crowds.iter().map(|crowd| crowd.starts_per_s).collect::<Vec<_>>());
    let size = Figure::new(
        "native.memory_per_vm_kb",
        memory(&ours),
        "kB",
        "MemAvailable taken by 200 idle machines with a flat guest and given back by their end, over 200: median of 12 \
         (6 crowds), alternating with the floor's; QEMU 20 machines, once",
    )
    .peer("floor", memory(&floors))
    .peer("qemu", memory(&[qemu]))
    .raw(rows.clone());
    let speed = Figure::new(
        "native.starts_per_s",
        rate(&ours),
        "1/s",
        "200 machines started by two threads, each waiting for a machine's first instruction before its next: median \
         of 6 crowds, alternating with the floor's; QEMU 20 machines, once",
    )
    .peer("floor", rate(&floors))
    .peer("qemu", rate(&[qemu]))
    .raw(rows);
    Ok(vec![size, speed])
}
