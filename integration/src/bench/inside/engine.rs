//! Figures of containers under containerd: ours beside runc's, on the same daemon, of the same image, in turn.

use std::io;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use serde_json::json;

use super::runs;
use crate::bench::stats::{Pairs, median};
use crate::bench::{Figure, Wanted};
use crate::containerd::cri::messages::{
    ContainerConfig, ContainerMetadata, CreateContainer, Id, ImageSpec, PodSandboxConfig, PodSandboxMetadata,
    RunPodSandbox,
};
use crate::containerd::{BUSYBOX, Cri, Ctr, Daemon, Installation, Runtime};
use mvm_runtime::usage::private_kib;

/// Pairs of processes.
const PROCESSES: usize = 10;
/// Pods that are started at once.
const PODS: usize = 10;

pub(super) fn figures(wanted: &Wanted) -> io::Result<Vec<Figure>> {
    let fetched = std::env::var_os(crate::bench::FETCHED)
        .ok_or_else(|| io::Error::other("containerd was not fetched"))?;
    let installation = Installation::all(fetched.as_ref())?.pop().ok_or(io::ErrorKind::NotFound)?;
    let dir = crate::vm::scratch().join("containerd");
    let programs = std::env::current_exe()?.parent().map(std::path::Path::to_path_buf).unwrap_or_default();
    let daemon = Daemon::start(&installation, &dir, &[programs]);
    let clock = match std::env::var(crate::lab::INSIDE).as_deref() {
        Ok("deterministic") => "virtual time",
        _ => "wall clock of an emulated host",
    };
    let what = format!("containerd {}, one CPU, {clock}", installation.version());
    let ctr = daemon.ctr("default");
    let mut figures = runs::figures(wanted, &ctr, &what).unwrap_or_else(|error| {
        super::say(&format!("ctr run: {error}"));
        Vec::new()
    });
    let mut add = |id: &str, measured: &dyn Fn() -> io::Result<Vec<Figure>>| {
        if wanted.has(id) && figures.iter().all(|figure: &Figure| figure.id != id) {
            match measured() {
                Ok(some) => figures.extend(some),
                Err(error) => super::say(&format!("{id}: {error}")),
            }
        }
    };
    add("lab.exec_over_runc", &|| processes(&ctr, &what));
    add("shim.private_kb", &|| processes(&ctr, &what));
    add("lab.ten_pods_p99_over_p50", &|| Ok(vec![pods(&Cri::new(&daemon.socket()), &what)?]));
    Ok(figures)
}

/// Milliseconds of a call that must succeed.
fn timed(ctr: &Ctr, args: &[&str]) -> io::Result<f64> {
    let start = Instant::now();
    let output = ctr.call(args);
    let time = start.elapsed().as_secs_f64() * 1e3;
    if output.code == Some(0) {
        Ok(time)
    } else {
        Err(io::Error::other(format!("ctr {args:?}: {}", output.stderr)))
    }
}

fn processes(ctr: &Ctr, what: &str) -> io::Result<Vec<Figure>> {
    // Of two, so that what all shims of a host share is no one's own.
    let containers = |runtime: Runtime| [format!("{}-beside", runtime.name()), runtime.name().to_owned()];
    for runtime in Runtime::ALL {
        for id in containers(runtime) {
            let words =
                ["run", "-d", "--null-io", "--runtime", runtime.id(), BUSYBOX, &id, "sleep", "1000000"];
            timed(ctr, &words)?;
        }
    }
    let exec = |runtime: Runtime, number: usize| {
        timed(ctr, &["task", "exec", "--exec-id", &format!("e{number}"), runtime.name(), "true"])
    };
    let mut pairs = Pairs::default();
    for number in 0..PROCESSES {
        pairs.add(exec(Runtime::Mvm, number)?, exec(Runtime::Runc, number)?);
    }
    let private = |runtime: Runtime| -> io::Result<f64> {
        let shim = runtime.shim_of(runtime.name()).ok_or_else(|| io::Error::other("no shim"))?;
        Ok(private_kib(shim)? as f64)
    };
    let (ours, theirs) = (private(Runtime::Mvm)?, private(Runtime::Runc)?);
    for id in Runtime::ALL.into_iter().flat_map(containers) {
        timed(ctr, &["task", "delete", "-f", &id])?;
        timed(ctr, &["containers", "rm", &id])?;
    }
    let how = format!(
        "median of {PROCESSES} pairs of `ctr task exec` of busybox's `true` in a running container; {what}"
    );
    let memory = format!(
        "private memory of the shim of a container after {PROCESSES} processes in it, beside another shim; {what}"
    );
    Ok(vec![
        Figure::ratio("lab.exec_over_runc", &pairs, ["mvm_ms", "runc_ms"], &how),
        Figure::new("shim.private_kb", ours, "kB", &memory)
            .peer("runc", theirs)
            .raw([json!({"mvm_kb": ours, "runc_kb": theirs})]),
    ])
}

fn pods(cri: &Cri, what: &str) -> io::Result<Figure> {
    // One of each first: images are converted and the kernel's modules loaded once.
    for runtime in Runtime::ALL {
        let id = pod(cri, runtime, PODS)?;
        cri.stop_pod(&id).and_then(|_| cri.remove_pod(&id)).map_err(io::Error::other)?;
    }
    let ours = crowd(cri, Runtime::Mvm)?;
    let theirs = crowd(cri, Runtime::Runc)?;
    let ratio = |times: &[f64]| times.iter().copied().fold(0.0, f64::max) / median(times);
    let how = format!(
        "slowest over median of {PODS} pods with a container each, all asked for at the same moment, until the container \
         runs; {what}"
    );
    let figure = Figure::new("lab.ten_pods_p99_over_p50", ratio(&ours), "x", &how);
    Ok(figure
        .peer("runc", ratio(&theirs))
        .peer("mvm_median_ms", median(&ours))
        .peer("runc_median_ms", median(&theirs))
        .raw([json!({"mvm_ms": ours, "runc_ms": theirs})]))
}

/// Starts pods at once; returns how long each took, in ms.
fn crowd(cri: &Cri, runtime: Runtime) -> io::Result<Vec<f64>> {
    let begin = Barrier::new(PODS);
    let started: Vec<_> = thread::scope(|scope| {
        let pods: Vec<_> = (0..PODS)
            .map(|number| {
                let (cri, begin) = (&cri, &begin);
                scope.spawn(move || {
                    begin.wait();
                    let start = Instant::now();
                    pod(cri, runtime, number).map(|id| (id, start.elapsed().as_secs_f64() * 1e3))
                })
            })
            .collect();
        pods.into_iter().map(|pod| pod.join().expect("no panic")).collect()
    });
    let mut times = Vec::new();
    for pod in started {
        let (id, time) = pod?;
        times.push(time);
        cri.stop_pod(&id).and_then(|_| cri.remove_pod(&id)).map_err(io::Error::other)?;
    }
    Ok(times)
}

/// A pod with a running container.
fn pod(cri: &Cri, runtime: Runtime, number: usize) -> io::Result<Id> {
    let name = format!("{}-pod-{number}", runtime.name());
    let metadata = PodSandboxMetadata { name: name.clone(), uid: name.clone(), namespace: "bench".into() };
    let config = PodSandboxConfig { metadata: Some(metadata), hostname: name, ..Default::default() };
    let request = RunPodSandbox { config: Some(config.clone()), runtime_handler: runtime.name().into() };
    let id = cri.run_pod(&request).map_err(io::Error::other)?;
    let container = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "only".into() }),
        image: Some(ImageSpec { image: BUSYBOX.into() }),
        command: ["sleep", "1000000"].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let request = CreateContainer {
        pod_sandbox_id: id.id.clone(),
        config: Some(container),
        sandbox_config: Some(config),
    };
    cri.create(&request).and_then(|container| cri.start(&container)).map_err(io::Error::other)?;
    Ok(id)
}
