//! What runs in the emulated host: figures with Linux guests.

mod boot;
mod clone;
mod crowd;
mod engine;
mod guest;
mod peer;
mod qemu;
mod runs;
mod save;
mod saved;
mod start;
mod traffic;

use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use mvm_runtime::guest::GuestFiles;
use mvm_runtime::guest::cpio::Archive;

use super::{Bound, Figure, Part, Report, Wanted, beside};

/// Bound of everything in here, on the emulated host's clock.
const TIME: Duration = Duration::from_secs(900);
/// Size of the disk that is read; all of it is in the emulated host's memory.
const DISK: u64 = 64 << 20;

/// Files the measured guests are made of.
#[derive(Debug)]
struct Files {
    /// Their kernel.
    kernel: PathBuf,
    /// Has `guest_bench` as its first process.
    initrd: PathBuf,
    /// Read from.
    disk: PathBuf,
}

impl Files {
    fn new() -> io::Result<Self> {
        let dir = crate::vm::scratch();
        let (initrd, disk) = (dir.join("bench.cpio"), dir.join("bench.img"));
        let mut archive = Archive::new();
        archive.program("init", &fs::read(beside("guest_bench")?)?);
        fs::write(&initrd, archive.finish())?;
        // Written, not left sparse: holes of a file are read differently.
        let mut file = fs::File::create(&disk)?;
        let block: Vec<u8> = (0u8..=255).cycle().take(1 << 20).collect();
        for _ in 0..DISK >> 20 {
            file.write_all(&block)?;
        }
        let kernel = GuestFiles::find().map_err(|failure| io::Error::other(failure.report()))?.kernel;
        Ok(Self { kernel, initrd, disk })
    }
}

/// Measures what is wanted and writes it to `out` as JSON; what fails is told on standard error and left out.
///
/// # Errors
/// Nothing can be measured, or `out` not written.
pub fn run(wanted: &Wanted, out: &mut dyn Write) -> io::Result<()> {
    let _bound = Bound::new("measuring in the emulated host", TIME, || {});
    let mut figures = Vec::new();
    let mut add = |what: &str, result: io::Result<Vec<Figure>>| match result {
        Ok(some) => figures.extend(some),
        Err(error) => say(&format!("{what}: {error}")),
    };
    if wanted.has("lab.agent_ready_ms") {
        add("start", boot::figure().map(|figure| vec![figure]));
    }
    if wanted.any("lab.blk") || wanted.any("lab.net") || wanted.any("lab.vsock") {
        let files = Files::new()?;
        if wanted.any("lab.blk") {
            add("disk", traffic::disk(&files));
        }
        if wanted.any("lab.vsock") {
            add("vsock", traffic::vsock(&files));
        }
        if wanted.any("lab.net") {
            add("network", traffic::net(&files));
        }
    }
    if wanted.has("lab.vm_memory_mb") {
        add("memory", crowd::figure().map(|figure| vec![figure]));
    }
    if wanted.any("lab.clone") || wanted.any("lab.container_memory") || wanted.has("lab.exec_rtt_ms") {
        add("templates", clone::figures(wanted));
    }
    if wanted.has("lab.restore_over_clone_ms") {
        add("snapshot", saved::restore().map(|figure| vec![figure]));
    }
    if wanted.has("lab.save_over_writes") {
        add("saving", save::figure().map(|figure| vec![figure]));
    }
    if wanted.has("lab.freed_returned_percent") {
        add("free memory", saved::freed().map(|figure| vec![figure]));
    }
    if [Part::Engine, Part::Wall].iter().any(|part| !wanted.of(*part).list().is_empty()) {
        add("containerd", engine::figures(wanted));
    }
    figures.retain(|figure| wanted.has(&figure.id));
    serde_json::to_writer(out, &Report(figures)).map_err(io::Error::other)
}

fn say(text: &impl Display) {
    // There is nobody left to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "bench: {text}");
}
