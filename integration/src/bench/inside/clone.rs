//! Machines that go on from a template beside such that boot: how soon they are there, and what they cost.

use std::io;
use std::time::Instant;

use mvm_runtime::container::Cost;
use mvm_runtime::image::Rootfs;
use mvm_runtime::template::Choice;
use serde_json::{Value, json};

use super::boot::{READY, image};
use super::start::Started;
use crate::bench::stats::median;
use crate::bench::{Figure, Wanted, native};
use mvm_runtime::usage::settled;

/// Machines of either kind.
const STARTS: usize = 5;
/// Processes.
const PROCESSES: usize = 20;
/// Idle containers at once.
const CONTAINERS: usize = 50;

pub(super) fn figures(wanted: &Wanted) -> io::Result<Vec<Figure>> {
    let image = image()?;
    // The first of each brings files into memory, and makes the template.
    for choice in [Choice::Never, Choice::Always] {
        Started::new(&image, &format!("warm-{choice}"), choice)?;
    }
    let mut figures = Vec::new();
    if wanted.has("lab.clone_over_floor_ms") || wanted.has("lab.clone_over_cold") {
        figures.extend(starts(&image)?);
    }
    if wanted.has("lab.exec_rtt_ms") {
        figures.push(processes(&image)?);
    }
    for (id, choice) in [
        ("lab.container_memory_mb_clone_50", Choice::Always),
        ("lab.container_memory_mb_cold_50", Choice::Never),
    ] {
        if wanted.has(id) {
            figures.push(crowd(id, &image, choice)?);
        }
    }
    Ok(figures)
}

fn starts(image: &Rootfs) -> io::Result<Vec<Figure>> {
    let mut rows = Vec::new();
    let mut start = |choice: Choice, number: usize| -> io::Result<f64> {
        let stages = Started::new(image, &format!("{choice}-{number}"), choice)?.stages();
        let row: Vec<_> = stages.iter().map(|(stage, ms)| json!({"stage": stage, "ms": ms})).collect();
        rows.push(json!({"template": choice.to_string(), "number": number, "stages": row}));
        let ready = stages.iter().find(|(stage, _)| *stage == READY);
        ready.map(|(_, ms)| *ms).ok_or_else(|| io::Error::other("the agent was never heard of"))
    };
    let (mut clones, mut colds) = (Vec::new(), Vec::new());
    for number in 0..STARTS {
        clones.push(start(Choice::Always, number)?);
        colds.push(start(Choice::Never, number)?);
    }
    let (clone, cold, floor) = (median(&clones), median(&colds), native::floor_start_ms()?);
    let how = format!(
        "virtual time from the call that starts the machine's process to the agent's hello, 1 vCPU, 128 MiB: median of \
         {STARTS} that go on from a template, in turn with as many that boot with their disks"
    );
    let over_floor = Figure::new(
        "lab.clone_over_floor_ms",
        clone - floor,
        "ms",
        &format!("{how}; less the floor program's start to its first guest instruction"),
    );
    let over_cold = Figure::new("lab.clone_over_cold", clone / cold, "x", &how);
    Ok(vec![
        over_floor.peer("clone_ms", clone).peer("floor_ms", floor).raw(rows.clone()),
        over_cold.peer("clone_ms", clone).peer("cold_ms", cold).raw(rows),
    ])
}

fn processes(image: &Rootfs) -> io::Result<Figure> {
    let container = Started::new(image, "processes", Choice::Always)?;
    container.execute(&["true"])?;
    let mut times = Vec::new();
    for _ in 0..PROCESSES {
        let start = Instant::now();
        container.execute(&["true"])?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let how = format!(
        "virtual time from asking the agent for busybox's `true` in a running container to hearing of its exit: median \
         of {PROCESSES}"
    );
    let rows = times.iter().map(|ms| json!({"ms": ms}));
    Ok(Figure::new("lab.exec_rtt_ms", median(&times), "ms", &how).raw(rows.collect::<Vec<_>>()))
}

fn crowd(id: &str, image: &Rootfs, choice: Choice) -> io::Result<Figure> {
    let before = settled()?;
    let containers = (0..CONTAINERS)
        .map(|number| Started::new(image, &format!("idle-{choice}-{number}"), choice))
        .collect::<io::Result<Vec<_>>>()?;
    let during = settled()?;
    let costs = containers.iter().map(Started::cost).collect::<io::Result<Vec<_>>>()?;
    drop(containers);
    let after = settled()?;

    let mb = |kib: f64| kib * 1024.0 / 1e6 / CONTAINERS as f64;
    let (taken, given) = (mb((before - during) as f64), mb((after - during) as f64));
    let sum = |part: fn(&Cost) -> u64| mb(costs.iter().map(part).sum::<u64>() as f64);
    let mut rows = vec![json!({"containers": CONTAINERS, "taken_mb": taken, "given_back_mb": given})];
    rows.extend(costs.iter().map(row));
    let how = format!(
        "MemAvailable taken by {CONTAINERS} idle containers (1 vCPU, 128 MiB; busybox's `sleep`) {} and given back by \
         their end, mean of both over {CONTAINERS}; parts from smaps, proportional",
        if choice == Choice::Never { "whose machines booted" } else { "of one template" }
    );
    Ok(Figure::new(id, f64::midpoint(taken, given), "MB", &how)
        .peer("vmm", sum(|cost| cost.vmm_kib))
        .peer("guest_private", sum(|cost| cost.guest_private_kib))
        .peer("guest_shared", sum(|cost| cost.guest_shared_kib))
        .raw(rows))
}

fn row(cost: &Cost) -> Value {
    json!({"vmm_kib": cost.vmm_kib, "guest_private_kib": cost.guest_private_kib,
        "guest_shared_kib": cost.guest_shared_kib})
}
