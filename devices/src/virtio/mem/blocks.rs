//! Which blocks of the region are plugged: a bit each.

use std::ops::Range;

/// One bit a block; how many there are is the host's choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Eight blocks each, the first in the lowest bit. Bits beyond the last block are 0.
    bytes: Vec<u8>,
    count: u64,
    plugged: u64,
}

/// What some blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Plugged,
    Unplugged,
    Mixed,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub(super) fn new(count: u64) -> Self {
        let bytes = usize::try_from(count.div_ceil(8)).unwrap_or(usize::MAX);
        Self { bytes: vec![0; bytes], count, plugged: 0 }
    }

    /// As many blocks as this has, as [`Blocks::bytes`] gave them; `None` if these are of another number of blocks, or
    /// if one from `end` on is plugged.
    pub(super) fn replaced(&self, bytes: &[u8], end: u64) -> Option<Self> {
        if bytes.len() != self.bytes.len() {
            return None;
        }
        let plugged = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let new = Self { bytes: bytes.to_vec(), count: self.count, plugged };
        let within = (0..end.min(self.count)).filter(|block| new.is_plugged(*block)).count();
        (u64::try_from(within) == Ok(plugged)).then_some(new)
    }

    /// The bits.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// What the blocks of `range` are; those that there are not are unplugged.
    pub(super) fn find(&self, range: Range<u64>) -> Found {
        let plugged = range.clone().filter(|block| self.is_plugged(*block)).count();
        match u64::try_from(plugged).unwrap_or(u64::MAX) {
            0 => Found::Unplugged,
            all if all == range.end.saturating_sub(range.start) => Found::Plugged,
            _ => Found::Mixed,
        }
    }

    /// Makes the blocks of `range` plugged or unplugged, as far as there are such.
    pub(super) fn set(&mut self, range: Range<u64>, plugged: bool) {
        for block in range.start..range.end.min(self.count) {
            let was = self.is_plugged(block);
            let Some((byte, bit)) = place(block).and_then(|(at, bit)| Some((self.bytes.get_mut(at)?, bit)))
            else {
                continue;
            };
            if plugged {
                *byte |= bit;
            } else {
                *byte &= !bit;
            }
            self.plugged = self.plugged.saturating_add(plugged.into()).saturating_sub(was.into());
        }
    }

    fn is_plugged(&self, block: u64) -> bool {
        place(block).and_then(|(at, bit)| Some(self.bytes.get(at)? & bit != 0)).unwrap_or(false)
    }
}

/// The byte a block's bit is in, and the bit.
fn place(block: u64) -> Option<(usize, u8)> {
    Some((usize::try_from(block / 8).ok()?, 1u8.checked_shl(u32::try_from(block % 8).ok()?)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_are_as_they_were_set_last(
            count in 1u64..70,
            steps in prop::collection::vec((0u64..80, 0u64..80, any::<bool>()), 0..20),
        ) {
            let mut blocks = Blocks::new(count);
            let mut model = vec![false; usize::try_from(count).unwrap()];
            for (start, len, plugged) in steps {
                blocks.set(start..start + len, plugged);
                model.iter_mut().skip(start as usize).take(len as usize).for_each(|bit| *bit = plugged);
                prop_assert_eq!(blocks.plugged(), model.iter().filter(|bit| **bit).count() as u64);
                let found = blocks.find(0..count);
                prop_assert_eq!(found == Found::Plugged, model.iter().all(|bit| *bit));
                prop_assert_eq!(found == Found::Unplugged, !model.iter().any(|bit| *bit));
            }
            for (block, bit) in (0..).zip(&model) {
                prop_assert_eq!(blocks.find(block..block + 1) == Found::Plugged, *bit);
            }
            let again = Blocks::new(count).replaced(blocks.bytes(), count).unwrap();
            prop_assert_eq!(&again, &blocks);
            let last = model.iter().rposition(|bit| *bit);
            if let Some(last) = last {
                prop_assert!(Blocks::new(count).replaced(blocks.bytes(), last as u64).is_none());
            }
        }
    }

    #[test]
    fn bits_of_another_number_of_blocks_are_refused() {
        let blocks = Blocks::new(12);
        assert!(blocks.replaced(&[0xff, 0x0f], 12).is_some());
        assert!(blocks.replaced(&[0xff, 0x1f], u64::MAX).is_none(), "a thirteenth");
        assert!(blocks.replaced(&[0xff], 12).is_none());
        assert!(blocks.replaced(&[0xff, 0, 0], 12).is_none());
    }
}
