//! Whole states: what was written is read, and what was not is refused or bounded.

mod changes;
mod flips;
mod refusals;

use std::fs::File;

use mvm_devices::memory::Memory;

use super::*;
use crate::config::{FdSlot, MachineConfig, MemSize, Restore, Serial, Start};
use crate::memory;
use crate::snapshot::pages;

const ID: SnapshotId = [0x5a; 16];
const CONTENTS: &str = "a kernel and an agent";

/// A state as a machine of two CPUs with `functions` leaves it.
fn sample(functions: Vec<SavedFunction>) -> MachineState {
    MachineState {
        id: ID,
        program: MachineState::PROGRAM.to_owned(),
        contents: CONTENTS.to_owned(),
        memory_mib: 4,
        host: HostFacts::here(),
        vcpus: (0..2).map(VcpuState::sample).collect(),
        functions,
        serial: Some(serial::State::default()),
    }
}

/// A configuration that such a machine can go on with.
fn config(devices: &[SavedFunction]) -> MachineConfig {
    MachineConfig {
        cpus: 2.try_into().unwrap(),
        memory: size(),
        devices: devices.iter().map(|_| serde_json::from_str(r#"{"type":"rng"}"#).unwrap()).collect(),
        serial: Some(Serial { output: FdSlot(6), input: None }),
        ..MachineConfig::new(
            "test".parse().unwrap(),
            FdSlot(3),
            Start::Restore(Restore {
                state: FdSlot(4),
                memory: FdSlot(5),
                userfault: None,
                base: None,
                working_set: None,
                contents: CONTENTS.to_owned(),
            }),
        )
    }
}

fn size() -> MemSize {
    MemSize::try_from(4).unwrap()
}

fn written(state: &MachineState) -> File {
    let file = tempfile::tempfile().unwrap();
    state.write(&file).unwrap();
    file
}

#[test]
fn a_state_is_read_as_it_was_written() {
    let (first, second) = (written(&sample(Vec::new())), tempfile::tempfile().unwrap());
    MachineState::read(&first, &config(&[]), CONTENTS).unwrap().write(&second).unwrap();
    let bytes = |file: &File| {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).unwrap();
        bytes
    };
    assert_eq!(bytes(&first), bytes(&second));
}

/// The memory of a machine with some bytes in it, saved.
fn saved_memory() -> (Memory, File) {
    use mvm_devices::memory::{Bytes, GuestAddress};
    let memory = memory::create(size()).unwrap();
    for at in [0u64, 0x10_0000, 0x3f_f000] {
        memory.write_obj(at + 1, GuestAddress(at)).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    pages::save(&memory, &[], None, &ID, &file).unwrap();
    (memory, file)
}
