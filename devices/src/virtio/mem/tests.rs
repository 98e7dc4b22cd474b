//! Honest and hostile drivers, on plain memory.

mod conformance;

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;
use crate::memory::Bytes;
use crate::testing::{HIGH, Harness, REGION};

/// Where the region begins: part of it is the second region of the test's guest, whose first block is the driver's.
const START: u64 = HIGH;
/// Blocks of the region that are memory of the test's guest.
const THERE: u64 = REGION / BLOCK;

const ACK: Option<(u16, u16)> = Some((0, 0));
const NACK: Option<(u16, u16)> = Some((1, 0));
const BUSY: Option<(u16, u16)> = Some((2, 0));
const ERROR: Option<(u16, u16)> = Some((3, 0));

fn build(size_mib: u64) -> Box<dyn VirtioDevice> {
    Config { size_mib, address: START }.build(&mut HashMap::new()).unwrap()
}

/// A running device of 128 MiB that is asked to have so many blocks of so many usable ones, its configuration and its
/// counters by name.
fn start(usable: u64, requested: u64) -> (Harness, Arc<ConfigSpace>, impl Fn(&str) -> u64 + use<>) {
    let device = build(128);
    let (config, counters) = (device.config().unwrap(), device.counters());
    request(&config, usable * BLOCK, requested * BLOCK);
    let count = move |name: &str| counters.iter().find(|c| c.name() == name).unwrap().get();
    (Harness::new(device), config, count)
}

fn bytes_of(kind: u16, address: u64, blocks: u16) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0xff; 6], &address.to_le_bytes(), &blocks.to_le_bytes(), &[0xff; 6]].concat()
}

/// Asks; `None` if the request is given back unanswered.
fn ask(vm: &mut Harness, kind: u16, address: u64, blocks: u16) -> Option<(u16, u16)> {
    let posted = vm.driver(0).post(&[&bytes_of(kind, address, blocks)], &[10]);
    vm.kick(0);
    let (head, len) = vm.driver(0).take().unwrap();
    assert_eq!(head, posted.head);
    assert!(!vm.asked_for_reset());
    let answer = vm.driver(0).written(&posted);
    assert!(answer[2..8] == [0; 6]);
    (len == 10)
        .then(|| (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]])))
}

/// Asks about blocks by their numbers.
fn ask_of(vm: &mut Harness, kind: u16, first: u64, blocks: u16) -> Option<(u16, u16)> {
    ask(vm, kind, START + first * BLOCK, blocks)
}

#[test]
fn the_configuration_says_what_there_is_and_the_driver_changes_none_of_it() {
    let device = build(256);
    let config = device.config().unwrap();
    request(&config, 128 << 20, (64 << 20) + 4096);
    config.write(0, &[0xff; CONFIG_SIZE]);
    let mut bytes = [0; CONFIG_SIZE];
    config.read(0, &mut bytes);
    let fields = [0, 8, 16, 24, 32, 40, 48].map(|offset| get(&bytes, offset));
    assert_eq!(fields, [BLOCK, 0, START, 256 << 20, 128 << 20, 0, 64 << 20]);
    request(&config, 128 << 20, 256 << 20);
    assert_eq!(standing(&config).requested, 128 << 20, "no more than is usable");
    assert_eq!((device.features(), device.queues()), (F_UNPLUGGED_INACCESSIBLE, &[64][..]));
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested() {
    let (mut vm, config, count) = start(64, 3);
    assert_eq!(ask_of(&mut vm, PLUG, 0, 4), NACK);
    assert_eq!(ask_of(&mut vm, PLUG, 62, 2), ACK);
    assert_eq!(ask_of(&mut vm, PLUG, 62, 1), ERROR, "it is plugged");
    assert_eq!(ask_of(&mut vm, PLUG, 60, 2), NACK);
    assert_eq!(ask_of(&mut vm, PLUG, 0, 1), ACK);
    assert_eq!(ask_of(&mut vm, PLUG, 1, 1), NACK);
    assert_eq!(standing(&config).plugged, 3 * BLOCK);
    assert_eq!((count("plugged_blocks"), count("refused_requests")), (3, 4));
    // The host wants some of it back, and the driver keeps it.
    request(&config, 64 * BLOCK, BLOCK);
    assert_eq!(ask_of(&mut vm, PLUG, 1, 1), NACK);
    assert_eq!(standing(&config).plugged, 3 * BLOCK);
}

#[test]
fn unplugging_gives_back_exactly_the_pages_of_the_blocks() {
    let (mut vm, config, count) = start(THERE, THERE);
    assert_eq!(ask_of(&mut vm, PLUG, 0, 4), ACK);
    let pages = [BLOCK - 4096, BLOCK, 2 * BLOCK - 4096, 2 * BLOCK, 3 * BLOCK - 4096, 3 * BLOCK];
    let at = |offset: u64| GuestAddress(START + offset);
    for page in pages {
        vm.memory().write_slice(&[0xaa; 4096], at(page)).unwrap();
    }
    assert_eq!(ask_of(&mut vm, UNPLUG, 1, 2), ACK);
    let left = pages.map(|page| vm.memory().read_obj::<u8>(at(page)).unwrap());
    assert_eq!(left, [0xaa, 0, 0, 0, 0, 0xaa]);
    assert_eq!((standing(&config).plugged, count("unplugged_blocks")), (2 * BLOCK, 2));
    assert_eq!(ask_of(&mut vm, UNPLUG, 1, 1), ERROR, "it is gone");
    assert_eq!(ask_of(&mut vm, UNPLUG, 0, 2), ERROR, "half of it is");
    assert_eq!(standing(&config).plugged, 2 * BLOCK);
    assert_eq!(ask_of(&mut vm, PLUG, 1, 2), ACK);
}

#[test]
fn unplugging_everything_gives_back_what_was_never_plugged_too() {
    let (mut vm, config, count) = start(0, 0);
    assert_eq!(ask(&mut vm, UNPLUG_ALL, 0, 0), ACK, "there is nothing");
    request(&config, THERE * BLOCK, THERE * BLOCK);
    assert_eq!(ask_of(&mut vm, PLUG, 2, 1), ACK);
    let touched = GuestAddress(START + 3 * BLOCK);
    vm.memory().write_obj(7u8, touched).unwrap();
    // The driver's own buffers go with it: what it reads of the answer is not looked at.
    let rings = vm.driver(0).post(&[&bytes_of(UNPLUG_ALL, u64::MAX, u16::MAX)], &[10]);
    vm.kick(0);
    assert_eq!(vm.driver(0).take(), Some((rings.head, 10)));
    assert_eq!(vm.memory().read_obj::<u8>(touched).unwrap(), 0);
    assert_eq!((standing(&config).plugged, count("unplugged_blocks")), (0, 1));
}

#[test]
fn the_state_of_blocks_is_told() {
    let (mut vm, _, _) = start(64, 64);
    assert_eq!(ask_of(&mut vm, PLUG, 4, 4), ACK);
    for (first, blocks, state) in [(4, 4, 0), (5, 1, 0), (0, 4, 1), (8, 56, 1), (0, 64, 2), (3, 2, 2)] {
        assert_eq!(ask_of(&mut vm, STATE, first, blocks), Some((0, state)), "{first}+{blocks}");
    }
}

#[test]
fn blocks_that_there_are_not_are_an_error_whatever_is_asked_of_them() {
    let (mut vm, config, _) = start(8, 8);
    let ends = START + 8 * BLOCK;
    let nonsense = [
        (START - BLOCK, 1),
        (0, 1),
        (START + 4096, 1),
        (START + 1, 1),
        (START, 0),
        (ends, 1),
        (ends - BLOCK, 2),
        (START, 9),
        (START, u16::MAX),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
    ];
    for (address, blocks) in nonsense {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(ask(&mut vm, kind, address, blocks), ERROR, "{kind} {address:#x}+{blocks}");
        }
    }
    for kind in [4, 5, u16::MAX] {
        assert_eq!(ask(&mut vm, kind, START, 1), ERROR);
    }
    assert_eq!(standing(&config).plugged, 0);
}

#[test]
fn requests_that_are_cut_short_or_cannot_be_answered_are_not_carried_out() {
    let (mut vm, config, _) = start(8, 8);
    let whole = bytes_of(PLUG, START, 1);
    for (request, answer) in [(&whole[..23], 10), (&whole[..], 9), (&whole[..], 0), (&[][..], 10)] {
        let posted = vm.driver(0).post(&[request], &[answer]);
        vm.kick(0);
        assert_eq!(vm.driver(0).take(), Some((posted.head, 0)));
    }
    assert_eq!(standing(&config).plugged, 0);
    // In pieces it is the same request.
    let posted = vm.driver(0).post(&[&whole[..3], &whole[3..]], &[1, 9]);
    vm.kick(0);
    assert_eq!(vm.driver(0).take(), Some((posted.head, 10)));
    assert_eq!(standing(&config).plugged, BLOCK);
}

#[test]
fn what_the_host_cannot_take_back_stays_plugged() {
    let (mut vm, config, _) = start(64, 64);
    // All of it is the driver's for the asking, but the test's guest has no memory there.
    assert_eq!(ask_of(&mut vm, PLUG, THERE, 2), ACK);
    assert_eq!(ask_of(&mut vm, UNPLUG, THERE, 2), BUSY);
    assert_eq!(standing(&config).plugged, 2 * BLOCK);
}

#[test]
fn a_reset_leaves_memory_as_it_is() {
    let (mut vm, config, _) = start(8, 8);
    assert_eq!(ask_of(&mut vm, PLUG, 2, 3), ACK);
    let mut vm = Harness::new(vm.reset());
    assert_eq!(standing(&config).plugged, 3 * BLOCK);
    assert_eq!(ask_of(&mut vm, STATE, 2, 3), Some((0, 0)));
}

#[test]
fn a_saved_device_goes_on_and_a_made_up_one_is_refused() {
    let (mut vm, _, _) = start(32, 16);
    assert_eq!(ask_of(&mut vm, PLUG, 9, 5), ACK);
    let saved = vm.reset().state();
    let DeviceState::Mem(state) = saved.clone() else { panic!("{saved:?}") };
    let mut other = build(128);
    other.restore(&saved).unwrap();
    assert_eq!(other.state(), saved);
    let standing = standing(&other.config().unwrap());
    assert_eq!((standing.usable, standing.requested), (32 * BLOCK, 16 * BLOCK));
    assert_eq!((standing.plugged, standing.region), (5 * BLOCK, 128 << 20));

    let bits = |len, at: usize, byte| {
        let mut bits = vec![0; len];
        bits[at] = byte;
        bits
    };
    for wrong in [
        State { region: 256 << 20, ..state.clone() },
        State { usable: (128 << 20) + BLOCK, ..state.clone() },
        State { usable: u64::MAX, ..state.clone() },
        State { usable: 4096, requested: 0, plugged: vec![0; 8], ..state.clone() },
        State { usable: 13 * BLOCK, requested: 0, ..state.clone() },
        State { requested: 33 * BLOCK, ..state.clone() },
        State { requested: 1, ..state.clone() },
        State { plugged: bits(9, 0, 1), ..state.clone() },
        State { plugged: Vec::new(), ..state.clone() },
        State { plugged: bits(8, 4, 1), ..state.clone() },
    ] {
        assert!(build(128).restore(&DeviceState::Mem(wrong.clone())).is_err(), "{wrong:?}");
    }
    assert!(build(128).restore(&DeviceState::Rng(crate::virtio::rng::State {})).is_err());
}

#[test]
fn regions_are_whole_steps_and_placed_by_the_machine() {
    let build = |size_mib, address| Config { size_mib, address }.build(&mut HashMap::new()).map(drop);
    for size in [0, 64, 129, MAX_MIB + STEP_MIB, u64::MAX] {
        let error = build(size, START).unwrap_err().to_string();
        assert!(error.contains("size_mib") && error.contains("multiple of 128"), "{error}");
    }
    build(MAX_MIB, START).unwrap();
    assert_eq!(MAX_BITS as u64 * 8 * BLOCK, MAX_MIB << 20);
    let placed = serde_json::from_str::<Config>(r#"{"size_mib":128}"#).unwrap();
    let error = build(128, placed.address).unwrap_err().to_string();
    assert!(error.contains("before the machine starts"), "{error}");
    assert!(serde_json::from_str::<Config>(r#"{"size_mib":128,"address":4294967296}"#).is_err());
}

proptest! {
    #[test]
    fn every_answer_is_the_models(
        requested in 0u64..=64,
        requests in prop::collection::vec((0u16..5, -2i64..70, 0u16..12, any::<bool>()), 1..60),
    ) {
        let (mut vm, config, _) = start(64, requested);
        let mut model = BTreeSet::new();
        for (kind, first, blocks, aligned) in requests {
            // What the test's guest has no memory for, and its driver's own buffers, are not taken away.
            let kind = if matches!(kind, UNPLUG | UNPLUG_ALL) { STATE } else { kind };
            let address = START.wrapping_add_signed(first * BLOCK as i64) + if aligned { 0 } else { 4096 };
            let range = first..first + i64::from(blocks);
            let inside = aligned && blocks > 0 && range.start >= 0 && range.end <= 64 && kind <= STATE;
            let plugged = range.clone().filter(|block| model.contains(block)).count();
            let expected = match kind {
                _ if !inside => ERROR,
                PLUG if plugged > 0 => ERROR,
                PLUG if model.len() + usize::from(blocks) > requested as usize => NACK,
                PLUG => { model.extend(range); ACK }
                _ if plugged == usize::from(blocks) => Some((0, 0)),
                _ if plugged == 0 => Some((0, 1)),
                _ => Some((0, 2)),
            };
            prop_assert_eq!(ask(&mut vm, kind, address, blocks), expected);
            prop_assert_eq!(standing(&config).plugged, model.len() as u64 * BLOCK);
        }
    }
}
