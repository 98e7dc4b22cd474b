//! A way in for the fuzz targets: states with a right checksum, whatever is in them.

use mvm_devices::serial;
use mvm_devices::transport::State;

use super::format::{decode, encode, seal};
use super::host::HostFacts;
use super::vcpu::VcpuState;
use super::{MachineState, SavedFunction};

/// Bytes before a state's value.
const HEADER: usize = 24;

/// The state of a machine with one CPU and these functions, without the header.
pub fn state(functions: Vec<State>) -> Vec<u8> {
    let functions = (1..).zip(functions).map(|(place, state)| {
        let placed = vec![(0, 0xc000_0000)];
        SavedFunction { place, kind: "rng".to_owned(), placed, state }
    });
    let machine = MachineState {
        id: [0x5a; 16],
        program: MachineState::PROGRAM.to_owned(),
        contents: "a kernel".to_owned(),
        memory_mib: 4,
        host: HostFacts::here(),
        vcpus: vec![VcpuState::default()],
        functions: functions.collect(),
        serial: Some(serial::State::default()),
    };
    encode(&machine).map(|mut bytes| bytes.split_off(HEADER)).unwrap_or_default()
}

/// A state: the bytes behind a header that is right. What can be one is one again when it is written.
///
/// # Panics
/// It is not.
pub fn sealed(value: &[u8]) -> bool {
    let bytes = seal([&[0; HEADER][..], value].concat());
    let Ok(state) = decode::<MachineState>(&bytes) else { return false };
    let _ = state.shown();
    if let Ok(again) = encode(&state) {
        assert!(decode::<MachineState>(&again).is_ok(), "{state:?}");
    }
    true
}

/// A whole file, header and all.
pub fn whole(bytes: &[u8]) -> bool {
    decode::<MachineState>(bytes).is_ok()
}
