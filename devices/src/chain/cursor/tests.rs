//! A cursor against a plain run of bytes, over any layout and any way of moving through it.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::memory::Bytes;
use crate::testing::{HIGH, memory};

#[derive(Clone, Copy, Debug)]
enum Move {
    /// Passes over so many bytes.
    Skip(u32),
    /// Goes on with the front of so many bytes.
    Front(u32),
    /// Goes on with what follows such a front.
    Rest(u32),
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        (0u32..12).prop_map(Move::Skip),
        (0u32..40).prop_map(Move::Front),
        (0u32..20).prop_map(Move::Rest)
    ]
}

/// Bytes 0, 1, 2 … in buffers of `lens`, in two regions by turns and never adjacent.
fn lay_out(memory: &Memory, lens: &[u32]) -> Vec<Segment> {
    let (mut next, mut segments) = (0u8, Vec::new());
    for (index, len) in (0u64..).zip(lens) {
        let address = GuestAddress(index * 0x100 + if index % 3 == 2 { HIGH } else { 0 });
        let bytes: Vec<u8> = (0..*len).map(|offset| next + u8::try_from(offset).unwrap()).collect();
        memory.write_slice(&bytes, address).unwrap();
        next += u8::try_from(*len).unwrap();
        segments.push(Segment::new(&memory.get_slice(address, bytes.len()).unwrap()));
    }
    segments
}

fn seen(cursor: &Cursor<'_>, max: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slice in cursor.slices(max) {
        let mut part = vec![0; slice.len()];
        slice.copy_to(&mut part);
        bytes.extend(part);
    }
    bytes
}

proptest! {
    #[test]
    fn any_way_through_any_layout_sees_the_bytes_in_order(
        lens in vec(1u32..9, 0..24), moves in vec(moves(), 0..12), max in 0u32..64,
    ) {
        let memory = memory();
        let segments = lay_out(&memory, &lens);
        let total = lens.iter().sum::<u32>();
        let mut cursor = Cursor::new(&memory, &segments, total);
        let (mut start, mut end, mut passed) = (0, total, 0);
        for step in moves {
            let (Move::Skip(n) | Move::Front(n) | Move::Rest(n)) = step;
            if n > end - start {
                prop_assert_eq!(cursor.skip(n), Err(ChainError::Short));
                prop_assert!(cursor.split_to(n).is_err());
            } else {
                match step {
                    Move::Skip(_) => {
                        cursor.skip(n).unwrap();
                        (start, passed) = (start + n, passed + n);
                    }
                    Move::Front(_) => {
                        cursor = cursor.split_to(n).unwrap();
                        (end, passed) = (start + n, 0);
                    }
                    Move::Rest(_) => {
                        let front = cursor.split_to(n).unwrap();
                        let expected: Vec<_> = (start..start + n).map(|byte| u8::try_from(byte).unwrap()).collect();
                        prop_assert_eq!(seen(&front, u32::MAX), expected);
                        (start, passed) = (start + n, passed + n);
                    }
                }
            }
            let expected: Vec<_> = (start..end).map(|byte| u8::try_from(byte).unwrap()).collect();
            prop_assert_eq!((cursor.remaining(), cursor.passed()), (end - start, passed));
            prop_assert_eq!(&seen(&cursor, u32::MAX), &expected);
            prop_assert_eq!(&seen(&cursor, max)[..], &expected[..expected.len().min(max as usize)]);
        }
    }
}
