//! How long a machine takes to start and what an idle one costs: `start [ROUNDS] [MACHINES]`.
//!
//! Starts a flat guest ROUNDS times and prints the median time of each stage since spawning, then holds
//! MACHINES idle machines and prints the host memory each takes. MVM_VMM names the program to measure.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;

use mvm_vmm::config::{Boot, MachineConfig, Start};
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Child, Files, Launch};
use mvm_vmm::status::{Event, now};
use nix::sys::signal::{Signal, kill};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const STAGES: [&str; 9] =
    ["spawned", "main", "config", "loaded", "vm", "devices", "vcpus", "run", "first instruction"];

/// Host memory: all that is available, then the parts of what the kernel keeps for machines and their processes.
const COUNTS: [&str; 6] =
    ["MemAvailable", "SUnreclaim", "VmallocUsed", "KernelStack", "PageTables", "Percpu"];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let rounds = arguments.next().unwrap_or(Ok(100))?;
    let machines = arguments.next().unwrap_or(Ok(0))?;
    let mut kernel = tempfile::NamedTempFile::new()?;
    kernel.write_all(&Program::Halt.image())?;

    let mut times = vec![Vec::new(); STAGES.len()];
    for _ in 0..rounds {
        let (child, stages) = start(kernel.path())?;
        stop(child)?;
        times.iter_mut().zip(stages).for_each(|(times, stage)| times.push(stage));
    }
    for (name, times) in STAGES.iter().zip(&mut times) {
        times.sort_unstable();
        let percentile = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(0);
        println!("{name:18} {:8.3} ms  p90 {:8.3} ms", ms(percentile(50)), ms(percentile(90)));
    }
    if machines > 0 {
        let before = COUNTS.map(meminfo);
        let children = (0..machines).map(|_| start(kernel.path())).collect::<Result<Vec<_>>>()?;
        let after = COUNTS.map(meminfo);
        let mut own = 0;
        for (child, _) in &children {
            own += own_memory(child.pid.as_raw())?;
        }
        println!("{machines} idle machines, kB each: {} in the process", own / machines);
        for ((name, before), after) in COUNTS.iter().zip(before).zip(after) {
            println!("  {name:14} {:6}", (after? - before?) / machines as i64);
        }
        children.into_iter().try_for_each(|(child, _)| stop(child))?;
    }
    Ok(())
}

/// Starts a machine and waits for its first instruction. Returns nanoseconds since spawning per stage.
fn start(kernel: &std::path::Path) -> Result<(Child, [u64; STAGES.len()])> {
    let mut files = Files::default();
    let began = now();
    let config = MachineConfig {
        memory: 128.try_into()?,
        ..MachineConfig::new(
            "start".parse()?,
            files.add(File::options().read(true).write(true).open("/dev/kvm")?),
            Start::Boot(Boot::new(files.add(File::open(kernel)?))),
        )
    };
    let mut child = Launch { config, files, stderr: None }.spawn()?;
    let spawned = now();
    let (mut stages, mut run, mut first) = (None, None, None);
    while stages.is_none() || run.is_none() || first.is_none() {
        match child.events.next().ok_or("the machine ended")?? {
            Event::Started { stages: reached } => stages = Some(reached),
            Event::FirstExit { run_ns, .. } => run = Some(run_ns),
            Event::GuestFirstInstruction { ns } => first = Some(ns),
            other => return Err(format!("{other:?}").into()),
        }
    }
    let s = stages.unwrap_or_default();
    let reached = [
        spawned,
        s.entered_ns,
        s.config_ns,
        s.loaded_ns,
        s.vm_ns,
        s.devices_ns,
        s.vcpus_ns,
        run.unwrap_or(0),
        first.unwrap_or(0),
    ];
    Ok((child, reached.map(|ns| ns.saturating_sub(began))))
}

fn stop(child: Child) -> Result<()> {
    kill(child.pid, Signal::SIGKILL)?;
    child.wait()?;
    Ok(())
}

/// A field of /proc/meminfo in kB.
fn meminfo(name: &str) -> Result<i64> {
    field(&fs::read_to_string("/proc/meminfo")?, name)
}

/// Anonymous memory and page tables of a process in kB.
fn own_memory(pid: i32) -> Result<usize> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(usize::try_from(field(&status, "RssAnon")? + field(&status, "VmPTE")?)?)
}

fn field(text: &str, name: &str) -> Result<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.ok_or_else(|| format!("no {name}"))?.trim().trim_end_matches(" kB").parse()?)
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
