//! The requirements of VIRTIO 1.2 §5.15 on a memory device, by their numbers in the tables.

use super::*;
use crate::testing::pci::PciDriver;

/// What the driver reads: block size, node, address, region, usable, plugged, requested.
fn fields(config: &ConfigSpace) -> [u64; 7] {
    let mut bytes = [0; CONFIG_SIZE];
    config.read(0, &mut bytes);
    [0, 8, 16, 24, 32, 40, 48].map(|offset| get(&bytes, offset))
}

#[test]
fn c_182_c_184_c_187_a_request_keeps_to_whole_blocks_and_takes_nothing_usable_away() {
    let config = build(128).config().unwrap();
    let region = 64 * BLOCK;
    assert_eq!(fields(&config), [BLOCK, 0, START, region, 0, 0, 0]);
    // What is asked for, then what is usable and requested of it.
    for (usable, requested, shown) in [
        (8 * BLOCK, 4 * BLOCK, [8 * BLOCK, 4 * BLOCK]),
        (4 * BLOCK, 2 * BLOCK, [8 * BLOCK, 2 * BLOCK]),
        (0, 0, [8 * BLOCK, 0]),
        (0, 6 * BLOCK, [8 * BLOCK, 6 * BLOCK]),
        (9 * BLOCK + 1, 9 * BLOCK + 1, [9 * BLOCK, 9 * BLOCK]),
        (u64::MAX, u64::MAX, [region, region]),
        (0, 1, [region, 0]),
    ] {
        request(&config, usable, requested);
        let [usable, requested] = shown;
        assert_eq!(fields(&config), [BLOCK, 0, START, region, usable, 0, requested]);
    }
}

#[test]
fn c_185_c_186_sizes_are_made_of_blocks_of_a_power_of_two() {
    assert!(BLOCK.is_power_of_two());
    for size_mib in [128, 256, MAX_MIB] {
        let config = build(size_mib).config().unwrap();
        request(&config, (size_mib << 20) - 4096, (size_mib << 20) - BLOCK - 1);
        let [block, _, rest @ ..] = fields(&config);
        assert_eq!(block, BLOCK);
        assert!(rest.iter().all(|value| value % block == 0), "{rest:x?}");
    }
    let config = |address| Config { size_mib: 128, address }.build(&mut HashMap::new());
    assert!(config(START + BLOCK).is_ok() && config(START + BLOCK / 2).is_err());
}

#[test]
fn c_188_a_driver_is_told_of_what_it_is_to_have() {
    let mut vm = PciDriver::new(build(128));
    vm.start(false);
    let change = |vm: &PciDriver, blocks: u64| {
        vm.function.change_config(|space| request(space, 8 * BLOCK, blocks * BLOCK)).unwrap();
    };
    let [before] = vm.read(vm.common, 0x15);
    change(&vm, 3);
    vm.sink.wait(0, 1);
    assert_eq!(u64::from_le_bytes(vm.read(vm.device.unwrap(), 48)), 3 * BLOCK, "it is there by then");
    let [after] = vm.read(vm.common, 0x15);
    assert_ne!(before, after);
    change(&vm, 1);
    vm.sink.wait(0, 2);
    vm.set_status(0);
    change(&vm, 2);
    assert_eq!(vm.sink.all_signals(), 2, "without a driver there is nobody to tell");
}

#[test]
fn c_189_c_190_a_reset_leaves_blocks_and_their_memory_as_they_are() {
    let (mut vm, config, _) = start(THERE, THERE);
    assert_eq!(ask_of(&mut vm, PLUG, 2, 2), ACK);
    let memory = Arc::clone(vm.memory());
    let at = |block: u64| GuestAddress(START + block * BLOCK);
    (2..4).for_each(|block| memory.write_slice(&[0x5a; 4096], at(block)).unwrap());
    let device = vm.reset();
    assert_eq!(standing(&config).plugged, 2 * BLOCK);
    for block in 2..4 {
        let mut page = [0; 4096];
        memory.read_slice(&mut page, at(block)).unwrap();
        assert_eq!(page, [0x5a; 4096]);
    }
    let mut vm = Harness::new(device);
    for (block, state) in [(1, 1), (2, 0), (3, 0)] {
        assert_eq!(ask_of(&mut vm, STATE, block, 1), Some((0, state)));
    }
}

#[test]
fn c_192_c_193_c_194_what_is_plugged_can_be_used_and_what_is_not_can_be_read() {
    for features in [0, F_UNPLUGGED_INACCESSIBLE] {
        let device = build(128);
        request(&device.config().unwrap(), THERE * BLOCK, THERE * BLOCK);
        assert!(device.accepts(features));
        let mut vm = Harness::with(device, features, false);
        let memory = Arc::clone(vm.memory());
        let page = |block: u64| {
            let mut bytes = [0xff; 4096];
            memory.read_slice(&mut bytes, GuestAddress(START + block * BLOCK + 4096)).unwrap();
            bytes
        };
        assert_eq!(page(3), [0; 4096], "usable and not plugged");
        assert_eq!(ask_of(&mut vm, PLUG, 1, 2), ACK);
        for block in 1..3 {
            memory.write_slice(&[0x33; 4096], GuestAddress(START + block * BLOCK + 4096)).unwrap();
        }
        assert_eq!(ask_of(&mut vm, PLUG, 3, 1), ACK);
        assert_eq!(ask_of(&mut vm, STATE, 0, 4), Some((0, 2)));
        assert_eq!([page(1), page(2)], [[0x33; 4096]; 2], "plugging and asking change nothing");
        assert_eq!(ask_of(&mut vm, UNPLUG, 2, 1), ACK);
        assert_eq!(page(1), [0x33; 4096], "nobody else's business");
        assert_eq!(page(2), [0; 4096], "gone, but there");
    }
}

#[test]
fn c_195_c_199_c_203_c_206_what_says_nothing_in_a_request_is_ignored() {
    for padding in [0, 1, 0x5a, 0xff] {
        for more in [0, 1, 100] {
            let (mut vm, config, _) = start(THERE, THERE);
            for (kind, plugged) in [(PLUG, 1), (STATE, 1), (UNPLUG, 0), (PLUG, 1), (UNPLUG_ALL, 0)] {
                let mut bytes = bytes_of(kind, START + BLOCK, 1);
                bytes[2..8].fill(padding);
                bytes[18..24].fill(padding);
                if kind == UNPLUG_ALL {
                    bytes[8..18].fill(padding);
                }
                bytes.extend(vec![padding; more]);
                let posted = vm.driver(0).post(&[&bytes], &[10]);
                vm.kick(0);
                assert_eq!(vm.driver(0).take(), Some((posted.head, 10)));
                if kind != UNPLUG_ALL {
                    // That one takes the block of the driver's own buffers, too.
                    assert_eq!(
                        vm.driver(0).written(&posted),
                        [0; 10],
                        "ACK to {kind}, padded with {padding}"
                    );
                }
                assert_eq!(standing(&config).plugged, plugged * BLOCK);
            }
        }
    }
}

#[test]
fn c_197_plugging_what_is_plugged_is_an_error_however_much_is_asked_for() {
    let (mut vm, config, _) = start(64, 3);
    assert_eq!(ask_of(&mut vm, PLUG, 10, 2), ACK);
    for (first, blocks) in [(10, 1), (11, 1), (9, 2), (10, 2), (11, 2), (8, 5), (0, 64)] {
        assert_eq!(ask_of(&mut vm, PLUG, first, blocks), ERROR, "{first}+{blocks}");
    }
    assert_eq!(ask_of(&mut vm, PLUG, 12, 2), NACK);
    assert_eq!(standing(&config).plugged, 2 * BLOCK);
}
