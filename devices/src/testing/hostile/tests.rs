//! Every kind through random sequences, and through those that brought other machines down.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::*;
use crate::testing::{INDIRECT, NEXT, WRITE};
use crate::virtio::NAMES;

const GOES_ON: u8 = NEXT as u8;
const WRITES: u8 = WRITE as u8;
const POINTS: u8 = INDIRECT as u8;

/// Operations at random, more of them honest than not.
fn op() -> impl Strategy<Value = [u8; OP_BYTES]> {
    prop_oneof![
        2 => (any::<u8>(), any::<u32>()).prop_map(|(variety, value)| Op::Ask { variety, value }.encode()),
        3 => any::<[u8; OP_BYTES]>(),
    ]
}

fn kinds() -> impl Iterator<Item = &'static str> {
    NAMES.iter().copied().chain(["ring"])
}

/// All kinds through the same operations; what they reached together.
fn everybody(ops: &[Op]) -> Reach {
    let mut reach = Reach::default();
    kinds().for_each(|kind| reach.merge(&live_through(kind, &encode(ops))));
    reach
}

fn entry(index: u16, part: u8, length: Length, flags: u8, next: u16) -> Op {
    Op::Describe(Entry { index, place: Place { part, queue: 0, offset: 0 }, length, flags, next })
}

/// A chain described by `ops`, offered at 0 and kicked.
fn offered(mut ops: Vec<Op>) -> Vec<Op> {
    ops.extend([Op::Offer { queue: 0, head: 0 }, Op::Kick { queue: 0 }]);
    ops
}

#[test]
fn every_operation_is_read_as_it_was_written() {
    let mut dice = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..2000 {
        let bytes = any::<[u8; OP_BYTES]>().new_tree(&mut dice).unwrap().current();
        let op = decode(&bytes)[0];
        assert_eq!(decode(&op.encode()), [op]);
    }
}

#[test]
fn where_bytes_end_an_honest_conversation_follows() {
    for kind in kinds() {
        let reach = live_through(kind, &[]);
        assert_eq!(
            (reach.get("asked"), reach.get("works_after"), reach.get("needs_reset")),
            (1, 1, 0),
            "{kind}"
        );
    }
}

#[test]
fn hg_q01_q02_q03_loops_and_links_out_of_the_table_are_refused() {
    let one = Length::of(16);
    for next in [0, 1, 511, 512, 0xffff] {
        let ops = vec![entry(0, 0, one, GOES_ON, 1), entry(1, 0, one, GOES_ON, next)];
        let reach = everybody(&offered(ops));
        assert_eq!(reach.get("needs_reset"), 0);
        assert!(reach.get("refused") >= 5, "{next}: {reach:?}");
    }
}

#[test]
fn hg_q07_to_q10_buffers_that_are_not_there_are_refused() {
    let long = Length::short_of_4_gib(0);
    for (part, length) in
        [(0, long), (2, Length::of(8)), (3, Length::of(4096)), (4, Length::of(4096)), (9, long)]
    {
        for flags in [0, WRITES] {
            let reach = everybody(&offered(vec![entry(0, part, length, flags, 0)]));
            assert_eq!(reach.get("needs_reset"), 0);
            assert!(reach.get("refused") + reach.get("rx_starved") >= 4, "{part}: {reach:?}");
        }
    }
}

#[test]
fn hg_q13_q35_a_device_that_writes_to_its_own_rings_works_after_a_reset() {
    for part in [5, 6, 7] {
        let ops = vec![entry(0, part, Length::of(4096), WRITES, 0), Op::Host { what: 0, much: 3000 }];
        everybody(&offered(ops));
    }
}

#[test]
fn hg_q15_to_q20_tables_elsewhere_are_bounded() {
    let inner = |index, flags, next| {
        let place = Place { part: 0, queue: 0, offset: 0 };
        Op::Indirect(Entry { index, place, length: Length::of(32), flags, next })
    };
    for (bytes, flags) in [(0, POINTS), (8, POINTS), (17, POINTS), (16, POINTS | GOES_ON), (65_520, POINTS)] {
        let ops = vec![
            inner(0, GOES_ON, 1),
            inner(1, GOES_ON | POINTS, 0),
            entry(0, 8, Length::of(bytes), flags, 0),
        ];
        assert_eq!(everybody(&offered(ops)).get("needs_reset"), 0);
    }
}

#[test]
fn hg_q30_an_available_index_that_jumps_asks_for_a_reset_and_nothing_else() {
    for by in [513, 0x7fff, 0xffff] {
        let reach = everybody(&[Op::Jump { queue: 0, by }, Op::Kick { queue: 0 }]);
        // Those that only look at a queue when they have something for it have not seen it.
        assert!(reach.get("needs_reset") >= 6, "{by}: {reach:?}");
        assert_eq!(reach.get("works_after"), 8);
    }
}

#[test]
fn hg_q32_the_same_head_twice_is_no_harm() {
    let ops = [entry(0, 0, Length::of(64), WRITES, 0), Op::Offer { queue: 0, head: 0 }];
    everybody(&[&ops[..], &ops[1..], &[Op::Kick { queue: 0 }, Op::Poll]].concat());
}

#[test]
fn hg_s01_a_reset_after_each_step_of_a_conversation() {
    for varieties in 0..16u8 {
        let ask = Op::Ask { variety: varieties, value: 0x0001_0203 };
        let reset = Op::Reset { event_idx: varieties & 1 != 0, without: u32::from(varieties) };
        let host = Op::Host { what: varieties, much: 600 };
        let reach =
            everybody(&[ask, reset, ask, host, Op::Poll, reset, host, Op::Pause, ask, Op::Poll, reset]);
        assert_eq!(reach.get("needs_reset"), 0);
    }
}

#[test]
fn a_witness_sees_what_a_device_must_not_write() {
    use crate::memory::{Bytes, GuestAddress};
    use crate::testing::{Driver, memory};
    let memory = memory();
    let driver = Driver::new(0, 16, memory.clone(), false);
    let mut witness = super::witness::Witness::new(memory.clone(), &[driver], false);
    witness.may_write(0x40_0000, 8);
    memory.write_slice(&[1; 8], GuestAddress(0x40_0000)).unwrap();
    witness.check("nobody");
    memory.write_slice(&[1], GuestAddress(0x40_0008)).unwrap();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| witness.check("somebody")));
    assert!(caught.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]
    #[test]
    fn hg_every_kind_lives_through_anything(ops in vec(op(), 0..40)) {
        let bytes = ops.concat();
        for kind in kinds() {
            prop_assert_eq!(live_through(kind, &bytes).get("works_after"), 1);
        }
    }

    #[test]
    fn t_every_function_lives_through_anything(which in 0..NAMES.len(), bytes in vec(any::<u8>(), 0..400)) {
        prop_assert!(function::live_through(NAMES[which], &bytes).get("answered") > 0);
    }
}
