//! The pages that a machine needs when it goes on: recorded of one that did, brought in beforehand for those after it.
//!
//! ```text
//! offset
//! 0   8  "mvm-work"
//! 8   4  format, little endian as all else
//! 12  4  CRC-32 of everything else
//! 16  16 id of the snapshot
//! 32  8  bytes of RAM
//! 40  8  count of runs
//! 48  8  each: number of its first page, count of pages; the highest bit of the latter says that they were written
//! ```
//!
//! Runs are in order of address and do not touch each other unless one was written and the other not. The file may come
//! from anywhere; what is in it decides only what is in memory sooner than it would be.
#![allow(unsafe_code)] // asking for pages

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use mvm_devices::memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, Memory, VolatileSlice,
};

use super::{Error, SnapshotId, format};
use crate::control::MemoryMap;
use crate::layout::PAGE_SIZE;
use crate::memory::Extent;

const MAGIC: [u8; 8] = *b"mvm-work";
/// The format that is written, and the only one that is read.
const FORMAT: u32 = 1;
const HEADER: usize = 48;
/// Bytes of a run.
const RUN: usize = 8;
/// Most runs that are kept: the rest of the pages come when they are needed.
const MAX_RUNS: usize = 1 << 16;
/// In a run's count: the pages were written.
const WRITTEN: u32 = 1 << 31;
/// Entries of the page map that are read at a time.
const ENTRIES: usize = 8192;

/// Pages in a row of which the same is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    pages: u32,
    written: bool,
}

impl Run {
    /// Offsets of RAM.
    fn bytes(&self) -> Range<u64> {
        let first = u64::from(self.first);
        first * PAGE_SIZE..(first + u64::from(self.pages)) * PAGE_SIZE
    }
}

/// The pages that machines which go on from one snapshot need.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WorkingSet {
    runs: Vec<Run>,
}

/// Which pages are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// All that were touched, which saves reading them from a disk one after the other.
    Touched,
    /// Those that were written. Each takes two faults of the guest if it comes when it is written: KVM maps the file's page,
    /// which stands beside others that are there, and maps the copy when the first is gone.
    Written,
}

/// How many pages were recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Those that were read, or lay beside one that was.
    pub read: u64,
    /// Those that were written.
    pub written: u64,
}

/// Records in `to` the pages that a machine has needed since it went on. `pagemap` is `/proc/PID/pagemap` of its process,
/// and `map` its answer to [`crate::control::Request::MemoryMap`].
///
/// Of a page that comes from a file the map tells whether it still does: if not the machine has written it.
///
/// # Errors
/// The machine did not go on from a snapshot, or a file cannot be read or written.
pub fn record(pagemap: &File, map: &MemoryMap, needed: Needed, to: &File) -> Result<Recorded, Error> {
    let id = map.snapshot.ok_or(Error::WorkingSet("the machine did not go on from a snapshot"))?;
    let failed = |source| Error::File { operation: "read which pages there are", source };
    let (mut pages, mut ram) = (Pages::default(), 0_u64);
    for region in &map.regions {
        walk(pagemap, region.host, region.bytes, |page, written| {
            if written || needed == Needed::Touched {
                pages.add(ram / PAGE_SIZE + page, written);
            }
        })
        .map_err(failed)?;
        ram = ram.saturating_add(region.bytes);
    }
    pages.end();
    let bytes = encode(&id, ram, &pages.runs);
    to.write_all_at(&bytes, 0)
        .map_err(|source| Error::File { operation: "write the working set", source })?;
    Ok(pages.recorded)
}

/// Tells of each page from `host` on that is there, by its number, whether it is the process's own.
fn walk(pagemap: &File, host: u64, bytes: u64, mut page: impl FnMut(u64, bool)) -> io::Result<()> {
    /// The page is in memory, or swapped out.
    const THERE: u64 = 1 << 63 | 1 << 62;
    /// It is a file's, or shared.
    const FILE: u64 = 1 << 61;
    let (pages, mut buffer) = (bytes / PAGE_SIZE, vec![0; ENTRIES * size_of::<u64>()]);
    for first in (0..pages).step_by(ENTRIES) {
        let count = usize::try_from(pages - first).unwrap_or(ENTRIES).min(ENTRIES);
        let entries = buffer.get_mut(..count * size_of::<u64>()).unwrap_or_default();
        let at = (host / PAGE_SIZE).saturating_add(first).saturating_mul(size_of::<u64>() as u64);
        pagemap.read_exact_at(entries, at)?;
        for (number, entry) in (first..).zip(entries.as_chunks::<{ size_of::<u64>() }>().0) {
            let entry = u64::from_le_bytes(*entry);
            if entry & THERE != 0 {
                page(number, entry & FILE == 0);
            }
        }
    }
    Ok(())
}

/// Runs as they come to be.
#[derive(Default)]
struct Pages {
    runs: Vec<Run>,
    last: Option<Run>,
    recorded: Recorded,
}

impl Pages {
    fn add(&mut self, page: u64, written: bool) {
        let Ok(first) = u32::try_from(page) else { return };
        match &mut self.last {
            Some(run) if run.written == written && run.first.checked_add(run.pages) == Some(first) => {
                run.pages += 1;
            }
            _ => {
                self.end();
                self.last = Some(Run { first, pages: 1, written });
            }
        }
    }

    fn end(&mut self) {
        let Some(run) = self.last.take().filter(|_| self.runs.len() < MAX_RUNS) else { return };
        let count = if run.written { &mut self.recorded.written } else { &mut self.recorded.read };
        *count += u64::from(run.pages);
        self.runs.push(run);
    }
}

fn encode(id: &SnapshotId, ram: u64, runs: &[Run]) -> Vec<u8> {
    let (count, ram) = ((runs.len() as u64).to_le_bytes(), ram.to_le_bytes());
    let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes(), &[0; 4], id, &ram, &count].concat();
    for run in runs {
        let flag = if run.written { WRITTEN } else { 0 };
        bytes.extend(run.first.to_le_bytes());
        bytes.extend((run.pages | flag).to_le_bytes());
    }
    let sum = format::checksum(&bytes).to_le_bytes();
    bytes.iter_mut().skip(12).zip(sum).for_each(|(byte, value)| *byte = value);
    bytes
}

impl WorkingSet {
    /// That in `file`, if it is one of a machine of `extent` that goes on from snapshot `id`.
    pub(crate) fn read(file: &File, extent: Extent, id: &SnapshotId) -> Result<Self, Error> {
        let failed = |source| Error::File { operation: "read the working set", source };
        let length = file.metadata().map_err(failed)?.len();
        if length > (HEADER + MAX_RUNS * RUN) as u64 {
            return Err(Error::WorkingSet("it is longer than any"));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        Self::decode(&bytes, extent.bytes(), id)
    }

    fn decode(bytes: &[u8], ram: u64, id: &SnapshotId) -> Result<Self, Error> {
        let wrong = |what| Err(Error::WorkingSet(what));
        let Some(([magic @ .., f0, f1, f2, f3, c0, c1, c2, c3], rest)) = bytes.split_first_chunk::<16>()
        else {
            return wrong("it is none");
        };
        if *magic != MAGIC {
            return wrong("it is none");
        }
        if u32::from_le_bytes([*f0, *f1, *f2, *f3]) != FORMAT {
            return wrong("it has another format");
        }
        if u32::from_le_bytes([*c0, *c1, *c2, *c3]) != format::checksum(bytes) {
            return wrong("it is damaged");
        }
        let Some(rest) = rest.strip_prefix(&[&id[..], &ram.to_le_bytes()].concat()[..]) else {
            return wrong("it is another snapshot's");
        };
        let (runs, torn) = rest.get(8..).unwrap_or_default().as_chunks::<RUN>();
        if !torn.is_empty() || !rest.starts_with(&(runs.len() as u64).to_le_bytes()) {
            return wrong("it has more or fewer pages than it says");
        }
        let runs = runs.iter().map(|[p0, p1, p2, p3, n0, n1, n2, n3]| {
            let count = u32::from_le_bytes([*n0, *n1, *n2, *n3]);
            let first = u32::from_le_bytes([*p0, *p1, *p2, *p3]);
            Run { first, pages: count & !WRITTEN, written: count & WRITTEN != 0 }
        });
        let runs = runs.collect::<Vec<_>>();
        let mut end = 0;
        for run in &runs {
            let bytes = run.bytes();
            if bytes.is_empty() || bytes.start < end || bytes.end > ram {
                return wrong("its pages are in no order, or no memory's");
            }
            end = bytes.end;
        }
        Ok(Self { runs })
    }

    /// Brings the pages into `memory`, before a guest or a device can reach it. What was read stays the file's, and is
    /// shared; what was written becomes the machine's own.
    pub(crate) fn bring_in(&self, memory: &Memory) -> io::Result<()> {
        self.bring_in_by(memory, populate)
    }

    fn bring_in_by(
        &self,
        memory: &Memory,
        populate: impl Fn(&VolatileSlice<'_>, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut runs = self.runs.iter().peekable();
        let mut offset = 0;
        for region in memory.iter() {
            let (start, end) = (offset, region.len().saturating_add(offset));
            while let Some(run) = runs.peek() {
                let (bytes, written) = (run.bytes(), run.written);
                let (from, to) = (bytes.start.max(start), bytes.end.min(end));
                if from >= to {
                    break;
                }
                let length = usize::try_from(to - from).map_err(|_| io::ErrorKind::InvalidInput)?;
                let at = GuestAddress(region.start_addr().0.saturating_add(from - start));
                let slice = memory.get_slice(at, length).map_err(|_| io::ErrorKind::InvalidInput)?;
                populate(&slice, written)?;
                if bytes.end > end {
                    break;
                }
                runs.next();
            }
            offset = end;
        }
        Ok(())
    }
}

/// Has the pages of `slice` there, for reading or for writing.
fn populate(slice: &VolatileSlice<'_>, for_writing: bool) -> io::Result<()> {
    let advice = if for_writing { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let host = slice.ptr_guard_mut();
    loop {
        // SAFETY: the slice vouches for a live mapping of that length, of which no byte changes.
        if unsafe { libc::madvise(host.as_ptr().cast(), slice.len(), advice) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // Linux has it from 5.14 on.
            error if error.raw_os_error() == Some(libc::EINVAL) => return touch(slice, for_writing),
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            error => return Err(error),
        }
    }
}

/// The same on any kernel, page by page. Nobody else may write them meanwhile.
fn touch(slice: &VolatileSlice<'_>, for_writing: bool) -> io::Result<()> {
    for at in (0..slice.len()).step_by(PAGE_SIZE as usize) {
        let byte: u8 = slice.read_obj(at).map_err(io::Error::other)?;
        if for_writing {
            slice.write_obj(byte, at).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "working_tests.rs"]
mod tests;
