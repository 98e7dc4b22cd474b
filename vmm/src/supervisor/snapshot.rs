//! Saving a running machine: everything is held, read, and goes on.

use std::fs::File;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::pause::{pause, resume};
use super::requests::Subject;
use crate::config::FdSlot;
use crate::control::Snapshot;
use crate::control::server::Received;
use crate::error::causes;
use crate::snapshot::base::Base;
use crate::snapshot::host::HostFacts;
use crate::snapshot::vcpu::VcpuState;
use crate::snapshot::{Error as Saved, MAX_CONTENTS, MachineState, SnapshotId, pages};
use crate::vcpu::Errand;
use mvm_devices::fd::FdSource;

/// How long virtual CPUs that are held may take to say what they are.
const SAVE_TIME: Duration = Duration::from_secs(5);

/// Saves the machine into the two files that came with the request. Whether that succeeds or not, it then is as it
/// was before; if it does, it may also stay held.
pub(super) fn save(
    subject: &Subject<'_>,
    (contents, above_base): (&str, bool),
    goes_on: bool,
    mut files: Received,
) -> Result<Snapshot, String> {
    if contents.len() > MAX_CONTENTS {
        return Err(Saved::LongContents(contents.len()).to_string());
    }
    let mut take = |slot| files.take(FdSlot(slot)).map(File::from);
    let count = if above_base { "three files, one of them its base" } else { "two files" };
    let no_file = |error: std::io::Error| format!("a snapshot takes {count}: {error}");
    let (state, memory) = (take(0).map_err(no_file)?, take(1).map_err(no_file)?);
    let base = above_base.then(|| take(2)).transpose().map_err(no_file)?;
    let base = base.map(|file| Base::new(file, subject.extent())).transpose();
    let base = base.map_err(|error| text(&error))?;

    let machine = &subject.machine;
    let was_paused = machine.gate.is_paused();
    let began = Instant::now();
    pause(&machine.gate, &machine.bus, &subject.vcpus)?;
    let saved = save_held(subject, contents, &state, (&memory, base));
    if !was_paused && (goes_on || saved.is_err()) {
        resume(&machine.gate, &machine.bus.pci)?;
    }
    let (state_bytes, memory_bytes) = saved?;
    let held_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    Ok(Snapshot { memory_bytes, state_bytes, held_ns })
}

/// Saves a machine that is held. Returns the bytes of state and memory.
fn save_held(
    subject: &Subject<'_>,
    contents: &str,
    state: &File,
    (memory, base): (&File, Option<Base>),
) -> Result<(u64, u64), String> {
    let machine = &subject.machine;
    let mut id = SnapshotId::default();
    mvm_devices::sys::random(&mut id).map_err(|error| format!("cannot name the snapshot: {error}"))?;
    // First: completing what a CPU is in the middle of may reach devices and memory.
    let vcpus = save_vcpus(subject)?;
    let serial = machine.bus.serial.as_ref();
    let saved = MachineState {
        id,
        program: MachineState::PROGRAM.to_owned(),
        contents: contents.to_owned(),
        memory_mib: subject.config.memory.mib(),
        host: HostFacts::here(),
        vcpus,
        functions: machine.bus.pci.save()?,
        serial: serial.map(|serial| serial.port.lock().unwrap_or_else(PoisonError::into_inner).state()),
    };
    let state_bytes = saved.write(state).map_err(|error| text(&error))?;
    let memory_bytes =
        pages::save(machine.vm.memory(), &machine.backed, base, &id, memory).map_err(|error| text(&error))?;
    Ok((state_bytes, memory_bytes))
}

/// The virtual CPUs, by number.
fn save_vcpus(subject: &Subject<'_>) -> Result<Vec<VcpuState>, String> {
    let save = Arc::new(subject.machine.save_vcpu().map_err(|error| text(&error))?);
    // All of them before any is read: what one completes may unmask an interrupt of another.
    send(subject, Errand::Settle)?;
    let mut vcpus = send(subject, |to| Errand::Save(Arc::clone(&save), to))?;
    VcpuState::align(&mut vcpus);
    Ok(vcpus)
}

/// Sends every virtual CPU on an errand at the same time, each in its own thread. Returns what they bring, by number.
fn send<T>(
    subject: &Subject<'_>,
    errand: impl Fn(Sender<(u8, crate::error::Result<T>)>) -> Errand,
) -> Result<Vec<T>, String> {
    let (to, answers) = mpsc::channel();
    subject.vcpus.iter().for_each(|vcpu| vcpu.leave(errand(to.clone())));
    subject.machine.gate.send();
    drop(to);
    let end = Instant::now() + SAVE_TIME;
    let mut brought = Vec::with_capacity(subject.vcpus.len());
    for _ in &subject.vcpus {
        let left = end.saturating_duration_since(Instant::now());
        let (id, answer) =
            answers.recv_timeout(left).map_err(|_| "a virtual CPU does not say what it is".to_owned())?;
        brought.push((id, answer.map_err(|error| text(&error))?));
    }
    brought.sort_by_key(|(id, _)| *id);
    Ok(brought.into_iter().map(|(_, answer)| answer).collect())
}

/// An error and its causes in one line.
fn text(error: &dyn std::error::Error) -> String {
    let because = causes(error).into_iter().map(|cause| format!(": {cause}"));
    format!("{error}{}", because.collect::<String>())
}
