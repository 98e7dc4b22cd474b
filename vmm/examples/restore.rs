//! How long a machine takes to go on from a snapshot, beside booting: `restore [ROUNDS] [CPUS]`.
//!
//! Saves a flat guest, then boots and restores it in turn, ROUNDS times each, and prints the median and the tenth
//! percentile of each stage since spawning, up to the first return from the guest. MVM_VMM names the program to
//! measure.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use mvm_vmm::config::{Boot, MachineConfig, Restore, Start};
use mvm_vmm::control::{Answer, Client, Request, Snapshot};
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Child, Files, Launch};
use mvm_vmm::status::{Event, now};
use nix::sys::signal::{Signal, kill};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const STAGES: [&str; 9] =
    ["spawned", "main", "config", "loaded", "vm", "devices", "vcpus", "run", "first exit"];

/// The files a machine starts from.
struct Source {
    kernel: File,
    state: File,
    memory: File,
}

/// A machine, its control connection, and nanoseconds since spawning per stage.
struct Started {
    child: Child,
    control: Client,
    stages: [u64; STAGES.len()],
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let rounds = arguments.next().unwrap_or(Ok(100))?;
    let cpus = arguments.next().unwrap_or(Ok(1))?;
    let source =
        Source { kernel: image(Program::ReadPorts)?, state: memfd(c"state")?, memory: memfd(c"memory")? };
    let mut first = start(&source, cpus, false)?;
    println!("{:?}", save(&mut first, &source)?);
    stop(first)?;

    let mut times = [vec![Vec::new(); STAGES.len()], vec![Vec::new(); STAGES.len()]];
    for _ in 0..rounds {
        for (restored, times) in [false, true].into_iter().zip(&mut times) {
            let started = start(&source, cpus, restored)?;
            times.iter_mut().zip(started.stages).for_each(|(times, stage)| times.push(stage));
            stop(started)?;
        }
    }
    println!("{:12} {:>10} {:>10} {:>10} {:>10}  ms", "", "boot", "10 %", "restore", "10 %");
    for (stage, name) in STAGES.iter().enumerate() {
        let columns = times.each_mut().map(|times| {
            times[stage].sort_unstable();
            let percentile = |percent| times[stage][times[stage].len() * percent / 100] as f64 / 1e6;
            format!("{:10.3} {:10.3}", percentile(50), percentile(10))
        });
        println!("{name:12} {}", columns.join(" "));
    }
    Ok(())
}

fn memfd(name: &std::ffi::CStr) -> Result<File> {
    Ok(File::from(nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?))
}

fn image(program: Program) -> Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(&program.image())?;
    Ok(file)
}

fn save(started: &mut Started, source: &Source) -> Result<Snapshot> {
    let request = Request::Snapshot { resume: true, contents: String::new(), base: false };
    match started.control.call_with(&request, &[source.state.as_fd(), source.memory.as_fd()])? {
        Answer::Snapshot(saved) => Ok(saved),
        other => Err(format!("{other:?}").into()),
    }
}

/// Starts a machine and waits for its first return from the guest.
fn start(source: &Source, cpus: usize, restored: bool) -> Result<Started> {
    let mut files = Files::default();
    let (near, far) = UnixStream::pair()?;
    let began = now();
    let kvm = files.add(File::options().read(true).write(true).open("/dev/kvm")?);
    let start = if restored {
        Start::Restore(Restore::new(
            files.add(source.state.try_clone()?),
            files.add(source.memory.try_clone()?),
        ))
    } else {
        Start::Boot(Boot::new(files.add(source.kernel.try_clone()?)))
    };
    let config = MachineConfig {
        cpus: (cpus as u64).try_into()?,
        memory: 128.try_into()?,
        control: Some(files.add(far)),
        ..MachineConfig::new("restore".parse()?, kvm, start)
    };
    let mut child = Launch { config, files, stderr: None }.spawn()?;
    let spawned = now();
    let (mut stages, mut exit) = (None, None);
    while stages.is_none() || exit.is_none() {
        match child.events.next().ok_or("the machine ended")?? {
            Event::Started { stages: reached } => stages = Some(reached),
            Event::FirstExit { run_ns, ns } => exit = Some((run_ns, ns)),
            Event::GuestFirstInstruction { .. } => {}
            other => return Err(format!("{other:?}").into()),
        }
    }
    let (s, (run, first)) = (stages.unwrap_or_default(), exit.unwrap_or_default());
    let reached =
        [spawned, s.entered_ns, s.config_ns, s.loaded_ns, s.vm_ns, s.devices_ns, s.vcpus_ns, run, first];
    let stages = reached.map(|ns| ns.saturating_sub(began));
    Ok(Started { child, control: Client::new(near), stages })
}

fn stop(started: Started) -> Result<()> {
    kill(started.child.pid, Signal::SIGKILL)?;
    started.child.wait()?;
    Ok(())
}
