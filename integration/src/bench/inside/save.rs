//! What `mvm snapshot create` takes beside plain writes of the pages that it saves.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde_json::{Value, json};

use crate::bench::stats::Pairs;
use crate::bench::{Figure, beside};
use crate::vm;

/// Pairs, the order of each the opposite of the one before.
const ROUNDS: usize = 6;
/// What a container writes into its memory before it is saved, in MiB.
const WORK: usize = 48;
/// Most bytes of one write.
const MOST: usize = 256 << 10;
/// The container.
const NAME: &str = "saved";

/// Bytes of a file, and where they are.
type Run = (u64, Vec<u8>);

pub(super) fn figure() -> io::Result<Figure> {
    let image = vm::image().display().to_string();
    mvm(&["run", "--detach", "--memory", "256", "--name", NAME, &image, "--", "sleep", "1000000"])?;
    let work = format!("dd if=/dev/urandom of=/dev/shm/work bs=1M count={WORK} 2>/dev/null");
    mvm(&["exec", NAME, "sh", "-c", &work])?;
    let mut rows = Vec::new();
    // The first brings every file and every page that the others look at into memory.
    save(0)?;
    let runs = runs(&memory(0))?;
    let bytes: usize = runs.iter().map(|(_, bytes)| bytes.len()).sum();
    rows.push(
        json!({"runs": runs.len(), "bytes": bytes, "longest": runs.iter().map(|run| run.1.len()).max()}),
    );
    write(&runs)?;
    let mut pairs = Pairs::default();
    for number in 1..=ROUNDS {
        let (saved, written) = if number.is_multiple_of(2) {
            let written = write(&runs)?;
            (save(number)?, written)
        } else {
            (save(number)?, write(&runs)?)
        };
        pairs.add(saved, written);
        rows.push(json!({"number": number, "held_ms": held(number)?}));
        mvm(&["snapshot", "rm", &name(number)])?;
    }
    mvm(&["rm", "--force", NAME])?;
    let how = format!(
        "`mvm snapshot create` of a running container in whose memory are {WORK} MiB of its own, from the start of `mvm` to \
         its end, over writing the pages that are in the snapshot's memory into a new file, by the same runs, at most \
         {} KiB a write, and writing that back: median of the ratios of {ROUNDS} pairs (ours-writes-writes-ours), on \
         virtual time and in the emulated host's memory",
        MOST >> 10
    );
    let mut figure = Figure::ratio("lab.save_over_writes", &pairs, ["save_ms", "writes_ms"], &how);
    figure = figure.peer("mib", bytes as f64 / f64::from(1 << 20));
    figure.raw.extend(rows);
    Ok(figure)
}

fn mvm(args: &[&str]) -> io::Result<()> {
    let run = vm::scratch().join("run");
    let output =
        Command::new(beside("mvm")?).args(args).env("MVM_STATE", vm::state()).env("MVM_RUN", run).output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("mvm {args:?}: {}", String::from_utf8_lossy(&output.stderr))))
    }
}

fn name(number: usize) -> String {
    format!("{NAME}-{number}")
}

fn directory(number: usize) -> PathBuf {
    vm::state().join("snapshots").join(name(number))
}

fn memory(number: usize) -> PathBuf {
    directory(number).join("memory")
}

/// Milliseconds that saving takes.
fn save(number: usize) -> io::Result<f64> {
    let began = Instant::now();
    mvm(&["snapshot", "create", "--name", &name(number), NAME])?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// Milliseconds for which the machine stood still, as the snapshot says.
fn held(number: usize) -> io::Result<Value> {
    let manifest: Value = serde_json::from_slice(&fs::read(directory(number).join("manifest.json"))?)?;
    Ok(manifest["run"]["machine"]["held_ms"].clone())
}

/// What is in a file between its holes.
fn runs(path: &Path) -> io::Result<Vec<Run>> {
    let (file, mut end, mut runs) = (File::open(path)?, 0, Vec::new());
    loop {
        let start = match lseek(&file, end, Whence::SeekData) {
            Err(Errno::ENXIO) => return Ok(runs),
            start => start?,
        };
        end = lseek(&file, start, Whence::SeekHole)?;
        let mut bytes = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, start.cast_unsigned())?;
        runs.push((start.cast_unsigned(), bytes));
    }
}

/// Milliseconds that it takes to write them to a new file, all the way.
fn write(runs: &[Run]) -> io::Result<f64> {
    let path = vm::scratch().join("plain");
    let began = Instant::now();
    let file = File::create(&path)?;
    for (at, bytes) in runs {
        for (number, part) in bytes.chunks(MOST).enumerate() {
            file.write_all_at(part, at + (number * MOST) as u64)?;
        }
    }
    file.sync_all()?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    fs::remove_file(path)?;
    Ok(took)
}
