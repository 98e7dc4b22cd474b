//! What saving a machine costs beside plain writes: `save DIRECTORY [MIB] [RUN_KIB] [GAP_KIB] [ROUNDS] [CHANGED_MIB]`.
//!
//! A flat guest of 256 MiB has MIB of its memory full, in runs of RUN_KIB with GAP_KIB of zeroes between them that were
//! touched. It is saved into a new file of DIRECTORY and, in turn, as many bytes are written to another by the same
//! runs: ROUNDS times each. Then it is saved above what was saved, CHANGED_MIB of which were made another.
//! MVM_VMM names the program to measure.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_vmm::config::{Boot, MachineConfig, Start};
use mvm_vmm::control::{Answer, Client, Request, Snapshot};
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Child, Files, Launch};
use mvm_vmm::status::Event;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The guest's memory in MiB.
const MEMORY: u64 = 256;
/// Most bytes of one write, as when a machine is saved.
const MAX_WRITE: usize = 256 << 10;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let directory =
        arguments.next().ok_or("save DIRECTORY [MIB] [RUN_KIB] [GAP_KIB] [ROUNDS] [CHANGED_MIB]")?;
    let directory = Path::new(&directory);
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (mib, run, gap, rounds) = (number(64)?, number(64)? << 10, number(64)? << 10, number(31)?);
    let changed = number(8)? << 20;

    let full = vec![0xa5; run];
    let image = runs(mib << 20, run, gap)?;
    let (child, mut control) = start(image)?;
    let [mut saves, mut held, mut plain, mut above] = [const { Vec::new() }; 4];
    let mut ratios = Vec::new();
    let (mut bytes, mut above_bytes) = (0, 0);
    for _ in 0..rounds {
        let (state, memory) = (tempfile::tempfile_in(directory)?, tempfile::tempfile_in(directory)?);
        let began = Instant::now();
        let saved = save(&mut control, &[&state, &memory])?;
        let took = began.elapsed();
        let written = write(&tempfile::tempfile_in(directory)?, saved.memory_bytes, &full, gap)?;
        ratios.push(took.as_secs_f64() / written.as_secs_f64());
        saves.push(took);
        held.push(Duration::from_nanos(saved.held_ns));
        plain.push(written);
        bytes = saved.memory_bytes;
        let image_at = beginning(&memory)?;
        for index in 0..changed / run {
            memory.write_all_at(&vec![0x5a; run], image_at + (index * (run + gap)) as u64)?;
        }
        let changes = tempfile::tempfile_in(directory)?;
        let saved = save(&mut control, &[&state, &changes, &memory])?;
        above.push(Duration::from_nanos(saved.held_ns));
        above_bytes = saved.memory_bytes;
    }
    control.call(&Request::Stop)?;
    child.wait()?;
    ratios.sort_by(f64::total_cmp);
    println!("{:.1} MiB in runs of {} KiB, medians of {rounds}", bytes as f64 / 1_048_576.0, run >> 10);
    for (name, times) in [
        ("saved", &mut saves),
        ("held", &mut held),
        ("plain writes", &mut plain),
        ("held, changes", &mut above),
    ] {
        times.sort_unstable();
        println!("{name:14} {:8.3} ms", times[times.len() / 2].as_secs_f64() * 1e3);
    }
    println!("{:14} {:8.3}", "saved / plain", ratios[ratios.len() / 2]);
    println!("{:14} {:8.1} MiB", "changes", above_bytes as f64 / 1_048_576.0);
    Ok(())
}

/// A file of full runs, each followed by a gap of zeroes, with `full` bytes that are none.
fn runs(full: usize, run: usize, gap: usize) -> Result<File> {
    let file = tempfile::tempfile()?;
    let count = full / run;
    file.set_len((count * (run + gap)) as u64)?;
    for index in 0..count {
        file.write_all_at(&vec![0xa5; run], (index * (run + gap)) as u64)?;
    }
    Ok(file)
}

/// Where in a saved memory the first full run is.
fn beginning(memory: &File) -> Result<u64> {
    let mut page = [0; 4096];
    for at in (0..MEMORY << 20).step_by(page.len()) {
        memory.read_exact_at(&mut page, at)?;
        if page.iter().all(|byte| *byte == 0xa5) {
            return Ok(at);
        }
    }
    Err("the image is not in the memory".into())
}

/// The least that can be done: the bytes from memory into a file of the same size, by runs.
fn write(file: &File, bytes: u64, full: &[u8], gap: usize) -> Result<Duration> {
    let began = Instant::now();
    file.set_len(MEMORY << 20)?;
    let (mut at, mut left) = (0, usize::try_from(bytes)?);
    while left > 0 {
        for part in full.get(..left.min(full.len())).unwrap_or(full).chunks(MAX_WRITE) {
            file.write_all_at(part, at)?;
            at += part.len() as u64;
            left -= part.len();
        }
        at += gap as u64;
    }
    Ok(began.elapsed())
}

/// A guest that halts, with `image` read into its memory.
fn start(image: File) -> Result<(Child, Client)> {
    let mut files = Files::default();
    let (near, far) = UnixStream::pair()?;
    let kernel = tempfile::tempfile()?;
    kernel.write_all_at(&Program::Halt.image(), 0)?;
    let config = MachineConfig {
        memory: MEMORY.try_into()?,
        control: Some(files.add(far)),
        ..MachineConfig::new(
            "save".parse()?,
            files.add(File::options().read(true).write(true).open("/dev/kvm")?),
            Start::Boot(Boot { initrd: Some(files.add(image)), ..Boot::new(files.add(kernel)) }),
        )
    };
    let mut child = Launch { config, files, stderr: None }.spawn()?;
    for event in child.events.by_ref() {
        if matches!(event?, Event::GuestFirstInstruction { .. }) {
            return Ok((child, Client::new(near)));
        }
    }
    Err("the machine ended".into())
}

/// Saves into the first two files, above the third if there is one.
fn save(control: &mut Client, files: &[&File]) -> Result<Snapshot> {
    let request = Request::Snapshot { resume: true, contents: String::new(), base: files.len() == 3 };
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    match control.call_with(&request, &files)? {
        Answer::Snapshot(saved) => Ok(saved),
        other => Err(format!("{other:?}").into()),
    }
}
