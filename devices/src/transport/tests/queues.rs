//! Queue registers, activation and kicks (§4.1.4.3, §4.1.5.1.3).

use super::{SIZES, count, machine, registers};
use crate::ring::RingState;
use crate::testing::pci::PciDriver;
use crate::testing::{HIGH, REGION};

const VERSION_1: u64 = 1 << 32;

/// Programs queue 0 with these registers and says `DRIVER_OK`.
fn activate(vm: &mut PciDriver, ring: RingState) {
    assert!(vm.negotiate(VERSION_1));
    vm.set_up_vectors();
    vm.set16(0x16, 0);
    vm.set16(0x18, ring.size);
    for (at, address) in [(0x20u64, ring.descriptors), (0x28, ring.available), (0x30, ring.used)] {
        vm.write(vm.common, at, &address.to_le_bytes());
    }
    vm.set16(0x1c, 1);
    vm.set_status(15);
}

/// Where queue 0's rings can be.
const GOOD: RingState = RingState {
    size: 8,
    descriptors: 0x10_0000,
    available: 0x11_0000,
    used: 0x12_0000,
    next_available: 0,
    next_used: 0,
};

#[test]
fn c_069_t_05_a_queue_that_does_not_exist_has_size_zero_and_ignores_writes() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(VERSION_1));
    let before = registers(&mut vm);
    let queues = u16::try_from(SIZES.len()).unwrap();
    for select in [queues, queues + 1, 0x0100, 0x8000, 0xffff] {
        vm.set16(0x16, select);
        assert_eq!(vm.get16(0x16), select);
        for (at, value) in [(0x18, 4), (0x1a, 0), (0x1c, 1)] {
            vm.set16(at, value);
        }
        for at in (0x20..0x38).step_by(4) {
            vm.set32(at, 0x1000);
        }
        assert_eq!((vm.get16(0x18), vm.get16(0x1a), vm.get16(0x1c)), (0, 0xffff, 0));
        assert_eq!((vm.get32(0x20), vm.get32(0x28), vm.get32(0x30)), (0, 0, 0));
    }
    assert_eq!(registers(&mut vm), before);
}

#[test]
fn t_05_a_wide_select_selects_nothing() {
    let (mut vm, _) = machine();
    vm.set16(0x16, 1);
    vm.set32(0x16, 0x1_0000);
    vm.write(vm.common, 0x16, &[2]);
    assert_eq!(vm.get16(0x16), 1, "only 16-bit accesses reach the register");
}

#[test]
fn c_070_c_072_a_size_that_is_no_power_of_two_or_too_large_is_ignored() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(VERSION_1));
    vm.set16(0x16, 1);
    vm.set16(0x18, 4);
    for size in [0, 3, 5, 17, 32, 0x8000, 0xffff] {
        vm.set16(0x18, size);
        assert_eq!(vm.get16(0x18), 4, "after writing {size}");
    }
    for value in [0, 2, 0xffff] {
        vm.set16(0x1c, value);
        assert_eq!(vm.get16(0x1c), 0, "after enabling with {value}");
    }
}

#[test]
fn c_071_there_is_no_reset_of_single_queues() {
    let (mut vm, _) = machine();
    vm.start(false);
    vm.set16(0x3a, 1);
    assert_eq!(vm.get16(0x3a), 0);
    assert_eq!(vm.offered() & (1 << 40), 0);
    vm.set16(0x16, 0);
    assert_eq!(vm.get16(0x1c), 1);
}

#[test]
fn c_072_t_10_to_t_14_a_running_device_has_its_queue_registers_frozen() {
    let (mut vm, log) = machine();
    let mut queues = vm.start(false);
    let before = registers(&mut vm);
    for queue in 0..4 {
        vm.set16(0x16, queue);
        for (at, value) in [(0x18u64, 2u16), (0x18, 0), (0x1c, 0), (0x1c, 1)] {
            vm.set16(at, value);
            assert_eq!(registers(&mut vm), before, "16-bit write of {value} at {at:#x}");
        }
        for at in (0x20..0x38).step_by(4) {
            vm.set32(at, 0xdead_0000);
            assert_eq!(registers(&mut vm), before, "write at {at:#x}");
        }
        let posted = queues[0].post(&[b"ping"], &[4]);
        vm.settle();
        assert_eq!(queues[0].take(), Some((posted.head, 4)));
    }
    assert_eq!(log.served(), 4);
}

#[test]
fn c_072_an_enabled_queue_is_frozen_already_before_driver_ok() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(VERSION_1));
    vm.set_up_queue(0, false);
    let before = registers(&mut vm);
    vm.set16(0x18, 2);
    vm.set16(0x1c, 0);
    vm.set32(0x20, 0);
    vm.set32(0x34, 1);
    assert_eq!(registers(&mut vm), before);
}

#[test]
fn c_072_a_queue_that_was_left_disabled_stays_so_while_the_device_runs() {
    let (mut vm, log) = machine();
    assert!(vm.negotiate(VERSION_1));
    vm.set_up_queue(1, false);
    vm.set_status(15);
    let before = registers(&mut vm);
    let mut queue = vm.set_up_queue(0, false);
    vm.set16(0x18, 2);
    vm.set16(0x1a, 0xffff);
    assert_eq!(registers(&mut vm), before);
    queue.post(&[b"ping"], &[4]);
    vm.kick(0);
    vm.settle();
    assert_eq!((log.served(), queue.used_index()), (0, 0));
}

#[test]
fn queue_registers_are_closed_before_features_ok() {
    let (mut vm, _) = machine();
    let before = registers(&mut vm);
    for status in [0, 1, 3] {
        vm.set_status(status);
        vm.set16(0x16, 0);
        vm.set16(0x18, 2);
        vm.set16(0x1c, 1);
        vm.set32(0x20, 0x1000);
        assert_eq!(registers(&mut vm), before, "in status {status}");
    }
}

#[test]
fn t_06_a_doorbell_that_does_not_exist_is_ignored_and_counted() {
    let (mut vm, log) = machine();
    vm.start(false);
    for queue in [3u16, 4, 100, 1023] {
        vm.kick(queue);
    }
    vm.write(vm.notify, 1, &[0, 0]);
    vm.write(vm.notify, 6, &[0, 0]);
    vm.settle();
    assert_eq!((count(&vm, "kicks_ignored"), log.served()), (6, 0));
}

#[test]
fn t_20_to_t_27_rings_that_cannot_be_used_are_not_used() {
    let aside = |change: fn(&mut RingState)| {
        let mut ring = GOOD;
        change(&mut ring);
        ring
    };
    let cases = [
        ("unaligned descriptors", aside(|r| r.descriptors += 8)),
        ("unaligned available", aside(|r| r.available += 1)),
        ("unaligned used", aside(|r| r.used += 2)),
        ("available over descriptors", aside(|r| r.available = r.descriptors + 0x70)),
        ("used over descriptors", aside(|r| r.used = r.descriptors + 0x7c)),
        ("used over available", aside(|r| r.used = r.available + 0x14)),
        ("all at zero", aside(|r| (r.descriptors, r.available, r.used) = (0, 0, 0))),
        ("outside of memory", aside(|r| r.descriptors = 1 << 40)),
        ("in the hole", aside(|r| r.used = REGION + 0x1000)),
        ("over the end of a region", aside(|r| r.descriptors = REGION - 0x70)),
        ("available over the end", aside(|r| r.available = REGION - 0x10)),
        ("used over the end", aside(|r| r.used = REGION - 0x40)),
        ("half in the hole", aside(|r| r.descriptors = HIGH - 0x10)),
        ("in the function's own BAR", aside(|r| r.used = crate::testing::pci::BAR_ADDRESS)),
        ("wrapping", aside(|r| r.descriptors = u64::MAX - 15)),
        ("available wrapping", aside(|r| r.available = u64::MAX - 1)),
        ("used wrapping", aside(|r| r.used = u64::MAX - 3)),
    ];
    for (name, ring) in cases {
        let (mut vm, log) = machine();
        activate(&mut vm, ring);
        assert_eq!(vm.status(), 15 | 64, "{name}");
        assert_eq!((log.starts(), vm.sink.signals(0)), (0, 1), "{name}: not started, and said so");
        vm.kick(0);
        vm.set_status(0);
        activate(&mut vm, GOOD);
        assert_eq!((vm.status(), log.starts()), (15, 1), "{name}: works after a reset");
    }
}

#[test]
fn rings_that_touch_without_sharing_a_byte_are_used() {
    let (mut vm, log) = machine();
    let descriptors = REGION - 8 * 16;
    activate(&mut vm, RingState { descriptors, available: descriptors - 22, used: HIGH, ..GOOD });
    assert_eq!((vm.status(), log.starts()), (15, 1));
}

#[test]
fn t_20_one_bad_queue_keeps_the_whole_device_from_starting() {
    let (mut vm, log) = machine();
    assert!(vm.negotiate(VERSION_1));
    vm.set_up_queue(0, false);
    vm.set16(0x16, 1);
    vm.set16(0x1c, 1);
    vm.set_status(15);
    assert_eq!((vm.status(), log.starts()), (15 | 64, 0), "queue 1 has all its rings at 0");
}

#[test]
fn t_28_no_queue_or_only_some_are_enough() {
    let (mut vm, log) = machine();
    assert!(vm.negotiate(VERSION_1));
    vm.set_status(15);
    vm.kick(0);
    vm.settle();
    assert_eq!((vm.status(), log.served()), (15, 0));
    vm.set_status(0);
    assert!(vm.negotiate(VERSION_1));
    vm.set_up_vectors();
    let mut queue = vm.set_up_queue(1, false);
    vm.set_status(15);
    let posted = queue.post(&[b"ping"], &[4]);
    for index in 0..3 {
        vm.kick(index);
    }
    vm.sink.wait(2, 1);
    assert_eq!(queue.take(), Some((posted.head, 4)));
}

#[test]
fn t_42_kicks_at_the_wrong_time_consume_nothing() {
    let (mut vm, log) = machine();
    vm.kick(0);
    vm.set_status(1);
    vm.kick(0);
    vm.set_status(3);
    vm.kick(0);
    vm.set_status(0);
    vm.kick(0);
    assert_eq!((log.starts(), log.served()), (0, 0));
    let mut queues = vm.start(false);
    vm.settle();
    assert_eq!(log.served(), 0);
    // Paused, or the kicks of before could still make it look at its queue.
    vm.function.pause().unwrap();
    queues[0].post(&[b"ping"], &[4]);
    vm.set_status(0);
    vm.kick(0);
    vm.settle();
    assert_eq!((log.served(), queues[0].used_index()), (0, 0));
}

#[test]
fn a_doorbell_event_kicks_like_the_register() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    use crate::pci::PciFunction;
    queues[2].post(&[b"ping"], &[4]);
    vm.function.doorbells()[2].event.write(1).unwrap();
    vm.sink.wait(3, 1);
    assert_eq!(queues[2].take().map(|(_, len)| len), Some(4));
}

#[test]
fn t_30_configuration_reads_and_writes_stay_inside() {
    let (mut vm, _) = machine();
    let device = vm.device.unwrap();
    assert_eq!(vm.read(device, 8), [9, 10, 11, 12, 0, 0, 0, 0], "over the end");
    assert_eq!(vm.read(device, 0xff8), [0; 8]);
    vm.write(device, 0, &[0xee; 8]);
    vm.write(device, 8, &[0xee; 8]);
    vm.write(device, 0xffc, &[0xee; 8]);
    assert_eq!(vm.read(device, 0), [1, 2, 3, 4, 0xee, 0xee, 0xee, 0xee]);
    assert_eq!(vm.read(device, 8), [9, 10, 11, 12]);
}

#[test]
fn t_01_accesses_of_another_width_read_zero_and_write_nothing() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(VERSION_1));
    let widths = |at: u64| -> &'static [usize] {
        match at {
            0 | 4 | 8 | 0xc | 0x24 | 0x2c | 0x34 => &[4],
            0x10 | 0x12 | 0x16 | 0x18 | 0x1a | 0x1c | 0x1e => &[2],
            0x14 | 0x15 => &[1],
            0x20 | 0x28 | 0x30 => &[4, 8],
            _ => &[],
        }
    };
    vm.set32(0, 1);
    let before = registers(&mut vm);
    for at in 0..0x48u64 {
        for width in (0..=9usize).filter(|width| !widths(at).contains(width)) {
            let mut data = vec![0xff; width];
            crate::pci::PciFunction::write_bar(&mut vm.function, 0, at, &data);
            crate::pci::PciFunction::read_bar(&mut vm.function, 0, at, &mut data);
            assert!(data.iter().all(|byte| *byte == 0), "{width} bytes at {at:#x}");
        }
    }
    assert_eq!(registers(&mut vm), before);
    assert_eq!((vm.status(), vm.get32(0)), (11, 1));
}
