//! Files that somebody changed: refused, or as good as what was written; never more than what they may cost.

use std::os::unix::fs::FileExt;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};
use proptest::prelude::*;
use serde::Serialize;

use super::*;
use crate::pci_bus::tests::pairs::Machine;
use crate::snapshot::format::{MAX_BYTES, decode, encode, seal};

/// Bytes before the value.
const HEADER: usize = 24;
/// Set in a process that may only have so much memory.
const BOUNDED: &str = "MVM_TEST_BOUNDED";
/// Most data of such a process. A state has 2 MiB at most.
const MOST_DATA: u64 = 32 << 20;

/// A whole file with devices of each kind.
fn file() -> Vec<u8> {
    encode(&sample(Machine::running(["block", "net"]).save())).unwrap()
}

#[test]
fn every_bit_every_cut_and_every_addition_is_noticed() {
    let good = file();
    decode::<MachineState>(&good).unwrap();
    let mut changed = good.clone();
    for at in 0..good.len() {
        for bit in 0..8 {
            changed[at] ^= 1 << bit;
            decode::<MachineState>(&changed).unwrap_err();
            changed[at] ^= 1 << bit;
        }
        decode::<MachineState>(&good[..at]).unwrap_err();
    }
    for more in [&[0][..], &[0xff; 8], &[0; 4096], &good] {
        decode::<MachineState>(&[&good[..], more].concat()).unwrap_err();
    }
}

/// The file with its value changed, as one who knows the format would leave it.
fn sealed(value: &[u8]) -> Vec<u8> {
    seal([&[0; HEADER], value].concat())
}

/// What becomes of a machine of such a file, short of KVM: whether it was refused.
fn refused(bytes: &[u8]) -> bool {
    let Ok(state) = decode::<MachineState>(bytes) else { return true };
    // What was understood can be written, and is understood in the same way.
    let again = encode(&state).unwrap();
    assert_eq!(encode(&decode::<MachineState>(&again).unwrap()).unwrap(), again);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let Ok(state) = MachineState::read(&file, &config(&state.functions), CONTENTS) else { return true };
    assert!(state.vcpus.len() == 2 && state.functions.len() < 32);
    let mut machine = Machine::empty();
    !state.functions.iter().all(|function| machine.takes(function))
}

#[test]
fn a_changed_bit_with_a_right_checksum_is_refused_or_makes_a_machine() {
    let good = file();
    assert_eq!(sealed(&good[HEADER..]), good);
    let mut count = 0;
    // The virtual CPUs come first and are KVM's to judge; here they only have to be understood.
    for at in HEADER..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 1 << (at % 8);
        count += usize::from(refused(&sealed(&changed[HEADER..])));
    }
    assert!(count > 0 && count < good.len() - HEADER, "{count}: it tells something from nothing");
}

#[test]
fn a_cut_value_with_a_right_checksum_is_refused() {
    let good = file();
    for length in HEADER..good.len() {
        decode::<MachineState>(&sealed(&good[HEADER..length])).unwrap_err();
    }
    for more in [1, 2, 3, 100] {
        let longer = [&good[HEADER..], &vec![0; more]].concat();
        decode::<MachineState>(&sealed(&longer)).unwrap_err();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]
    #[test]
    fn changes_at_random_with_a_right_checksum_are_refused_or_make_a_machine(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..24),
    ) {
        let mut value = file().split_off(HEADER);
        let length = value.len();
        changes.iter().for_each(|(at, byte)| value[at.index(length)] = *byte);
        refused(&sealed(&value));
    }
}

/// A virtual CPU in the fewest bytes: what KVM gives is cut, which is understood as zeroes.
#[derive(Clone, Default, Serialize)]
struct Cpu {
    cpuid: Vec<&'static str>,
    tsc_khz: u32,
    moment: (u64, Option<u64>, u64),
    mp_state: &'static str,
    regs: &'static str,
    sregs: &'static str,
    xsave: Vec<u32>,
    xcrs: &'static str,
    debug: &'static str,
    lapic: &'static str,
    msrs: Vec<&'static str>,
    events: &'static str,
}

/// A state whose virtual CPUs are these.
fn made_of(vcpus: Vec<Cpu>) -> Vec<u8> {
    let whole = sample(Vec::new());
    let head = (whole.id, whole.program, whole.contents, whole.memory_mib, whole.host);
    let bytes = encode(&(head, vcpus, Vec::<u8>::new(), None::<u8>)).unwrap();
    assert!(bytes.len() as u64 <= MAX_BYTES);
    bytes
}

#[test]
fn no_file_costs_more_than_a_few_times_its_size() {
    if std::env::var_os(BOUNDED).is_none() {
        let this = std::env::current_exe().unwrap();
        let name = "snapshot::tests::flips::no_file_costs_more_than_a_few_times_its_size";
        let output = Command::new(this).args([name, "--exact"]).env(BOUNDED, "").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
        return;
    }
    let many = 1_900_000;
    let cpus = made_of(vec![Cpu::default(); 110_000]);
    let leaves = made_of(vec![Cpu { cpuid: vec![""; many], ..Cpu::default() }]);
    let registers = made_of(vec![Cpu { msrs: vec![""; many], ..Cpu::default() }]);
    let words = made_of(vec![Cpu { xsave: vec![0; many], ..Cpu::default() }]);
    let files = [cpus, leaves, registers, words].map(|bytes| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        file
    });
    let (mut lie, at) = (file(), HEADER + ID.len());
    lie.splice(at..=at, [0xff, 0xff, 0xff, 0xff, 0x0f]);
    setrlimit(Resource::RLIMIT_DATA, MOST_DATA, MOST_DATA).unwrap();
    for file in files {
        let error = MachineState::read(&file, &config(&[]), CONTENTS).unwrap_err();
        assert!(matches!(error, Error::Decode(_)), "{error}");
    }
    // A length alone costs nothing.
    decode::<MachineState>(&sealed(&lie[HEADER..])).unwrap_err();
}

#[test]
fn memory_whose_last_page_was_changed_is_another_machines() {
    let (_, file) = saved_memory();
    let map = || pages::map(size(), file.try_clone().unwrap(), None, &ID);
    map().unwrap();
    let mut last = [0; 32];
    file.read_exact_at(&mut last, 4 << 20).unwrap();
    for at in 0..last.len() {
        for bit in 0..8 {
            let mut changed = last;
            changed[at] ^= 1 << bit;
            file.write_all_at(&changed, 4 << 20).unwrap();
            assert!(matches!(map(), Err(Error::Memory(_))), "byte {at}");
        }
    }
}

#[test]
fn memory_with_holes_anywhere_is_what_it_says() {
    use mvm_devices::memory::{Bytes, GuestAddress};
    use nix::fcntl::{FallocateFlags, fallocate};
    let (memory, file) = saved_memory();
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, 0x10_0000, 4096).unwrap();
    let (mapped, backed) = pages::map(size(), file.try_clone().unwrap(), None, &ID).unwrap();
    let read = |memory: &Memory, at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    assert_eq!([0, 0x10_0000, 0x3f_f000].map(|at| read(&mapped, at)), [1, 0, 0x3f_f001]);
    assert_eq!(read(&memory, 0x10_0000), 0x10_0001, "the machine that was saved has its own");
    let second = tempfile::tempfile().unwrap();
    let written = pages::save(&mapped, &backed, None, &ID, &second).unwrap();
    assert_eq!(written, 3 * 4096, "a hole stays one");
}
