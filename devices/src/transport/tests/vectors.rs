//! Interrupts: MSI-X, event mapping and interrupt status (§4.1.4.5, §4.1.5.1.2, PCI 3.0 §6.8).

use super::machine;
use crate::pci::Msi;
use crate::testing::Driver;
use crate::testing::pci::PciDriver;

const ENABLE: u16 = 0x8000;
const MASK_ALL: u16 = 0x4000;

fn ping(vm: &mut PciDriver, queue: &mut Driver) {
    queue.post(&[b"ping"], &[4]);
    vm.settle();
}

#[test]
fn c_074_t_40_interrupt_status_is_cleared_by_reading_and_only_then() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    vm.set_msix_control(0);
    ping(&mut vm, &mut queues[0]);
    vm.function.notify_config_changed();
    vm.write(vm.isr, 0, &[3]);
    let wide: [u8; 4] = vm.read(vm.isr, 0);
    assert_eq!(wide, [0; 4], "a wide read is no read of the register");
    assert_eq!(vm.read(vm.isr, 0), [3]);
    assert_eq!(vm.read(vm.isr, 0), [0]);
    assert_eq!(vm.sink.all_signals(), 0, "there is no INTx");
}

#[test]
fn c_075_a_queue_event_sets_the_queue_bit_and_a_change_the_configuration_bit() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    vm.set_msix_control(0);
    ping(&mut vm, &mut queues[1]);
    assert_eq!(vm.read(vm.isr, 0), [1]);
    vm.function.notify_config_changed();
    assert_eq!(vm.read(vm.isr, 0), [2]);
    ping(&mut vm, &mut queues[1]);
    vm.set_status(0);
    assert_eq!(vm.read(vm.isr, 0), [0], "reset clears it");
}

#[test]
fn c_081_any_event_maps_to_any_vector_and_to_none() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    assert_eq!(vm.msix_control() & 0x7ff, 3, "one vector per queue and one for the configuration");
    for (vector, expected) in [(0, [1, 0, 0, 0]), (3, [1, 0, 0, 1]), (0xffff, [1, 0, 0, 1])] {
        vm.set16(0x16, 1);
        vm.set16(0x1a, vector);
        assert_eq!(vm.get16(0x1a), vector);
        ping(&mut vm, &mut queues[1]);
        let signals = [0, 1, 2, 3].map(|v| vm.sink.signals(v));
        assert_eq!(signals, expected, "mapped to {vector:#x}");
    }
}

#[test]
fn c_082_a_vector_that_does_not_exist_reads_back_as_none_and_reset_unmaps_all() {
    let (mut vm, _) = machine();
    vm.set16(0x16, 0);
    for vector in [4, 5, 0x7ff, 0x800, 0xfffe] {
        vm.set16(0x10, 1);
        vm.set16(0x1a, 1);
        assert_eq!((vm.get16(0x10), vm.get16(0x1a)), (1, 1));
        vm.set16(0x10, vector);
        vm.set16(0x1a, vector);
        assert_eq!((vm.get16(0x10), vm.get16(0x1a)), (0xffff, 0xffff), "{vector:#x}");
    }
    vm.set16(0x10, 2);
    vm.set16(0x1a, 2);
    vm.set_status(0);
    assert_eq!((vm.get16(0x10), vm.get16(0x1a)), (0xffff, 0xffff));
}

#[test]
fn c_083_c_084_an_unmapped_event_interrupts_nobody() {
    let (mut vm, log) = machine();
    let mut queues = vm.start(false);
    vm.set16(0x10, 0xffff);
    vm.set16(0x16, 0);
    vm.set16(0x1a, 0xffff);
    ping(&mut vm, &mut queues[0]);
    vm.function.notify_config_changed();
    assert_eq!((log.served(), vm.sink.all_signals()), (1, 0));
}

#[test]
fn a_masked_vector_pends_and_fires_once_when_unmasked() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    let pending = vm.pending();
    vm.mask_vector(1, true);
    ping(&mut vm, &mut queues[0]);
    ping(&mut vm, &mut queues[0]);
    assert_eq!(vm.sink.signals(1), 0);
    assert_eq!(u64::from_le_bytes(vm.read(pending, 0)), 1 << 1);
    vm.write(pending, 0, &[0; 8]);
    assert_eq!(u32::from_le_bytes(vm.read(pending, 0)), 1 << 1, "read-only");
    vm.mask_vector(1, false);
    assert_eq!(vm.sink.signals(1), 1);
    assert_eq!(u64::from_le_bytes(vm.read(pending, 0)), 0);
    ping(&mut vm, &mut queues[0]);
    assert_eq!(vm.sink.signals(1), 2);
}

#[test]
fn the_function_mask_holds_every_vector_back() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    vm.set_msix_control(ENABLE | MASK_ALL);
    ping(&mut vm, &mut queues[0]);
    vm.function.notify_config_changed();
    assert_eq!(vm.sink.all_signals(), 0);
    vm.set_msix_control(ENABLE);
    assert_eq!([0, 1, 2, 3].map(|v| vm.sink.signals(v)), [1, 1, 0, 0]);
}

#[test]
fn a_route_is_told_once_per_message_and_not_on_masking() {
    let (mut vm, _) = machine();
    vm.set_msix_control(ENABLE);
    vm.program_vector(1, 0xfee0_1000, 0x41, false);
    assert_eq!(vm.sink.routed(1), Some(Msi { address: 0xfee0_1000, data: 0x41 }));
    let calls = vm.sink.route_calls();
    for _ in 0..10 {
        vm.mask_vector(1, true);
        vm.mask_vector(1, false);
    }
    assert_eq!(vm.sink.route_calls(), calls);
    vm.mask_vector(1, true);
    vm.program_vector(1, 0x1_fee0_2000, 0x42, true);
    assert_eq!(vm.sink.route_calls(), calls, "a masked message is not yet the route");
    vm.mask_vector(1, false);
    assert_eq!(vm.sink.routed(1), Some(Msi { address: 0x1_fee0_2000, data: 0x42 }));
    assert_eq!(vm.sink.route_calls(), calls + 1);
    vm.set_msix_control(0);
    assert_eq!(vm.sink.routed(1), None);
}

#[test]
fn a_disabled_function_forgets_what_pended() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    vm.mask_vector(1, true);
    ping(&mut vm, &mut queues[0]);
    vm.set_msix_control(0);
    vm.set_msix_control(ENABLE);
    vm.mask_vector(1, false);
    assert_eq!(vm.sink.signals(1), 0);
}

#[test]
fn c_010_a_reset_forgets_what_pended() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    vm.mask_vector(1, true);
    ping(&mut vm, &mut queues[0]);
    vm.set_status(0);
    vm.mask_vector(1, false);
    assert_eq!(vm.sink.signals(1), 0);
}

#[test]
fn the_table_answers_to_aligned_double_and_quad_words_only() {
    let (mut vm, _) = machine();
    let table = vm.table();
    vm.program_vector(2, 0x1_fee0_0000, 0x55, true);
    assert_eq!(u64::from_le_bytes(vm.read(table, 32)), 0x1_fee0_0000);
    assert_eq!(u64::from_le_bytes(vm.read(table, 40)), 0x1_0000_0055);
    vm.write(table, 32, &0xfee0_3000u64.to_le_bytes());
    assert_eq!(u32::from_le_bytes(vm.read(table, 36)), 0);
    for (at, width) in [(32, 1), (32, 2), (33, 4), (36, 8), (34, 2), (32, 16), (32, 0)] {
        vm.write(table, at, &vec![0xff; width]);
        let mut data = vec![0xff; width];
        crate::pci::PciFunction::read_bar(&mut vm.function, table.bar, table.offset + at, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{width} bytes at {at}");
    }
    assert_eq!(u64::from_le_bytes(vm.read(table, 32)), 0xfee0_3000);
    vm.write(table, 44, &[0xff; 4]);
    assert_eq!(u32::from_le_bytes(vm.read(table, 44)), 1, "only the mask bit is kept");
    vm.write(table, 64, &[0xff; 4]);
    assert_eq!(u32::from_le_bytes(vm.read(table, 64)), 0, "past the last vector");
}
