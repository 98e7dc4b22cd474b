//! The register file against a reference written from the specification's table (§4.1.4.3), for any
//! sequence of accesses.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{BASE, NEEDS_BASE, SIZES, machine};
use crate::pci::PciFunction;
use crate::testing::pci::{PciDriver, Sink};

const OFFERED: u64 = (1 << 32) | (1 << 29) | (1 << 28) | NEEDS_BASE | BASE;
const VECTORS: u16 = 4;

/// One queue of the reference.
#[derive(Clone, Debug, PartialEq)]
struct Queue {
    size: u16,
    enabled: bool,
    vector: u16,
    addresses: [u64; 3],
}

/// The reference: the registers as numbers, the rules as `if`s.
#[derive(Clone, Debug)]
struct Model {
    device_select: u32,
    driver_select: u32,
    accepted: u64,
    config_vector: u16,
    status: u8,
    needs_reset: bool,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Model {
    fn new() -> Self {
        let queue = |size: &u16| Queue { size: *size, enabled: false, vector: 0xffff, addresses: [0; 3] };
        Self {
            device_select: 0,
            driver_select: 0,
            accepted: 0,
            config_vector: 0xffff,
            status: 0,
            needs_reset: false,
            queue_select: 0,
            queues: SIZES.iter().map(queue).collect(),
        }
    }

    fn read(&self, at: u64, width: usize) -> u64 {
        let none = Queue { size: 0, enabled: false, vector: 0xffff, addresses: [0; 3] };
        let queue = self.queues.get(usize::from(self.queue_select)).unwrap_or(&none);
        let there = usize::from(self.queue_select) < self.queues.len();
        match (at, width) {
            (0x00, 4) => self.device_select.into(),
            (0x04, 4) if self.device_select < 2 => (OFFERED >> (32 * self.device_select)) & 0xffff_ffff,
            (0x08, 4) => self.driver_select.into(),
            (0x0c, 4) if self.driver_select < 2 => (self.accepted >> (32 * self.driver_select)) & 0xffff_ffff,
            (0x10, 2) => self.config_vector.into(),
            (0x12, 2) => self.queues.len() as u64,
            (0x14, 1) => u64::from(self.status) | if self.needs_reset { 64 } else { 0 },
            (0x16, 2) => self.queue_select.into(),
            (0x18, 2) => queue.size.into(),
            (0x1a, 2) => queue.vector.into(),
            (0x1c, 2) => queue.enabled.into(),
            (0x1e, 2) if there => self.queue_select.into(),
            (0x20 | 0x28 | 0x30, 8) => queue.addresses[usize::try_from(at - 0x20).unwrap() / 8],
            (0x20..0x38, 4) if at.is_multiple_of(4) => {
                let address = queue.addresses[usize::try_from(at - 0x20).unwrap() / 8];
                if at.is_multiple_of(8) { address & 0xffff_ffff } else { address >> 32 }
            }
            _ => 0,
        }
    }

    fn write(&mut self, at: u64, width: usize, value: u64) {
        let open = self.status & (8 | 4 | 128) == 8;
        let select = usize::from(self.queue_select);
        let exists = |vector: u64| if vector < VECTORS.into() { vector as u16 } else { 0xffff };
        match (at, width) {
            (0x00, 4) => self.device_select = value as u32,
            (0x08, 4) => self.driver_select = value as u32,
            (0x0c, 4) if self.status & (8 | 128) == 0 && self.driver_select < 2 => {
                let shift = 32 * self.driver_select;
                self.accepted = (self.accepted & !(0xffff_ffff << shift)) | (value << shift);
            }
            (0x10, 2) => self.config_vector = exists(value),
            (0x14, 1) => self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) if select < self.queues.len() => self.queues[select].vector = exists(value),
            _ if !open || select >= self.queues.len() || self.queues[select].enabled => {}
            (0x18, 2) if value.is_power_of_two() && value <= SIZES[select].into() => {
                self.queues[select].size = value as u16;
            }
            (0x1c, 2) if value == 1 => self.queues[select].enabled = true,
            (0x20 | 0x28 | 0x30, 8) => {
                self.queues[select].addresses[usize::try_from(at - 0x20).unwrap() / 8] = value
            }
            (0x20..0x38, 4) if at.is_multiple_of(4) => {
                let address = &mut self.queues[select].addresses[usize::try_from(at - 0x20).unwrap() / 8];
                let shift = if at.is_multiple_of(8) { 0 } else { 32 };
                *address = (*address & !(0xffff_ffff << shift)) | (value << shift);
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            let (device_select, driver_select) = (0, 0);
            *self = Self { device_select, driver_select, ..Self::new() };
            return;
        }
        let value = value & !64;
        let acceptable = self.accepted & !OFFERED == 0
            && self.accepted >> 32 == 1
            && (self.accepted & NEEDS_BASE == 0 || self.accepted & BASE != 0);
        if self.status & 128 != 0 {
        } else if value == self.status | 128 || matches!((self.status, value), (0, 1 | 3) | (1, 3)) {
            self.status = value;
        } else if (self.status, value) == (3, 11) && acceptable {
            self.status = 11;
        } else if (self.status, value) == (11, 15) {
            self.status = 15;
            self.needs_reset = self.queues.iter().any(|queue| queue.enabled && !usable(queue));
        }
    }
}

/// Whether the rings fit into the test guest's two regions, aligned and apart.
fn usable(queue: &Queue) -> bool {
    let size = u128::from(queue.size);
    let areas: Vec<(u128, u128)> = queue
        .addresses
        .iter()
        .zip([16 * size, 6 + 2 * size, 6 + 8 * size])
        .map(|(start, len)| (u128::from(*start), u128::from(*start) + len))
        .collect();
    let regions = [(0, 8 << 20), (32 << 20, 40 << 20)];
    let inside = |area: &(u128, u128)| regions.iter().any(|(start, end)| area.0 >= *start && area.1 <= *end);
    let apart = |a: usize, b: usize| areas[a].1 <= areas[b].0 || areas[b].1 <= areas[a].0;
    let aligned = queue.addresses.iter().zip([16, 2, 4]).all(|(address, by)| address % by == 0);
    aligned && areas.iter().all(inside) && apart(0, 1) && apart(0, 2) && apart(1, 2)
}

#[derive(Clone, Copy, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, usize, u64),
}

/// Honest steps, so that deep states are reached, mixed with anything at all.
fn access() -> impl Strategy<Value = Access> {
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let value = prop_oneof![
        (0u64..20),
        any::<u64>(),
        Just(0x1_0000_0000u64),
        Just(u64::from(u32::MAX)),
        (0u64..0x80).prop_map(|page| page << 16),
        (0u64..0x40).prop_map(|line| (32 << 20) + line * 64),
    ];
    let status = prop_oneof![Just(1u64), Just(3), Just(11), Just(15), Just(0), Just(79), 0u64..256];
    let register = prop_oneof![
        Just((0x08u64, 4usize)),
        Just((0x0c, 4)),
        Just((0x0c, 4)),
        Just((0x16, 2)),
        Just((0x18, 2)),
        Just((0x1a, 2)),
        Just((0x1c, 2)),
        Just((0x10, 2)),
        Just((0x20, 4)),
        Just((0x28, 8)),
        Just((0x30, 8)),
    ];
    prop_oneof![
        2 => (0u64..0x48, width.clone()).prop_map(|(at, width)| Access::Read(at, width)),
        2 => (0u64..0x48, width, value.clone()).prop_map(|(at, width, value)| Access::Write(at, width, value)),
        4 => (register, value).prop_map(|((at, width), value)| Access::Write(at, width, value)),
        2 => status.prop_map(|value| Access::Write(0x14, 1, value)),
        1 => Just(Access::Write(0x08, 4, 1)),
        1 => Just(Access::Write(0x0c, 4, 1)),
        1 => Just(Access::Write(0x1c, 2, 1)),
    ]
}

fn masked(value: u64, width: usize) -> u64 {
    if width == 8 { value } else { value & ((1 << (8 * width)) - 1) }
}

fn compare(vm: &mut PciDriver, model: &Model, at: u64, width: usize) {
    let mut data = [0; 8];
    vm.function.read_bar(0, at, &mut data[..width]);
    assert_eq!(u64::from_le_bytes(data), model.read(at, width), "{width} bytes at {at:#x} in {model:x?}");
}

/// What an honest driver does next: so that random accesses also meet a running device.
fn honest() -> impl Strategy<Value = Vec<Access>> {
    let negotiate = vec![
        Access::Write(0x14, 1, 0),
        Access::Write(0x14, 1, 3),
        Access::Write(0x08, 4, 1),
        Access::Write(0x0c, 4, 1),
        Access::Write(0x14, 1, 11),
    ];
    let queue = (0u64..4).prop_map(|queue| {
        let at = 0x10_0000 + queue * 0x1_0000;
        vec![
            Access::Write(0x16, 2, queue),
            Access::Write(0x20, 8, at),
            Access::Write(0x28, 8, at + 0x1000),
            Access::Write(0x30, 8, at + 0x2000),
            Access::Write(0x1c, 2, 1),
        ]
    });
    prop_oneof![Just(negotiate), queue, Just(vec![Access::Write(0x14, 1, 15)])]
}

/// Runs one sequence; whether a device with a queue was started on the way.
fn run(accesses: &[Access]) -> bool {
    let (mut vm, log) = machine();
    let mut model = Model::new();
    let mut started = false;
    for access in accesses {
        match *access {
            Access::Read(at, width) => compare(&mut vm, &model, at, width),
            Access::Write(at, width, value) => {
                let value = masked(value, width);
                vm.function.write_bar(0, at, &value.to_le_bytes()[..width]);
                model.write(at, width, value);
                compare(&mut vm, &model, 0x14, 1);
                compare(&mut vm, &model, at, width);
            }
        }
        started |= model.status == 15 && !model.needs_reset && model.queues.iter().any(|queue| queue.enabled);
    }
    assert!(!started || log.starts() > 0);
    for queue in 0..5u16 {
        vm.set16(0x16, queue);
        model.write(0x16, 2, queue.into());
        for at in [0x18, 0x1a, 0x1c, 0x1e] {
            compare(&mut vm, &model, at, 2);
        }
        for at in [0x20, 0x28, 0x30] {
            compare(&mut vm, &model, at, 8);
        }
    }
    started
}

#[test]
fn p_04_p_05_registers_do_as_the_reference_for_any_accesses() {
    let step = prop_oneof![8 => access().prop_map(|access| vec![access]), 1 => honest()];
    let sequences = proptest::collection::vec(step, 1..150).prop_map(|steps| steps.concat());
    let reached = std::cell::Cell::new(0);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(256));
    let result = runner.run(&sequences, |accesses| {
        reached.set(reached.get() + u32::from(run(&accesses)));
        Ok(())
    });
    assert!(result.is_ok(), "{result:?}");
    assert!(reached.get() >= 10, "only {} sequences started a device", reached.get());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn p_05_configuration_space_keeps_its_read_only_bits_for_any_writes(
        writes in proptest::collection::vec((0usize..4200, any::<u32>(), 0usize..3), 1..100),
    ) {
        let (mut vm, _) = machine();
        let before = *vm.function.config();
        for (at, value, width) in writes {
            let _ = vm.function.write_config(at, &value.to_le_bytes()[..1 << width]);
        }
        let after = *vm.function.config();
        let (msix, window) = (vm.msix, vm.window);
        let free: Vec<usize> = [4, 5, 0xd, 0x11, 0x12, 0x13, 0x3c, msix + 3, window + 4]
            .into_iter()
            .chain(window + 8..window + 20)
            .collect();
        for at in (0..4096).filter(|at| !free.contains(at)) {
            prop_assert_eq!(before[at], after[at], "byte {:#x}", at);
        }
        prop_assert_eq!(vm.capabilities().len(), 6);
        for bar in vm.function.bars() {
            prop_assert_eq!((bar.index, bar.size, bar.address % bar.size), (0, 0x8000, 0));
        }
    }

    #[test]
    fn p_17_any_access_to_any_bar_has_a_result(
        accesses in proptest::collection::vec((0u8..8, prop_oneof![0u64..0x9000, any::<u64>()], 0usize..20, any::<bool>()), 1..100),
    ) {
        let (mut vm, _) = machine();
        for (bar, offset, width, write) in accesses {
            let mut data = vec![0x5a; width];
            if write {
                vm.function.write_bar(bar, offset, &data);
            } else {
                vm.function.read_bar(bar, offset, &mut data);
                if bar != 0 || offset >= 0x6000 {
                    prop_assert_eq!(data, vec![0xff; width]);
                }
            }
        }
        vm.set_status(0);
        prop_assert_eq!(vm.status(), 0);
    }

    #[test]
    fn p_05_vectors_deliver_exactly_what_the_masks_let_through(
        steps in proptest::collection::vec((0u8..6, 0u16..4), 1..200),
    ) {
        let (mut vm, _) = machine();
        vm.start(false);
        vm.set16(0x10, 0);
        let (mut enabled, mut all, mut masked, mut pending, mut sent) = (true, false, [false; 4], [false; 4], [0u64; 4]);
        for (step, vector) in steps {
            let v = usize::from(vector);
            match step {
                0 => (enabled, all) = (vector & 1 != 0, vector & 2 != 0),
                1 | 2 => masked[v] = step == 1,
                _ => {}
            }
            if step == 0 {
                vm.set_msix_control(u16::from(enabled) << 15 | u16::from(all) << 14);
            } else if step < 3 {
                vm.mask_vector(vector, masked[v]);
            } else {
                vm.set16(0x10, vector);
                vm.function.notify_config_changed();
                pending[v] |= enabled;
            }
            for v in 0..4 {
                if enabled && !all && !masked[v] && std::mem::take(&mut pending[v]) {
                    sent[v] += 1;
                }
                pending[v] &= enabled;
            }
            let seen = |sink: &Sink| [0, 1, 2, 3].map(|v| sink.signals(v));
            prop_assert_eq!(seen(&vm.sink), sent);
            let bits = pending.iter().rev().fold(0u64, |all, bit| all << 1 | u64::from(*bit));
            prop_assert_eq!(u64::from_le_bytes(vm.read(vm.pending(), 0)), bits);
        }
    }
}
