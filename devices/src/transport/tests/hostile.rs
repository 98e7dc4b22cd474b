//! A driver that writes nonsense into its rings while the device runs: nothing outside of what it offered
//! is touched, and after a reset everything works.

use std::sync::Arc;

use proptest::prelude::*;

use super::{SIZES, machine};
use crate::memory::{Bytes, GuestAddress};
use crate::testing::pci::PciDriver;
use crate::testing::{Descriptor, Driver, HIGH, INDIRECT, REGION, WRITE};

/// Memory nobody offers: it must never change.
const CANARY: std::ops::Range<u64> = 0x40_0000..0x41_0000;
/// Where indirect tables are.
const TABLES: u64 = 0x60_0000;

#[derive(Clone, Debug)]
enum Op {
    Describe(usize, u16, Descriptor),
    DescribeElsewhere(u16, Descriptor),
    Offer(usize, u16),
    AvailableIndex(usize, u16),
    UsedEvent(usize, u16),
    Flags(usize, u16),
    Scribble(usize, [u8; 8]),
    Kick(u16),
    Settle,
    Restart(bool),
}

/// Writable buffers are taken from one area (or from nowhere), so that the rest can be watched.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let nowhere =
        proptest::sample::select(vec![REGION, REGION - 4, HIGH - 1, u64::MAX, u64::MAX - 7, 1 << 45]);
    let flags = prop_oneof![4 => 0u16..4, 1 => Just(INDIRECT), 1 => 0u16..8];
    let len = prop_oneof![8 => 0u32..200, 2 => (0u32..20).prop_map(|n| n * 16), 1 => any::<u32>()];
    let next = prop_oneof![9 => 0u16..16, 1 => any::<u16>()];
    (any::<u16>(), nowhere, 0u8..10, len, flags, next).prop_map(|(at, nowhere, choice, len, flags, next)| {
        let address = match (choice, flags) {
            (0, _) => nowhere,
            (_, flags) if flags & INDIRECT != 0 => TABLES + u64::from(at % 64) * 16,
            (_, flags) if flags & WRITE != 0 => HIGH + u64::from(at),
            (1, _) => CANARY.start,
            _ => u64::from(at) * 64,
        };
        Descriptor { address, len, flags, next }
    })
}

fn op() -> impl Strategy<Value = Op> {
    let queue = 0..SIZES.len();
    prop_oneof![
        8 => (queue.clone(), 0u16..8, descriptor()).prop_map(|(q, i, d)| Op::Describe(q, i, d)),
        3 => (0u16..64, descriptor()).prop_map(|(i, d)| Op::DescribeElsewhere(i, d)),
        8 => (queue.clone(), prop_oneof![9 => 0u16..8, 1 => any::<u16>()]).prop_map(|(q, head)| Op::Offer(q, head)),
        1 => (queue.clone(), any::<u16>()).prop_map(|(q, index)| Op::AvailableIndex(q, index)),
        1 => (queue.clone(), any::<u16>()).prop_map(|(q, index)| Op::UsedEvent(q, index)),
        1 => (queue.clone(), any::<u16>()).prop_map(|(q, flags)| Op::Flags(q, flags)),
        1 => (queue, any::<[u8; 8]>()).prop_map(|(q, bytes)| Op::Scribble(q, bytes)),
        4 => (0u16..4).prop_map(Op::Kick),
        4 => Just(Op::Settle),
        2 => any::<bool>().prop_map(Op::Restart),
    ]
}

/// The guest's side of all queues, from a clean slate.
fn restart(vm: &mut PciDriver, event_idx: bool) -> Vec<Driver> {
    vm.set_status(0);
    for (index, size) in (0u16..).zip(SIZES) {
        let mut fresh = Driver::new(index, size, Arc::clone(&vm.memory), false);
        fresh.begin_at(0);
        fresh.set_flags(0);
    }
    vm.start(event_idx)
}

/// Everything the device may only read: the canary and each queue's table and available ring.
fn untouchable(vm: &PciDriver, queues: &[Driver]) -> Vec<u8> {
    let mut seen = vec![0; usize::try_from(CANARY.end - CANARY.start).unwrap()];
    vm.memory.read_slice(&mut seen, GuestAddress(CANARY.start)).unwrap();
    for queue in queues {
        seen.extend(queue.posted_at(queue.table(), 16 * 16));
        seen.extend(queue.posted_at(queue.available_ring(), 64));
    }
    seen
}

fn apply(vm: &mut PciDriver, queues: &mut Vec<Driver>, op: Op) {
    match op {
        Op::Describe(q, index, descriptor) => queues[q].describe(index, descriptor),
        Op::DescribeElsewhere(index, descriptor) => queues[0].describe_at(TABLES, index, descriptor),
        Op::Offer(q, head) => queues[q].offer(head),
        Op::AvailableIndex(q, index) => queues[q].set_available_index(index),
        Op::UsedEvent(q, index) => queues[q].set_used_event(index),
        Op::Flags(q, flags) => queues[q].set_flags(flags),
        Op::Scribble(q, bytes) => {
            vm.memory.write_slice(&bytes, GuestAddress(queues[q].used_ring())).unwrap();
        }
        Op::Kick(q) => vm.kick(q),
        Op::Settle => vm.settle(),
        Op::Restart(event_idx) => *queues = restart(vm, event_idx),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn q_any_nonsense_in_the_rings_is_survived_and_forgotten_by_a_reset(
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        let (mut vm, log) = machine();
        vm.memory.write_slice(&[0xa5; 0x1_0000], GuestAddress(CANARY.start)).unwrap();
        let mut queues = restart(&mut vm, false);
        for op in ops {
            vm.function.pause().unwrap();
            let driver_only = matches!(op, Op::Kick(_) | Op::Settle);
            let before = untouchable(&vm, &queues);
            vm.function.resume().unwrap();
            apply(&mut vm, &mut queues, op);
            vm.settle();
            if driver_only {
                prop_assert!(untouchable(&vm, &queues) == before, "the device wrote where it must not");
            }
            prop_assert!(matches!(vm.status(), 15 | 79));
            prop_assert_eq!(vm.status() == 79, vm.function.needs_reset());
        }
        let mut canary = vec![0; 0x1_0000];
        vm.memory.read_slice(&mut canary, GuestAddress(CANARY.start)).unwrap();
        prop_assert!(canary.iter().all(|byte| *byte == 0xa5));

        let mut queues = restart(&mut vm, false);
        vm.settle();
        let served = log.served();
        let posted = queues[1].post(&[b"honest"], &[6]);
        vm.settle();
        prop_assert_eq!(queues[1].take(), Some((posted.head, 6)));
        prop_assert_eq!(queues[1].written(&posted), b"honest");
        prop_assert_eq!(log.served(), served + 1);
    }
}
