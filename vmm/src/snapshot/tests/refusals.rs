//! What a person is told when a machine cannot go on: the thing, and the way out.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use mvm_devices::transport::TransportError;

use super::*;
use crate::error;

const AGAIN: &str = "boot the machine instead, and save it again here";
const PROGRAM: &str =
    "go on with the mvm-vmm that saved it, or boot the machine and save it again with this one";
const CONTENTS_HINT: &str = "boot the machine instead, and save one with what is wanted in it";
const SIZE: &str = "configure as many CPUs and as much memory as it has, or boot the machine instead";
const HOST: &str = "go on on a host like the one it ran on, or boot the machine and save it again here";
const FILES: &str = "give the two files that were saved together";
const DEVICES: &str = "configure the devices it was saved with, in the order of their places; others can be attached once it runs";

/// Whether the program says exactly this, and this help.
fn assert_says(error: impl Into<error::Error>, because: &str, hint: &str) {
    let error = error.into();
    assert_eq!(error.to_string(), "cannot go on from the snapshot");
    assert_eq!(error::causes(&error).join(": "), because);
    assert_eq!(error.hint().as_deref(), Some(hint));
}

/// Whether a state that `change` was made to is refused like this.
fn assert_refused(change: impl FnOnce(&mut MachineState, &mut MachineConfig), because: &str, hint: &str) {
    let (mut state, mut config) = (sample(Vec::new()), config(&[]));
    change(&mut state, &mut config);
    let error = MachineState::read(&written(&state), &config, CONTENTS).unwrap_err();
    assert_says(error, because, hint);
}

#[test]
fn another_program_says_which() {
    let here = MachineState::PROGRAM;
    let why = format!("mvm-vmm 9.8.7 saved it, and this is {here}");
    assert_refused(|state, _| state.program = "9.8.7".into(), &why, PROGRAM);
}

#[test]
fn another_format_says_which() {
    let file = written(&sample(Vec::new()));
    std::os::unix::fs::FileExt::write_all_at(&file, &[77, 0, 0, 0], 8).unwrap();
    let error = MachineState::read(&file, &config(&[]), CONTENTS).unwrap_err();
    assert_says(error, "the state has format 77, and this program reads format 3", PROGRAM);
}

#[test]
fn other_contents_say_both() {
    let why = r#"in it is "another kernel", and "a kernel and an agent" is wanted"#;
    assert_refused(|state, _| state.contents = "another kernel".into(), why, CONTENTS_HINT);
    let why = r#"in it is "\u{1b}[2J\n", and "a kernel and an agent" is wanted"#;
    assert_refused(|state, _| state.contents = "\x1b[2J\n".into(), why, CONTENTS_HINT);
}

#[test]
fn another_size_says_all_of_it() {
    let why = "it has 2 CPUs and 4 MiB, and 3 CPUs and 4 MiB are wanted";
    assert_refused(|_, config| config.cpus = 3.try_into().unwrap(), why, SIZE);
    let why = "it has 2 CPUs and 4 MiB, and 2 CPUs and 8 MiB are wanted";
    assert_refused(|_, config| config.memory = 8.try_into().unwrap(), why, SIZE);
    let why = "it has 0 CPUs and 4 MiB, and 2 CPUs and 4 MiB are wanted";
    assert_refused(|state, _| state.vcpus.clear(), why, SIZE);
    let why = "it has 2 CPUs and 18446744073709551615 MiB, and 2 CPUs and 4 MiB are wanted";
    assert_refused(|state, _| state.memory_mib = u64::MAX, why, SIZE);
}

#[test]
fn other_devices_say_which() {
    let rng = || serde_json::from_str(r#"{"type":"rng"}"#).unwrap();
    let why = "it has 0 devices, and 1 are configured";
    assert_refused(|_, config| config.devices.push(rng()), why, DEVICES);
    let why = "a serial port must be there before and after, or neither";
    assert_refused(|_, config| config.serial = None, why, DEVICES);
    assert_refused(|state, _| state.serial = None, why, DEVICES);
    let kind = Error::DeviceKind { place: 3, saved: "block".into(), configured: "net" };
    assert_says(kind, "its device 3 is a block, and a net is configured for it", DEVICES);
    let source = TransportError::State("number of vectors");
    let device = Error::Device { place: 4, kind: "block", source };
    let why = "cannot restore device 4, a block: saved state does not fit the device: number of vectors";
    assert_says(device, why, DEVICES);
}

#[test]
fn a_device_of_the_configuration_is_named_and_helped_with() {
    let source = Box::new(Error::DeviceKind { place: 3, saved: "block".into(), configured: "net" }.into());
    let error = error::Error::Configured { index: 2, source };
    let because = error::causes(&error).join(": ");
    assert_eq!(error.to_string(), "cannot attach device 2 of the configuration");
    let why = "cannot go on from the snapshot: its device 3 is a block, and a net is configured for it";
    assert_eq!((because.as_str(), error.hint().as_deref()), (why, Some(DEVICES)));
}

#[test]
fn another_processor_says_both_and_missing_features_say_which() {
    let facts = |text: &str| serde_json::from_str::<HostFacts>(text).unwrap();
    let saved = facts(r#"{"vendor":"GenuineIntel","signature":788209,"telling":[],"kernel":"6.1 #1"}"#);
    let other = facts(r#"{"vendor":"AuthenticAMD","signature":10620688,"telling":[],"kernel":"6.1 #1"}"#);
    let error = saved.admits(&other, &[], || panic!("KVM was asked")).unwrap_err();
    let why = "it ran on GenuineIntel family 6 model 207 stepping 1, and this host's CPU is AuthenticAMD family 25 model 33 stepping 0";
    assert_says(error, why, HOST);

    let newer = facts(r#"{"vendor":"GenuineIntel","signature":788209,"telling":[],"kernel":"6.12 #1"}"#);
    let leaf = |ebx| kvm_cpuid_entry2 { function: 7, ebx, ..Default::default() };
    let offered = || Ok(CpuId::from_entries(&[leaf(1)]).unwrap());
    let error = saved.admits(&newer, &[leaf(0x21)], offered).unwrap_err();
    let why = "its CPU has features that KVM does not offer here (CPUID leaf 0x7, EBX: 0x20)";
    assert_says(error, why, HOST);
    saved.admits(&newer, &[leaf(1)], offered).unwrap();

    let clock = Error::TscFrequency { saved: 2_000_000, here: 2_600_000 };
    let why = "its time stamp counter runs at 2000000 kHz, this host's at 2600000 kHz and cannot be scaled";
    assert_says(clock, why, HOST);
    assert_says(Error::Register { index: 0x174, value: 5 }, "KVM does not take 0x5 for register 0x174", HOST);
}

#[test]
fn what_is_no_state_says_so() {
    let read = |bytes: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
        MachineState::read(&file, &config(&[]), CONTENTS).unwrap_err()
    };
    assert_says(read(b""), "the state is no saved machine", AGAIN);
    assert_says(read(&[0x7f; 4096]), "the state is no saved machine", AGAIN);
    let mut cut = b"mvm-snap\x03\0\0\0".to_vec();
    cut.extend([0; 4]);
    cut.extend(9u64.to_le_bytes());
    assert_says(read(&cut), "the state is damaged: it does not have the length it claims", AGAIN);
    cut[16] = 0;
    assert_says(read(&cut), "the state is damaged: its checksum is another", AGAIN);
    let long = tempfile::tempfile().unwrap();
    long.set_len(1 << 40).unwrap();
    let error = MachineState::read(&long, &config(&[]), CONTENTS).unwrap_err();
    assert_says(error, "the state is damaged: it is longer than any state", AGAIN);
}

#[test]
fn memory_that_is_another_machines_or_cut_says_so() {
    let (_, file) = saved_memory();
    let map = |size: MemSize, id| pages::map(size, file.try_clone().unwrap(), None, id).unwrap_err();
    let fit = "the memory does not fit the state: ";
    assert_says(map(size(), &[0; 16]), &format!("{fit}it is of another snapshot"), FILES);
    let wrong = format!("{fit}it is no file of the right size");
    assert_says(map(8.try_into().unwrap(), &ID), &wrong, FILES);
    for length in [0, 1, 4 << 20, (4 << 20) + 4095, (4 << 20) + 4097, 1 << 40] {
        file.set_len(length).unwrap();
        assert_says(map(size(), &ID), &wrong, FILES);
    }
    let pipe = File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().0));
    assert_says(pages::map(size(), pipe, None, &ID).unwrap_err(), &wrong, FILES);
    let directory = File::open("/").unwrap();
    assert_says(pages::map(size(), directory, None, &ID).unwrap_err(), &wrong, FILES);
}
