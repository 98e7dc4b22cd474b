//! Properties of the ring over random sequences (names as in the tests beside it).

use std::collections::VecDeque;
use std::num::Wrapping;

use proptest::prelude::*;

use super::crosses_event;
use super::tests::{SIZE, driver, ring_at};
use crate::chain::Chain;
use crate::testing::{Descriptor, NEXT};

#[test]
fn p_03_the_notification_rule_is_right_for_every_8_bit_case() {
    let rule = |event: u8, new: u8, old: u8| {
        let [event, new, old] = [event, new, old].map(Wrapping);
        new - event - Wrapping(1) < new - old
    };
    for old in 0..=255u8 {
        for event in 0..=255u8 {
            let mut passed = false;
            for steps in 0..=255u8 {
                let new = old.wrapping_add(steps);
                assert_eq!(rule(event, new, old), passed, "event {event} new {new} old {old}");
                passed |= new == event;
            }
        }
    }
}

/// What may happen to a ring, in any order.
#[derive(Clone, Copy, Debug)]
enum Op {
    Post,
    PostBad,
    Pop,
    Undo,
    Complete(usize),
    Publish,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Post),
        1 => Just(Op::PostBad),
        3 => Just(Op::Pop),
        1 => Just(Op::Undo),
        3 => (0usize..8).prop_map(Op::Complete),
        2 => Just(Op::Publish),
    ]
}

proptest! {
    #[test]
    fn p_03_the_notification_rule_is_right_for_16_bits(event: u16, new: u16, old: u16, near in -3i32..3) {
        let near = u16::try_from((i32::from(new) + near).rem_euclid(0x1_0000)).unwrap();
        for event in [event, near, new, old] {
            // Entries `old` up to and without `new` were written: was the one waited for among them?
            let passed = event.wrapping_sub(old) < new.wrapping_sub(old);
            prop_assert_eq!(crosses_event(Wrapping(event), Wrapping(new), Wrapping(old)), passed);
        }
    }

    #[test]
    fn p_02_every_chain_is_in_one_place_and_comes_back_once(
        start in prop_oneof![0xfff0u16..=0xffff, 0u16..4, any::<u16>()],
        ops in proptest::collection::vec(op(), 1..200),
    ) {
        let mut driver = driver(false);
        let mut ring = ring_at(&mut driver, start, false);
        let mut free: Vec<u16> = (0..SIZE).collect();
        let (mut posted, mut flying, mut returned) = (VecDeque::new(), Vec::<Chain>::new(), VecDeque::new());
        let mut last = None;
        for op in ops {
            ring.begin_turn();
            match op {
                Op::Post | Op::PostBad => {
                    if let Some(head) = free.pop() {
                        let bad = matches!(op, Op::PostBad);
                        let flags = if bad { NEXT } else { 0 };
                        driver.describe(head, Descriptor { address: 0x1000, len: 4, flags, next: SIZE });
                        driver.offer(head);
                        posted.push_back((head, bad));
                    }
                }
                Op::Pop => {
                    while let Some((head, true)) = posted.front() {
                        returned.push_back(*head);
                        posted.pop_front();
                    }
                    let chain = ring.pop().unwrap();
                    prop_assert_eq!(chain.as_ref().map(Chain::head), posted.pop_front().map(|(head, _)| head));
                    last = chain.as_ref().map(Chain::head);
                    flying.extend(chain);
                }
                Op::Undo => {
                    if let Some(head) = last.take() {
                        let chain = flying.pop().unwrap();
                        prop_assert_eq!(chain.head(), head);
                        ring.undo(chain).unwrap();
                        posted.push_front((head, false));
                    }
                }
                Op::Complete(n) => {
                    last = None;
                    if !flying.is_empty() {
                        let chain = flying.remove(n % flying.len());
                        returned.push_back(chain.head());
                        ring.complete(chain, 4).unwrap();
                    }
                }
                Op::Publish => {
                    ring.publish().unwrap();
                    while let Some((head, _)) = driver.take() {
                        prop_assert_eq!(Some(head), returned.pop_front());
                        free.push(head);
                    }
                    prop_assert!(returned.is_empty(), "completed, published and not there: {:?}", returned);
                }
            }
            let count = free.len() + posted.len() + flying.len() + returned.len();
            // Refused chains are published at once, and so are those completed before them.
            prop_assert_eq!(count, usize::from(SIZE));
        }
    }
}
