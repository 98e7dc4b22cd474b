//! The configuration access window (§4.1.4.9).

use super::machine;
use crate::pci::PciFunction;
use crate::testing::pci::{Block, PciDriver};

/// Points the window at `offset` of a block.
fn aim(vm: &mut PciDriver, bar: u8, offset: u32, len: u32) {
    let at = vm.window;
    let _ = vm.function.write_config(at + 4, &[bar]);
    let _ = vm.function.write_config(at + 8, &offset.to_le_bytes());
    let _ = vm.function.write_config(at + 12, &len.to_le_bytes());
}

fn data(vm: &PciDriver) -> [u8; 4] {
    vm.function.config()[vm.window + 16..][..4].try_into().unwrap()
}

fn write(vm: &mut PciDriver, bytes: &[u8]) {
    let at = vm.window + 16;
    let _ = vm.function.write_config(at, bytes);
}

fn at(block: Block, offset: u32) -> u32 {
    u32::try_from(block.offset).unwrap() + offset
}

#[test]
fn c_079_the_window_reads_and_writes_with_the_width_asked_for() {
    let (mut vm, _) = machine();
    let (device, common) = (vm.device.unwrap(), vm.common);
    for (len, expected) in [(1, [5, 0, 0, 0]), (2, [5, 6, 0, 0]), (4, [5, 6, 7, 8])] {
        aim(&mut vm, 0, at(device, 4), 4);
        write(&mut vm, &[0; 4]);
        write(&mut vm, &[5, 6, 7, 8]);
        let whole: [u8; 4] = vm.read(device, 4);
        assert_eq!(whole, [5, 6, 7, 8]);
        write(&mut vm, &[0; 4]);
        aim(&mut vm, 0, at(device, 4), len);
        write(&mut vm, &[5, 6, 7, 8]);
        assert_eq!(vm.read(device, 4), expected, "{len} bytes written");
    }
    aim(&mut vm, 0, at(common, 0x18), 2);
    assert_eq!(data(&vm)[..2], 8u16.to_le_bytes(), "size of queue 0");
    aim(&mut vm, 0, at(common, 0x14), 1);
    write(&mut vm, &[1]);
    assert_eq!(vm.status(), 1, "a write through the window is a write");
}

#[test]
fn c_079_the_window_starts_a_device_and_kicks_it() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(1 << 32));
    vm.set_up_vectors();
    let mut queue = vm.set_up_queue(0, false);
    let (common, notify) = (vm.common, vm.notify);
    aim(&mut vm, 0, at(common, 0x14), 1);
    write(&mut vm, &[15]);
    queue.post(&[b"ping"], &[4]);
    aim(&mut vm, 0, at(notify, 0), 2);
    write(&mut vm, &[0, 0]);
    vm.sink.wait(1, 1);
    assert_eq!(queue.used_index(), 1);
}

#[test]
fn c_080_a_window_that_points_nowhere_does_nothing() {
    let (mut vm, _) = machine();
    let device = vm.device.unwrap();
    let target = at(device, 4);
    aim(&mut vm, 0, target, 4);
    let bad = [
        (1, target, 4),
        (6, target, 4),
        (7, target, 4),
        (255, target, 4),
        (0, target, 0),
        (0, target, 3),
        (0, target, 8),
        (0, target, 1 << 31),
        (0, target + 1, 2),
        (0, 0x6000, 4),
        (0, 0x8000, 4),
        (0, u32::MAX - 3, 4),
    ];
    for (bar, offset, len) in bad {
        aim(&mut vm, bar, offset, len);
        write(&mut vm, &[0xee; 4]);
        let bytes: [u8; 12] = vm.read(device, 0);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "bar {bar} {offset:#x}+{len}");
    }
}

#[test]
fn the_window_shows_interrupt_status_without_clearing_it() {
    let (mut vm, _) = machine();
    vm.start(false);
    vm.function.notify_config_changed();
    let isr = vm.isr;
    for _ in 0..2 {
        aim(&mut vm, 0, at(isr, 0), 1);
        assert_eq!(data(&vm)[0], 2);
    }
    assert_eq!(vm.read(isr, 0), [2]);
}
