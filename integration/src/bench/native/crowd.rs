//! Many machines at once: memory of each, and how fast they start.

use std::io;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use super::subject::{Running, Setup, Subject};
use crate::bench::Figure;
use crate::bench::cgroup::Meter;
use crate::bench::stats::median;
use mvm_runtime::usage::{private_kib, settled};

/// Machines at once.
const MACHINES: usize = 200;
/// QEMU takes fewer: a hundred times the memory and time.
const QEMU_MACHINES: usize = 20;
/// Crowds of each.
const ROUNDS: usize = 6;

/// One crowd's measurements, in kB of each machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crowd {
    /// Charged to a memory cgroup, and of that what is the kernel's, if there is such a cgroup.
    charged_kb: Option<(f64, f64)>,
    /// Pages that the processes have to themselves.
    process_kb: f64,
    /// Change of MemAvailable by their start and by their end.
    taken_kb: f64,
    given_kb: f64,
    starts_per_s: f64,
}

impl Crowd {
    fn measure(subject: Subject, machines: usize, setup: &Setup) -> io::Result<Self> {
        let meter = Meter::new().ok();
        let charged = || meter.as_ref().map(Meter::settled).transpose();
        meter.as_ref().map_or(Ok(()), Meter::enter)?;
        let (before, charged_before) = (settled()?, charged()?);
        let (running, starts_per_s) = start(subject, machines, setup)?;
        let (during, charged_during) = (settled()?, charged()?);
        let own = running.iter().map(|one| private_kib(one.pid())).sum::<io::Result<i64>>()?;
        end(running)?;
        let after = settled()?;
        let each = |more: i64, less: i64| (more - less) as f64 / machines as f64;
        Ok(Self {
            charged_kb: charged_during.zip(charged_before).map(
                |((all, kernel), (all_before, kernel_before))| {
                    (each(all, all_before), each(kernel, kernel_before))
                },
            ),
            process_kb: each(own, 0),
            taken_kb: each(before, during),
            given_kb: each(after, during),
            starts_per_s,
        })
    }

    fn row(&self, subject: Subject) -> Value {
        json!({
            "subject": format!("{subject:?}").to_lowercase(), "charged_kb": self.charged_kb.map(|(all, _)| all),
            "kernel_kb": self.charged_kb.map(|(_, kernel)| kernel),
            "process_private_kb": self.process_kb, "memavailable_taken_kb": self.taken_kb,
            "memavailable_given_back_kb": self.given_kb, "starts_per_s": self.starts_per_s,
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

    let rate = |crowds: &[Crowd]| median(&crowds.iter().map(|crowd| crowd.starts_per_s).collect::<Vec<_>>());
    let speed = Figure::new(
        "native.starts_per_s",
        rate(&ours),
        "1/s",
        "200 machines started by two threads, each waiting for a machine's first instruction before its next: median \
         of 6 crowds, alternating with the floor's; QEMU 20 machines, once",
    )
    .peer("floor", rate(&floors))
    .peer("qemu", rate(&[qemu]))
    .raw(rows.clone());
    let crowds: [&[Crowd]; 3] = [&ours, &floors, &[qemu]];
    let memory = [Some(available(crowds)), charged(crowds)].into_iter().flatten();
    Ok(memory.map(|figure| figure.raw(rows.clone())).chain([speed]).collect())
}

/// Memory of ours, the floor's and QEMU's machines as the host's MemAvailable has it.
fn available(crowds: [&[Crowd]; 3]) -> Figure {
    let [ours, floor, qemu] =
        crowds.map(|crowds| median(&crowds.iter().map(|crowd| crowd.taken_kb).collect::<Vec<_>>()));
    let figure = Figure::new(
        "native.memory_per_vm_kb",
        ours,
        "kB",
        "MemAvailable before 200 idle machines with a flat guest less MemAvailable with them, over 200: median of 6 \
         crowds, alternating with the floor's; QEMU 20 machines, once. Pages the kernel keeps at hand count for nobody, \
         and others at work disturb it: see native.memory_charged_per_vm_kb",
    );
    figure.peer("floor", floor).peer("qemu", qemu)
}

/// Memory of ours, the floor's and QEMU's machines as a cgroup is charged for it, if all of it was metered.
fn charged(crowds: [&[Crowd]; 3]) -> Option<Figure> {
    let each = |crowds: &[Crowd]| {
        let each = crowds.iter().map(|crowd| Some(crowd.charged_kb?.0)).collect::<Option<Vec<_>>>();
        each.map(|each| median(&each))
    };
    let (ours, floor, qemu) = (each(crowds[0])?, each(crowds[1])?, each(crowds[2])?);
    let figure = Figure::new(
        "native.memory_charged_per_vm_kb",
        ours,
        "kB",
        "charged to a memory cgroup for 200 idle machines with a flat guest (pages of processes and guests, and what \
         the kernel keeps for both), over 200: median of 6 crowds, alternating with the floor's; QEMU 20 machines, \
         once; rows have the kernel's part and the processes' private pages",
    );
    Some(figure.peer("floor", floor).peer("over_floor", ours / floor).peer("qemu", qemu))
}
