//! Memory of idle containers.

use std::fs;
use std::io;

use mvm_runtime::container::{Container, Cost};
use serde_json::json;

use super::boot::{boot, image};
use crate::bench::Figure;
use mvm_runtime::usage::settled;

/// Containers at once.
const CONTAINERS: usize = 20;

pub(super) fn figure() -> io::Result<Figure> {
    let image = image()?;
    // One first: what all share is not any one's cost.
    let _shared = boot(&image, "shared", None)?;
    let before = settled()?;
    let containers = (0..CONTAINERS)
        .map(|number| boot(&image, &format!("idle-{number}"), None))
        .collect::<io::Result<Vec<_>>>()?;
    let during = settled()?;
    let costs = containers.iter().map(cost).collect::<io::Result<Vec<_>>>()?;
    let thp = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    drop(containers);
    let after = settled()?;

    let count = CONTAINERS as f64;
    let mb = |kib: f64| kib * 1024.0 / 1e6;
    let mean = |part: fn(&Cost) -> u64| mb(costs.iter().map(part).sum::<u64>() as f64 / count);
    let (taken, given) = (mb((before - during) as f64 / count), mb((after - during) as f64 / count));
    // What else changes meanwhile, such as what earlier machines still give back, is in one and against the other.
    let total = f64::midpoint(taken, given);
    let (vmm, private, shared) =
        (mean(|cost| cost.vmm_kib), mean(|cost| cost.guest_private_kib), mean(|cost| cost.guest_shared_kib));
    let mut rows = vec![json!({
        "containers": CONTAINERS, "taken_mb": taken, "given_back_mb": given,
        "transparent_hugepage": thp.trim(),
    })];
    rows.extend(costs.iter().map(|cost| {
        json!({"vmm_kib": cost.vmm_kib, "guest_private_kib": cost.guest_private_kib,
            "guest_shared_kib": cost.guest_shared_kib})
    }));
    Ok(Figure::new(
        "lab.vm_memory_mb",
        total,
        "MB",
        "MemAvailable taken by 20 more idle containers with agent and mounted root (1 vCPU, 128 MiB) beside a first \
         and given back by their end, mean of both over 20; its parts from smaps (proportional), the kernel's part is the rest; includes what the starting \
         process holds for each",
    )
    .peer("vmm", vmm)
    .peer("guest_private", private)
    .peer("guest_shared", shared)
    .peer("kernel", total - vmm - private)
    .raw(rows))
}

fn cost(container: &Container) -> io::Result<Cost> {
    Cost::of(container.machine.pid(), 128 << 20)
}
