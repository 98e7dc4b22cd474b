//! From the machine's start to its agent's hello, stage by stage.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::io;
use std::path::Path;

use mvm_runtime::container::{Container, Request, Upper, root_file_system};
use mvm_runtime::failure::Failure;
use mvm_runtime::image::Rootfs;
use mvm_runtime::machine::CONTROL_SOCKET;
use mvm_vmm::control::{Client, Request as Ask};
use serde_json::{Value, json};

use crate::bench::stats::median;
use crate::bench::{Figure, native};
use crate::vm;

/// Boots that count; one before them brings every file into memory.
const BOOTS: usize = 3;
/// Stage that the figure ends with.
pub(super) const READY: &str = mvm_runtime::timeline::GREET;

pub(super) fn figure() -> io::Result<Figure> {
    let image = image()?;
    boot(&image, "warm", None)?;
    let mut rows = Vec::new();
    let mut ready = Vec::new();
    for number in 0..BOOTS {
        let container = boot(&image, &format!("boot-{number}"), None)?;
        let stages = container.timeline.since_spawn();
        ready.extend(stages.iter().find(|(stage, _)| *stage == READY).map(|(_, ns)| ms(*ns)));
        let stages: Vec<_> =
            stages.iter().map(|(stage, ns)| json!({"stage": stage, "ms": ms(*ns)})).collect();
        rows.push(json!({"boot": number, "stages": stages}));
    }
    rows.push(counters(&image)?);
    let floor = native::floor_start_ms()?;
    Ok(Figure::new(
        "lab.agent_ready_ms",
        median(&ready),
        "ms",
        "virtual time (one instruction is 1 ns) from the call that starts the machine's process to the agent's hello, \
         1 vCPU, 128 MiB, EROFS disk, vsock, on the VMM's side: median of 3; peer: the floor program to its first \
         guest instruction",
    )
    .peer("floor_ms", floor)
    .raw(rows))
}

/// A busybox image as a root file system.
pub(super) fn image() -> io::Result<Rootfs> {
    let dir = vm::image().display().to_string();
    root_file_system(&dir, &vm::state(), &mut ()).map_err(explain)
}

/// Boots a container of one CPU and 128 MiB.
pub(super) fn boot(image: &Rootfs, id: &str, sockets: Option<&Path>) -> io::Result<Container> {
    let request = Request {
        id: id.parse().map_err(io::Error::other)?,
        cpus: Default::default(),
        memory: Default::default(),
        net: Default::default(),
        read_only: false,
        upper: Upper::Memory,
        sockets: sockets.map(Path::to_path_buf),
    };
    Container::boot(&request, image, &vm::state()).map_err(explain)
}

/// What made the guest leave, in one more boot, which a control socket makes a little slower.
fn counters(image: &Rootfs) -> io::Result<Value> {
    let dir = vm::scratch().join("counted");
    let container = boot(image, "counted", Some(&dir))?;
    let kvm = kvm_counters(container.machine.pid());
    let answer = Client::connect(&dir.join(CONTROL_SOCKET))?.call(&Ask::Metrics)?;
    Ok(json!({"boot": "counted", "metrics": answer, "kvm": kvm}))
}

/// What KVM counted for the machine of process `pid`; nothing if the host does not show it.
fn kvm_counters(pid: i32) -> BTreeMap<String, u64> {
    let name = |entry: &DirEntry| entry.file_name().to_string_lossy().into_owned();
    let machines = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let ours = machines.filter(|entry| name(entry).starts_with(&format!("{pid}-")));
    let counters = ours.filter_map(|entry| fs::read_dir(entry.path()).ok()).flatten().flatten();
    counters
        .filter_map(|entry| Some((name(&entry), fs::read_to_string(entry.path()).ok()?.trim().parse().ok()?)))
        .filter(|(_, count)| *count > 0)
        .collect()
}

pub(super) fn explain(failure: Failure) -> io::Error {
    io::Error::other(failure.report())
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
