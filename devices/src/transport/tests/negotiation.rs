//! Device status and features (§2.1, §2.2, §4.1.4.3).

use std::sync::atomic::Ordering;

use super::{BASE, NEEDS_BASE, count, machine};
use crate::transport::status::{Step, step};

const VERSION_1: u64 = 1 << 32;

#[test]
fn c_001_c_002_nothing_is_consumed_or_announced_before_driver_ok() {
    let (mut vm, log) = machine();
    assert!(vm.negotiate(VERSION_1));
    vm.set_up_vectors();
    let mut queue = vm.set_up_queue(0, false);
    queue.post(&[b"ping"], &[4]);
    let ring = queue.posted_at(queue.used_ring(), 70);
    vm.kick(0);
    vm.function.notify_config_changed();
    vm.settle();
    assert_eq!((log.starts(), log.served(), queue.used_index()), (0, 0, 0));
    assert_eq!(queue.posted_at(queue.used_ring(), 70), ring);
    assert_eq!((vm.sink.all_signals(), vm.read(vm.isr, 0)), (0, [0]));
    vm.set_status(15);
    vm.sink.wait(1, 1);
    assert_eq!(queue.used_index(), 1, "the early kick was not lost");
}

#[test]
fn c_003_c_004_a_device_that_cannot_go_on_says_so_and_notifies() {
    let (mut vm, log) = machine();
    let mut queues = vm.start(false);
    log.fail.store(true, Ordering::SeqCst);
    queues[0].post(&[b"ping"], &[4]);
    vm.kick(0);
    vm.sink.wait(0, 1);
    assert_eq!(vm.status(), 15 | 64);
    assert!(vm.function.needs_reset());
    let [isr] = vm.read(vm.isr, 0);
    assert_eq!(isr & 2, 2);
    assert_eq!(queues[0].used_index(), 0);
}

#[test]
fn a_device_that_waits_for_a_reset_looks_at_no_kick_and_works_after_it() {
    let (mut vm, log) = machine();
    let mut queues = vm.start(false);
    log.fail.store(true, Ordering::SeqCst);
    vm.kick(0);
    vm.sink.wait(0, 1);
    let served = log.served();
    log.fail.store(false, Ordering::SeqCst);
    for _ in 0..3 {
        queues[1].post(&[b"ping"], &[4]);
        vm.kick(1);
        vm.settle();
    }
    assert_eq!(vm.function.kicks[1].read().unwrap(), 3, "nobody listens, so nobody is woken");
    assert_eq!((log.served(), vm.sink.signals(0), queues[1].used_index()), (served, 1, 0));
    vm.set_status(0);
    queues[1].begin_at(0);
    let mut queues = vm.start(false);
    queues[1].post(&[b"ping"], &[4]);
    vm.settle();
    assert_eq!((vm.status(), queues[1].used_index()), (15, 1));
}

#[test]
fn c_005_c_006_a_subset_the_device_cannot_work_with_is_refused() {
    let (mut vm, _) = machine();
    assert!(!vm.negotiate(VERSION_1 | NEEDS_BASE));
    assert_eq!(vm.status(), 3);
    vm.set_status(15);
    assert_eq!(vm.status(), 3, "DRIVER_OK without FEATURES_OK is not heard");
    vm.set_status(0);
    assert!(vm.negotiate(VERSION_1 | BASE | NEEDS_BASE));
}

#[test]
fn c_007_c_032_c_034_c_035_only_what_is_supported_is_offered() {
    let (mut vm, _) = machine();
    assert_eq!(vm.offered(), VERSION_1 | (1 << 29) | (1 << 28) | BASE | NEEDS_BASE);
}

#[test]
fn c_008_the_same_features_are_accepted_a_hundred_times() {
    let (mut vm, _) = machine();
    let features = vm.offered();
    for _ in 0..100 {
        assert!(vm.negotiate(features));
        vm.set_status(0);
    }
    assert_eq!(count(&vm, "resets"), 100);
}

#[test]
fn c_009_c_067_c_068_a_reset_leaves_everything_as_after_power_on() {
    let (mut vm, log) = machine();
    let fresh = super::registers(&mut vm);
    vm.start(true);
    assert_ne!(super::registers(&mut vm), fresh);
    vm.set_status(0);
    assert_eq!(vm.status(), 0);
    assert_eq!(super::registers(&mut vm), fresh);
    assert_eq!((vm.get32(0), vm.get32(8), vm.get32(0xc), vm.get16(0x16)), (0, 0, 0, 0));
    assert_eq!(vm.get16(0x10), 0xffff);
    assert_eq!((log.starts(), log.stops()), (1, 1));
}

#[test]
fn c_010_after_a_reset_rings_and_interrupts_are_left_alone() {
    let (mut vm, log) = machine();
    let mut queues = vm.start(false);
    queues[0].post(&[b"ping"], &[4]);
    vm.settle();
    let (signals, served) = (vm.sink.all_signals(), log.served());
    assert_eq!(served, 1);
    vm.set_status(0);
    queues[0].post(&[b"pong"], &[4]);
    vm.kick(0);
    vm.function.notify_config_changed();
    vm.settle();
    assert_eq!((vm.sink.all_signals(), log.served()), (signals, served));
    assert_eq!(queues[0].used_index(), 1);
    // Not even a driver that has mapped the vectors again hears of anything.
    vm.set_up_vectors();
    vm.set16(0x16, 0);
    vm.set16(0x1a, 1);
    vm.kick(0);
    vm.function.notify_config_changed();
    vm.settle();
    assert_eq!((vm.sink.all_signals(), vm.read(vm.isr, 0)), (signals, [0]));
}

#[test]
fn c_011_configuration_can_be_read_in_every_state() {
    let (mut vm, _) = machine();
    let device = vm.device.unwrap();
    for status in [0, 1, 3] {
        vm.set_status(status);
        assert_eq!(vm.read(device, 0), [1, 2, 3, 4]);
    }
}

#[test]
fn c_033_version_1_must_be_accepted() {
    let (mut vm, _) = machine();
    assert!(!vm.negotiate(BASE));
}

#[test]
fn c_064_feature_words_past_the_second_are_zero() {
    let (mut vm, _) = machine();
    for select in [2, 3, 0x1_0000, u32::MAX] {
        vm.set32(0, select);
        assert_eq!((vm.get32(0), vm.get32(4)), (select, 0));
    }
}

#[test]
fn c_065_accepted_bits_read_back_by_word() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(VERSION_1 | BASE));
    for (select, bits) in [(0, 1), (1, 1), (2, 0), (u32::MAX, 0)] {
        vm.set32(8, select);
        assert_eq!(vm.get32(0xc), bits, "word {select:#x}");
    }
}

#[test]
fn c_066_the_generation_moves_even_after_256_changes() {
    let (mut vm, _) = machine();
    let config = vm.function.config_space().unwrap().clone();
    let [mut before] = vm.read(vm.common, 0x15);
    for changes in [1, 255, 256, 257, 65536] {
        for _ in 0..changes {
            config.update(|bytes| bytes[0] = bytes[0].wrapping_add(1));
        }
        let [after] = vm.read(vm.common, 0x15);
        assert_ne!(before, after, "{changes} changes look like none");
        before = after;
    }
    for _ in 0..1000 {
        assert_eq!(vm.read(vm.common, 0x15), [before], "nothing changed");
    }
}

#[test]
fn t_04_features_are_refused_or_frozen() {
    let (mut vm, _) = machine();
    assert!(!vm.negotiate(VERSION_1 | (1 << 40)), "a bit that was not offered");
    vm.set_status(0);
    assert!(vm.negotiate(VERSION_1));
    vm.set32(8, 0);
    vm.set32(0xc, 1);
    assert_eq!(vm.get32(0xc), 0, "frozen since FEATURES_OK");
}

#[test]
fn t_16_status_bits_come_in_order_one_state_at_a_time() {
    let forward = [(0, 1), (0, 3), (1, 3), (3, 11), (11, 15)];
    for current in [0u8, 1, 3, 11, 15] {
        for written in 0..=255u8 {
            let expected = match (current, written) {
                (_, 0) => Step::Reset,
                (_, w) if w & !64 == current | 128 => Step::Set(current | 128),
                (3, w) if w & !64 == 11 => Step::Negotiated,
                (11, w) if w & !64 == 15 => Step::Ready,
                (c, w) if forward.contains(&(c, w & !64)) => Step::Set(w & !64),
                _ => Step::Ignore,
            };
            assert_eq!(step(current, written), expected, "{written:#x} on {current:#x}");
            let failed = if written == 0 { Step::Reset } else { Step::Ignore };
            assert_eq!(step(current | 128, written), failed, "{written:#x} after FAILED");
        }
    }
}

#[test]
fn t_16_driver_ok_twice_starts_the_device_once_and_failed_keeps_it_stopped() {
    let (mut vm, log) = machine();
    vm.start(false);
    vm.set_status(15);
    vm.settle();
    assert_eq!(log.starts(), 2, "once by DRIVER_OK, once by the pause in this test");
    vm.set_status(0);
    assert!(vm.negotiate(VERSION_1));
    vm.set_status(11 | 128);
    vm.set_status(15 | 128);
    vm.set_status(15);
    vm.kick(0);
    assert_eq!((vm.status(), log.starts()), (11 | 128, 2));
}
