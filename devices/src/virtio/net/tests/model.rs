//! Whatever the layout of the buffers, frames arrive as they were sent.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// A header that fits a frame of `len` bytes.
fn head(len: usize) -> Header {
    if len < 54 { Header::default() } else { large() }
}

/// Cuts `bytes` into pieces of the given sizes, over and over.
fn cut<'a>(bytes: &'a [u8], sizes: &[usize], most: usize) -> Vec<&'a [u8]> {
    let (mut pieces, mut rest) = (Vec::new(), bytes);
    for size in sizes.iter().cycle().take(most - 1) {
        let (piece, after) = rest.split_at((*size).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn p08_the_tap_gets_the_bytes_after_the_header(
        len in 14..9000usize,
        sizes in vec(prop_oneof![Just(1usize), 1..40usize, 1..4000usize], 1..8),
        most in 1..100usize,
    ) {
        let (mut vm, wire, _) = card();
        let whole = [&[0; HEADER][..], &frame(len)].concat();
        vm.driver(TRANSMIT).post(&cut(&whole, &sizes, most), &[]);
        vm.kick(TRANSMIT);
        prop_assert_eq!(wire.take(), Some((Header::default(), frame(len))));
        prop_assert_eq!(vm.driver(TRANSMIT).take().map(|(_, len)| len), Some(0));
    }

    #[test]
    fn p08_the_driver_gets_each_frame_in_as_many_buffers_as_it_says(
        lens in vec(14..9000usize, 1..6),
        shapes in vec(vec(prop_oneof![Just(12u32), 12..80u32, 12..3000u32], 1..5), 1..6),
    ) {
        let (mut vm, wire, _) = card();
        let mut posted = Vec::new();
        let (mut descriptors, mut capacity) = (0, 0);
        for shape in shapes.iter().cycle() {
            descriptors += shape.len();
            capacity += shape.iter().sum::<u32>();
            if descriptors > 256 || capacity > 900_000 {
                break;
            }
            posted.push(offer_chain(&mut vm, shape));
        }
        let sent: Vec<_> = lens
            .iter()
            .scan(0, |sum, len| {
                *sum += *len as u32 + 12 + 3000 * 4; // a frame may leave its last chain nearly empty
                (*sum < capacity).then_some(*len)
            })
            .collect();
        vm.kick(RECEIVE);
        for len in &sent {
            wire.send(head(*len), &frame(*len));
        }
        vm.poll();
        let mut used = Vec::new();
        while let Some(entry) = vm.driver(RECEIVE).take() {
            used.push(entry);
        }
        let mut used = used.into_iter();
        for len in sent {
            let mut bytes = Vec::new();
            let mut buffers = 1;
            for i in 0.. {
                let (head, part) = used.next().unwrap();
                let buffer = posted.iter().find(|posted| posted.head == head).unwrap();
                let all = vm.driver(RECEIVE).written(buffer);
                bytes.extend_from_slice(&all[..part as usize]);
                prop_assert!(all[part as usize..].iter().all(|byte| *byte == 0xa5), "nothing past the length");
                if i == 0 {
                    buffers = split(&bytes).0.num_buffers;
                }
                if i + 1 == buffers {
                    break;
                }
                prop_assert_eq!(part as usize, all.len(), "only the last may have room left");
            }
            let (header, got) = split(&bytes);
            prop_assert_eq!(header, Header { num_buffers: buffers, ..head(len) });
            prop_assert_eq!(got, &frame(len)[..]);
        }
        prop_assert!(used.next().is_none(), "no more buffers than were said");
    }
}
