//! The end of a memory file: whose memory it is and, where it has only what differs from another's, which pages those
//! are.
//!
//! ```text
//! offset        a whole memory                 changes
//! 0             RAM, zeroes are holes          the same; of pages that are the base's as well nothing is there
//! RAM           "mvm-ram\n", bytes of RAM, id  "mvm-diff", bytes of RAM, id, the base's id, count of pages
//! RAM + 1 page                                 a bit for each page, the lowest first, and zeroes to a page's end
//! ```
//!
//! That a page is a hole says nothing about whose it is, because files are copied by programs that make holes and fill
//! them: the bits do.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{Error, SnapshotId};
use crate::layout::PAGE_SIZE;
use crate::memory::Extent;

/// The first bytes of the end of a whole memory.
const WHOLE: [u8; 8] = *b"mvm-ram\n";
/// The same of changes.
const CHANGES: [u8; 8] = *b"mvm-diff";
/// Bytes of the end of a whole memory.
const WHOLE_BYTES: usize = 8 + 8 + 16;
/// Bytes of the end of changes, before the bits.
const CHANGES_BYTES: usize = WHOLE_BYTES + 16 + 8;

fn failed(source: io::Error) -> Error {
    Error::File { operation: "read the end of the memory", source }
}

/// Bytes of the file of a whole memory.
pub(super) fn whole_bytes(ram: u64) -> u64 {
    ram.saturating_add(PAGE_SIZE)
}

/// Writes the end of a whole memory.
pub(super) fn write_whole(file: &File, ram: u64, id: &SnapshotId) -> io::Result<()> {
    file.write_all_at(&[&WHOLE[..], &ram.to_le_bytes(), id].concat(), ram)
}

/// Whose memory `file` is, if it is a whole one of `extent`.
pub(super) fn whole_id(file: &File, extent: impl Into<Extent>) -> Result<SnapshotId, Error> {
    let ram = extent.into().bytes();
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() != whole_bytes(ram) {
        return Err(Error::Memory("it is no file of the right size"));
    }
    let mut end = [0; WHOLE_BYTES];
    file.read_exact_at(&mut end, ram).map_err(failed)?;
    let (words, id) = end.split_at(WHOLE_BYTES - size_of::<SnapshotId>());
    match SnapshotId::try_from(id) {
        Ok(id) if words == [WHOLE, ram.to_le_bytes()].concat() => Ok(id),
        _ => Err(Error::Memory("it is of another snapshot")),
    }
}

/// Which pages of RAM differ from a base's.
#[derive(Debug)]
pub(super) struct Changes {
    /// Whose memory the other pages are of.
    base: SnapshotId,
    ram: u64,
    bits: Vec<u8>,
}

impl Changes {
    /// None yet, of `ram` bytes.
    pub(super) fn none(ram: u64, base: SnapshotId) -> Self {
        let bits = ram.div_ceil(8 * PAGE_SIZE);
        Self { base, ram, bits: vec![0; usize::try_from(bits).unwrap_or_default()] }
    }

    /// The page at this offset of RAM does.
    pub(super) fn add(&mut self, offset: u64) {
        let page = offset / PAGE_SIZE;
        if let Some(byte) = usize::try_from(page / 8).ok().and_then(|byte| self.bits.get_mut(byte)) {
            *byte |= 1 << (page % 8);
        }
    }

    fn has(&self, page: u64) -> bool {
        let byte = usize::try_from(page / 8).ok().and_then(|byte| self.bits.get(byte));
        byte.is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    }

    /// Offsets of RAM within `range`, whole pages, as long runs as there are.
    pub(super) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (mut page, end) = (range.start / PAGE_SIZE, range.end / PAGE_SIZE);
        std::iter::from_fn(move || {
            page = (page..end).find(|page| self.has(*page))?;
            let start = page;
            page = (start..end).find(|page| !self.has(*page)).unwrap_or(end);
            Some(start * PAGE_SIZE..page * PAGE_SIZE)
        })
    }

    fn count(&self) -> u64 {
        self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// Bytes of the file.
    pub(super) fn file_bytes(&self) -> u64 {
        let bits = (self.bits.len() as u64).next_multiple_of(PAGE_SIZE);
        whole_bytes(self.ram).saturating_add(bits)
    }

    /// Writes the end of the file.
    pub(super) fn write(&self, file: &File, id: &SnapshotId) -> io::Result<()> {
        let count = self.count().to_le_bytes();
        let end = [&CHANGES[..], &self.ram.to_le_bytes(), id, &self.base, &count].concat();
        file.write_all_at(&end, self.ram)?;
        file.write_all_at(&self.bits, whole_bytes(self.ram))
    }

    /// Those that `file` has of snapshot `id`, with `base` below them.
    pub(super) fn read(file: &File, extent: Extent, id: &SnapshotId, base: &File) -> Result<Self, Error> {
        let mut changes = Self::none(extent.bytes(), whole_id(base, extent).map_err(Error::of_base)?);
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.len() != changes.file_bytes() {
            return Err(Error::Memory("it is no file of the right size"));
        }
        let (ram, mut end) = (changes.ram, [0; CHANGES_BYTES]);
        file.read_exact_at(&mut end, ram).map_err(failed)?;
        let rest = end.strip_prefix(&[&CHANGES[..], &ram.to_le_bytes(), id].concat()[..]);
        let rest = rest.ok_or(Error::Memory("it is of another snapshot"))?;
        let count = rest.strip_prefix(&changes.base).ok_or(Error::Base("it is another snapshot's"))?;
        file.read_exact_at(&mut changes.bits, whole_bytes(ram)).map_err(failed)?;
        if count != changes.count().to_le_bytes() {
            return Err(Error::Memory("it has more or fewer pages than it says"));
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_in_runs_that_end_where_they_are_asked_to() {
        let mut changes = Changes::none(4 << 20, [1; 16]);
        for page in [0, 1, 7, 8, 9, 511, 512, 1023] {
            changes.add(page * PAGE_SIZE + 5);
        }
        // Beyond the last.
        changes.add(4 << 20);
        let runs = |range: Range<u64>| -> Vec<_> {
            let runs = changes.runs(range.start * PAGE_SIZE..range.end * PAGE_SIZE);
            runs.map(|run| run.start / PAGE_SIZE..run.end / PAGE_SIZE).collect()
        };
        assert_eq!(runs(0..1024), [0..2, 7..10, 511..513, 1023..1024]);
        assert_eq!(runs(8..512), [8..10, 511..512]);
        assert_eq!(runs(2..7), []);
        assert_eq!(changes.count(), 8);
    }
}
