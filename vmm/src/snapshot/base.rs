//! The memory of a snapshot that another is to have the changes of only.
//!
//! Pages are compared, and nobody takes note of who writes them: neither the guest's writes nor the devices' are counted
//! while the machine runs, and any snapshot of a machine of the same size can be the base.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Error;
use super::changes::{self, Changes};
use super::pages::Backed;
use crate::layout::PAGE_SIZE;
use crate::memory::Extent;

/// Bytes that are read at a time: they are in the cache when they are compared.
const WINDOW: usize = 256 << 10;
/// A page of nothing.
const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// A whole memory, and what differs from it.
#[derive(Debug)]
pub(crate) struct Base {
    file: Arc<File>,
    /// The pages that do.
    pub(super) changes: Changes,
    window: Vec<u8>,
    /// Where in the file the window is.
    at: Range<u64>,
}

impl Base {
    /// That in `file`, if it is the whole memory of a machine of `extent`.
    pub(crate) fn new(file: File, extent: impl Into<Extent>) -> Result<Self, Error> {
        let extent = extent.into();
        let id = changes::whole_id(&file, extent).map_err(Error::of_base)?;
        let changes = Changes::none(extent.bytes(), id);
        Ok(Self { file: Arc::new(file), changes, window: vec![0; WINDOW], at: 0..0 })
    }

    /// For each page of guest addresses `range`, which is at `offset` of the file, whether there may be bytes for it.
    pub(super) fn data(&self, range: &Range<u64>, offset: u64) -> io::Result<Vec<u8>> {
        let pages = usize::try_from((range.end - range.start) / PAGE_SIZE);
        let mut there = vec![0; pages.map_err(|_| io::ErrorKind::InvalidInput)?];
        let part = Backed { range: range.clone(), file: Some((Arc::clone(&self.file), offset)) };
        part.mark(range, &mut there).map(|()| there)
    }

    /// Whether a page differs from that at `offset`; that is kept. It is all zeroes, or what `is` tells. `data` says of
    /// this page and those after it whether there may be bytes for them.
    pub(super) fn compare(
        &mut self,
        offset: u64,
        data: &[u8],
        zero: bool,
        is: impl Fn(&[u8]) -> bool,
    ) -> io::Result<bool> {
        let same = match (data.first() == Some(&1), zero) {
            (false, zero) => zero,
            (true, true) => self.page(offset, data)? == ZEROES,
            (true, false) => is(self.page(offset, data)?),
        };
        if !same {
            self.changes.add(offset);
        }
        Ok(!same)
    }

    /// The page at `offset` of RAM.
    fn page(&mut self, offset: u64, data: &[u8]) -> io::Result<&[u8]> {
        if !self.at.contains(&offset) {
            // No further than the next hole: the host would fill it in its memory.
            let pages = data.iter().take(WINDOW / ZEROES.len()).take_while(|data| **data == 1).count();
            let window = self.window.get_mut(..pages * ZEROES.len()).unwrap_or_default();
            self.at = 0..0;
            self.file.read_exact_at(window, offset)?;
            self.at = offset..offset.saturating_add(window.len() as u64);
        }
        let start = usize::try_from(offset - self.at.start).unwrap_or_default();
        let page = self.window.get(start..).and_then(|rest| rest.get(..ZEROES.len()));
        page.ok_or(io::ErrorKind::UnexpectedEof.into())
    }
}
