//! A full machine that is saved and goes on, and memory that a guest gives back.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_protocol::{ExitStatus, Identity};
use mvm_runtime::agent::StdioSpec;
use mvm_runtime::container::{Container, Cost, Request, Upper};
use mvm_runtime::machine::{Disk, Machine, Origin, Plan, Snapshot, prepare};
use mvm_runtime::template::Choice;
use mvm_vmm::snapshot::{Needed, Recorded};
use serde_json::json;

use super::boot::{READY, boot, explain, image};
use super::start::Started;
use crate::bench::Figure;
use crate::bench::stats::median;
use crate::vm::{self, spec};

/// Bound of what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Machines of either kind.
const STARTS: usize = 3;
/// What a guest writes before it is saved, in MiB.
const WORK: usize = 32;
/// What a guest fills and frees, in MiB.
const FREED: u64 = 512;
/// Of how many.
const RAM: u64 = 1536;
/// Time it has to give that back.
const TIME: Duration = Duration::from_secs(10);
/// Between looks.
const INTERVAL: Duration = Duration::from_millis(250);

/// Going on from a snapshot of a machine in which something was done, beside going on from a template.
pub(super) fn restore() -> io::Result<Figure> {
    let root = image()?;
    let mut container = boot(&root, "saved", None)?;
    run(&mut container, &format!("dd if=/dev/urandom of=/tmp/work bs=1M count={WORK} 2>/dev/null"))?;
    let path = |what: &str| vm::scratch().join(format!("full.{what}"));
    let saved = Snapshot {
        state: path("state"),
        memory: path("memory"),
        source: None,
        base: None,
        working_set: None,
        contents: "bench".to_owned(),
    };
    let (state, memory) = (File::create(&saved.state)?, File::create(&saved.memory)?);
    let control = container.machine.control();
    let size = control.snapshot(state.as_fd(), memory.as_fd(), "bench", false).map_err(explain)?;
    drop(container);

    Started::new(&root, "template", Choice::Always)?; // makes it
    let (mut restored, mut clones) = (Vec::new(), Vec::new());
    for number in 0..STARTS {
        restored.push(go_on(&saved, &root.path, &format!("restored-{number}"))?);
        let stages = Started::new(&root, &format!("clone-{number}"), Choice::Always)?.stages();
        clones.extend(stages.iter().find(|(stage, _)| *stage == READY).map(|(_, ms)| *ms));
    }
    let set = path("working-set");
    let (recorded, prefaulted) = prefaulted(&saved, &root.path, &set)?;
    let (ours, clone) = (median(&restored), median(&clones));
    let how = format!(
        "virtual time from the start of the machine's process to the agent's call, 128 MiB of which a container has \
         written {WORK} MiB, with its disk: median of {STARTS}, less that of a machine made of a template"
    );
    Ok(Figure::new("lab.restore_over_clone_ms", ours - clone, "ms", &how)
        .peer("restore_ms", ours)
        .peer("clone_ms", clone)
        .peer("prefaulted_ms", median(&prefaulted))
        .raw([json!({"restore_ms": restored, "clone_ms": clones, "memory_bytes": size.memory_bytes,
            "prefaulted_ms": prefaulted, "read_pages": recorded.read, "written_pages": recorded.written})]))
}

/// The same with the pages brought in beforehand that one needed.
fn prefaulted(saved: &Snapshot, root: &Path, set: &Path) -> io::Result<(Recorded, Vec<f64>)> {
    let (machine, _) = call(saved, root, "recorded")?;
    let recorded =
        machine.control().record_working_set(machine.pid(), Needed::Touched, set).map_err(explain)?;
    drop(machine);
    let with = Snapshot { working_set: Some(set.to_owned()), ..saved.clone() };
    let times = (0..STARTS).map(|number| go_on(&with, root, &format!("prefaulted-{number}")));
    Ok((recorded, times.collect::<io::Result<_>>()?))
}

/// Milliseconds until the agent has called.
fn go_on(saved: &Snapshot, root: &Path, name: &str) -> io::Result<f64> {
    call(saved, root, name).map(|(_, ms)| ms)
}

/// A machine whose agent has called, and the milliseconds until then.
fn call(saved: &Snapshot, root: &Path, name: &str) -> io::Result<(Machine, f64)> {
    let disk =
        Disk { path: root.to_path_buf(), read_only: true, serial: "root".to_owned(), throwaway: false };
    let id = name.parse().map_err(io::Error::other)?;
    let devices = mvm_runtime::container::devices();
    let plan = Plan { disks: vec![disk], devices, ..Plan::new(id, Origin::Saved(saved.clone())) };
    let mut machine = prepare(&plan).and_then(|prepared| prepared.start(None)).map_err(explain)?;
    let identity = Identity { hostname: name.to_owned(), machine_id: 0, wall_clock_ns: 0, entropy: [7; 32] };
    let _agent = machine.agent(identity, PATIENCE).map_err(explain)?;
    let called = machine.called_ns().ok_or_else(|| io::Error::other("nobody called"))?;
    let ms = (called - machine.spawned_ns()) as f64 / 1e6;
    Ok((machine, ms))
}

/// How much of what a guest has filled and freed its host has back after [`TIME`].
pub(super) fn freed() -> io::Result<Figure> {
    let request = Request {
        id: "freed".parse().map_err(io::Error::other)?,
        cpus: Default::default(),
        memory: RAM.try_into().map_err(io::Error::other)?,
        net: Default::default(),
        read_only: false,
        upper: Upper::Memory,
        sockets: None,
    };
    let mut container = Container::boot(&request, &image()?, &vm::state()).map_err(explain)?;
    let pid = container.machine.pid();
    let used = || Cost::of(pid, RAM << 20).map(|cost| cost.guest_private_kib);
    let idle = used()?;
    run(&mut container, &format!("dd if=/dev/zero of=/tmp/fill bs=1M count={FREED} 2>/dev/null"))?;
    let full = used()?;
    run(&mut container, "rm /tmp/fill")?;
    let start = Instant::now();
    let mut rows = vec![json!({"idle_kib": idle, "full_kib": full})];
    let mut left = used()?;
    while start.elapsed() < TIME {
        std::thread::sleep(INTERVAL);
        left = used()?;
        rows.push(json!({"ms": start.elapsed().as_millis(), "kib": left}));
    }
    let percent = |kib: u64| kib as f64 * 100.0 / (FREED << 10) as f64;
    let how = format!(
        "a container's {FREED} MiB file in memory, removed: what the host has back after {} s of the machine's private \
         memory, as a share of the file; free page reporting, no balloon asked for",
        TIME.as_secs()
    );
    Ok(Figure::new("lab.freed_returned_percent", percent(full.saturating_sub(left)), "%", &how)
        .peer("filled", percent(full.saturating_sub(idle)))
        .raw(rows))
}

fn run(container: &mut Container, script: &str) -> io::Result<()> {
    let stdio = StdioSpec::Pipes { stdin: false, stdout: false, stderr: false };
    let process = container.start(spec(&["sh", "-c", script], stdio)).map_err(explain)?;
    match container.agent.wait(process.id, Some(PATIENCE)).map_err(io::Error::other)? {
        ExitStatus::Code(0) => Ok(()),
        status => Err(io::Error::other(format!("{script}: {status:?}"))),
    }
}
