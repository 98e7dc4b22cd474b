//! A machine's RAM as a file: written without its zeroes or what is another's, mapped back.
#![allow(unsafe_code)] // asking which pages there are, and writing guest memory without a copy

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use mvm_devices::memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, Memory};
use nix::unistd::{Whence, lseek};

use super::base::Base;
use super::changes::{self, Changes};
use super::{Error, SnapshotId};
use crate::layout::PAGE_SIZE;
use crate::memory::{self, Extent};

/// Bytes looked at before the next are: a megabyte and a half of page tables' worth.
const CHUNK: u64 = 64 << 20;
/// Most bytes per write: what was just looked at is still in the cache.
const MAX_WRITE: usize = 256 << 10;
/// A page as it is compared.
const PAGE: usize = PAGE_SIZE as usize;
/// Changed bytes in a row that are mapped, and shared with others that go on from there; fewer are read. 8 MiB in runs
/// of 4 pages take 1.9 ms mapped and 8.3 ms read; a page alone takes either way 5 us.
const MIN_MAPPED: u64 = 4 * PAGE_SIZE;
/// Most such runs that are mapped: the host grants a process 65 530 mappings, and each of these splits another.
const MAX_MAPPED: usize = 8192;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// A part of RAM whose pages are a file's until the guest writes them.
#[derive(Debug)]
pub(crate) struct Backed {
    /// Guest addresses.
    pub range: Range<u64>,
    /// The file, if its holes are worth asking for, and where in it the range begins.
    pub file: Option<(Arc<File>, u64)>,
}

/// Replaces what is in `file` by `memory`, `backed` parts of which come from files, or by what of it differs from a
/// base. Returns how many bytes are no holes.
///
/// Pages that nobody touched are not read: it would bring them into being.
pub(crate) fn save(
    memory: &Memory,
    backed: &[Backed],
    base: Option<Base>,
    id: &SnapshotId,
    file: &File,
) -> Result<u64, Error> {
    let failed = |source| Error::File { operation: "write the memory", source };
    let ram: u64 = memory.iter().map(|region| region.len()).sum();
    let bytes = base.as_ref().map_or(changes::whole_bytes(ram), |base| base.changes.file_bytes());
    file.set_len(0).and_then(|()| file.set_len(bytes)).map_err(failed)?;
    let mut writer = Writer { file, base, written: 0 };
    let mut offset = 0;
    for region in memory.iter() {
        let (start, length) = (region.start_addr().0, region.len());
        for at in (0..length).step_by(CHUNK as usize) {
            let bytes = CHUNK.min(length - at);
            writer.save(memory, backed, start + at..start + at + bytes, offset + at).map_err(failed)?;
        }
        offset += length;
    }
    let ended = match &writer.base {
        None => changes::write_whole(file, ram, id),
        Some(base) => base.changes.write(file, id),
    };
    ended.map_err(failed)?;
    Ok(writer.written.saturating_add(bytes - ram))
}

/// Memory of `extent` that is what `file` holds, if that is the memory of snapshot `id`: a whole one, or changes to `base`.
///
/// Pages are the files' until the guest writes them. The files must stay as long as they are: a page that is no more
/// ends the machine's process.
pub(crate) fn map(
    extent: impl Into<Extent>,
    file: File,
    base: Option<File>,
    id: &SnapshotId,
) -> Result<(Memory, Vec<Backed>), Error> {
    let extent = extent.into();
    let failed = |source| Error::File { operation: "map the memory", source };
    let (whole, changed) = match base {
        None if changes::whole_id(&file, extent)? == *id => (file, None),
        None => return Err(Error::Memory("it is of another snapshot")),
        Some(base) => {
            let changes = Changes::read(&file, extent, id, &base)?;
            (base, Some((changes, Arc::new(file))))
        }
    };
    let memory = memory::create(extent).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    let whole = Arc::new(whole);
    let (mut offset, mut backed, mut mapped) = (0_u64, Vec::new(), 0);
    for (start, length) in extent.regions() {
        let (range, end) = (start..start.saturating_add(length), offset.saturating_add(length));
        memory::map_file(&memory, &whole, offset, start, length).map_err(failed)?;
        backed.push(Backed { range: range.clone(), file: Some((Arc::clone(&whole), offset)) });
        if let Some((changes, file)) = &changed {
            for run in changes.runs(offset..end) {
                let (at, bytes) = (start + (run.start - offset), run.end - run.start);
                if bytes < MIN_MAPPED || mapped == MAX_MAPPED {
                    memory::read_file(&memory, file, run.start, at, bytes).map_err(failed)?;
                } else {
                    mapped += 1;
                    memory::map_file(&memory, file, run.start, at, bytes).map_err(failed)?;
                }
            }
            backed.push(Backed { range, file: Some((Arc::clone(file), offset)) });
        }
        offset = end;
    }
    Ok((memory, backed))
}

struct Writer<'a> {
    file: &'a File,
    base: Option<Base>,
    written: u64,
}

impl Writer<'_> {
    /// Saves `range`, which lies in one region, at `offset` of the file.
    fn save(&mut self, memory: &Memory, backed: &[Backed], range: Range<u64>, offset: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let length = usize::try_from(range.end - range.start).map_err(|_| invalid())?;
        let slice = memory.get_slice(GuestAddress(range.start), length).map_err(|_| invalid())?;
        let host = slice.ptr_guard();
        let mut there = touched(host.as_ptr(), length)?;
        for part in backed {
            part.mark(&range, &mut there)?;
        }
        // Pages that are swapped out look untouched. Looked at after the pages, so that it is no less than then.
        if swap_in_use() {
            there.fill(1);
        }
        let below = self.base.as_ref().map(|base| base.data(&range, offset)).transpose()?;
        let mut run = 0..0;
        for (page, there) in there.iter().enumerate() {
            let at = page * PAGE;
            // SAFETY: `slice` vouches for `length` bytes at `host`, and the page ends within them: there is one
            // `there` for each whole page.
            let from = unsafe { host.as_ptr().add(at) };
            let zero = there & 1 == 0 || is(from, &ZEROES);
            if let (Some(base), Some(below)) = (&mut self.base, &below) {
                let below = below.get(page..).unwrap_or_default();
                if !base.compare(offset + at as u64, below, zero, |other| is(from, other))? {
                    continue;
                }
            }
            // Of a page that came to be all zeroes there is no more than the bit.
            if zero {
                continue;
            }
            if run.end != at || run.len() >= MAX_WRITE {
                self.write(host.as_ptr(), run, offset)?;
                run = at..at;
            }
            run.end = at + PAGE;
        }
        self.write(host.as_ptr(), run, offset)
    }

    /// Writes bytes `run` from `host` to the file at `offset` and as much further.
    fn write(&mut self, host: *const u8, mut run: Range<usize>, offset: u64) -> io::Result<()> {
        self.written = self.written.saturating_add(run.len() as u64);
        while !run.is_empty() {
            let at = offset.checked_add(run.start as u64).and_then(|at| libc::off_t::try_from(at).ok());
            let at = at.ok_or(io::ErrorKind::InvalidInput)?;
            // SAFETY: the run lies in the slice that `host` is the beginning of (see the caller).
            let from = unsafe { host.add(run.start) };
            // SAFETY: `from` has `run.len()` mapped bytes, which only the kernel reads.
            let written = unsafe { libc::pwrite(self.file.as_raw_fd(), from.cast(), run.len(), at) };
            match usize::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => run.start += count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

impl Backed {
    /// Marks in `there`, the pages of `range`, those that the file may have bytes for.
    pub(super) fn mark(&self, range: &Range<u64>, there: &mut [u8]) -> io::Result<()> {
        let both = self.range.start.max(range.start)..self.range.end.min(range.end);
        let Some((file, offset)) = &self.file else {
            mark_pages(&both, range.start, there);
            return Ok(());
        };
        // From guest addresses to the file, and back.
        let in_file = |at: u64| at - self.range.start + offset;
        let mut at = both.start;
        while at < both.end {
            let Some(data) = seek(file, in_file(at), Whence::SeekData)? else { break };
            let end = seek(file, data, Whence::SeekHole)?.unwrap_or(u64::MAX);
            let start = (data.saturating_sub(*offset)).saturating_add(self.range.start);
            let end = (end.saturating_sub(*offset)).saturating_add(self.range.start).min(both.end);
            mark_pages(&(start..end), range.start, there);
            at = end.max(at + PAGE_SIZE);
        }
        Ok(())
    }
}

/// Marks the pages of `range` in `there`, whose first page is at `first`.
fn mark_pages(range: &Range<u64>, first: u64, there: &mut [u8]) {
    let page = |at: u64| usize::try_from(at.saturating_sub(first)).unwrap_or(usize::MAX);
    let (start, end) = (page(range.start) / PAGE, page(range.end).div_ceil(PAGE));
    there.iter_mut().take(end).skip(start).for_each(|page| *page = 1);
}

/// Where data or a hole begins at `offset` or after it; `None` beyond the last.
fn seek(file: &File, offset: u64, what: Whence) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    match lseek(file, offset, what) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// For each page from `host` on, whether it is in memory.
fn touched(host: *const u8, length: usize) -> io::Result<Vec<u8>> {
    let mut pages = vec![0; length.div_ceil(PAGE)];
    // SAFETY: the range is mapped (see the caller), and there is a byte for each of its pages.
    let asked = unsafe { libc::mincore(host.cast_mut().cast(), length, pages.as_mut_ptr()) };
    if asked == 0 { Ok(pages) } else { Err(io::Error::last_os_error()) }
}

/// Whether the host has swapped anything out, or does not say.
fn swap_in_use() -> bool {
    nix::sys::sysinfo::sysinfo().map_or(true, |host| host.swap_free() != host.swap_total())
}

/// Whether the page at `page` is what is in `other`. The C library compares as wide as the CPU can.
fn is(page: *const u8, other: &[u8]) -> bool {
    let length = other.len().min(PAGE);
    // SAFETY: all of the page is mapped (see the caller), and a guest that could change it is held; `other` has as
    // many bytes.
    length == PAGE && unsafe { libc::memcmp(page.cast(), other.as_ptr().cast(), length) == 0 }
}

#[cfg(test)]
mod tests {
    use std::os::linux::fs::MetadataExt;
    use std::os::unix::fs::FileExt;

    use mvm_devices::memory::Bytes;

    use super::*;
    use crate::config::MemSize;
    use crate::layout;

    const ID: SnapshotId = [7; 16];

    fn size() -> MemSize {
        MemSize::try_from(4).unwrap()
    }

    fn again(file: &File) -> File {
        file.try_clone().unwrap()
    }

    #[test]
    fn what_is_saved_is_mapped_and_zeroes_are_holes() {
        let memory = memory::create(size()).unwrap();
        let words = [0, 4088, 8192, 0x10_0000, 0x3f_fff8];
        for at in words {
            memory.write_obj(at + 1, GuestAddress(at)).unwrap();
        }
        // Touched, and zero all the same.
        memory.write_obj(0u64, GuestAddress(0x20_0000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 100_000], 0x8_0000).unwrap();
        let written = save(&memory, &[], None, &ID, &file).unwrap();
        assert_eq!(written, 5 * PAGE_SIZE, "four pages and the last");
        assert_eq!(file.metadata().unwrap().len(), (4 << 20) + PAGE_SIZE);
        assert!(file.metadata().unwrap().st_blocks() * 512 <= 64 << 10, "it has holes");

        let (mapped, _) = map(size(), again(&file), None, &ID).unwrap();
        let bytes = |memory: &Memory| {
            let mut bytes = vec![0; 4 << 20];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        assert!(bytes(&mapped) == bytes(&memory));
    }

    #[test]
    fn what_was_plugged_is_saved_and_mapped_behind_the_ram() {
        let extent = Extent { ram: size(), pluggable: 256 << 20, shown: 128 << 20 };
        let memory = memory::create(extent).unwrap();
        let (first, last) = (layout::HOLE_END, layout::HOLE_END + (128 << 20) - 8);
        memory.write_obj(5u64, GuestAddress(first)).unwrap();
        memory.write_obj(6u64, GuestAddress(last)).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(save(&memory, &[], None, &ID, &file).unwrap(), 3 * PAGE_SIZE, "two pages and the last");
        assert!(map(size(), again(&file), None, &ID).is_err(), "nothing of it may be left out");
        let (mapped, _) = map(extent, file, None, &ID).unwrap();
        let words = [first, last, first + 4096].map(|at| mapped.read_obj::<u64>(GuestAddress(at)).unwrap());
        assert_eq!(words, [5, 6, 0]);
        let hidden = mapped.iter().last().unwrap();
        memory::open(hidden, 256 << 20).unwrap();
        hidden.show(256 << 20);
        assert_eq!(mapped.read_obj::<u64>(GuestAddress(last + 8)).unwrap(), 0, "what comes later is empty");
    }

    #[test]
    fn machines_from_one_file_do_not_see_each_other_and_a_changed_one_is_saved_with_its_changes() {
        let first = memory::create(size()).unwrap();
        first.write_obj(1u64, GuestAddress(0)).unwrap();
        first.write_obj(2u64, GuestAddress(0x30_0000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        save(&first, &[], None, &ID, &file).unwrap();

        let (a, backed) = map(size(), again(&file), None, &ID).unwrap();
        let (b, _) = map(size(), again(&file), None, &ID).unwrap();
        a.write_obj(3u64, GuestAddress(0x30_0000)).unwrap();
        a.write_obj(4u64, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(b.read_obj::<u64>(GuestAddress(0x30_0000)).unwrap(), 2);
        assert_eq!(b.read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0);

        let second = tempfile::tempfile().unwrap();
        let written = save(&a, &backed, None, &[8; 16], &second).unwrap();
        assert_eq!(written, 4 * PAGE_SIZE, "three pages and the last");
        let (c, _) = map(size(), second, None, &[8; 16]).unwrap();
        let words = [0, 0x10_0000, 0x30_0000].map(|at| c.read_obj::<u64>(GuestAddress(at)).unwrap());
        assert_eq!(words, [1, 4, 3]);
    }

    #[test]
    fn a_file_of_an_image_is_saved_whether_or_not_it_was_looked_at() {
        let mut image = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut image, &[5; 8192]).unwrap();
        let memory = memory::create(size()).unwrap();
        memory::map_file(&memory, &image, 0, 0x10_0000, 8192).unwrap();
        let file = tempfile::tempfile().unwrap();
        let backed = Backed { range: 0x10_0000..0x10_2000, file: None };
        save(&memory, &[backed], None, &ID, &file).unwrap();
        let (mapped, _) = map(size(), file, None, &ID).unwrap();
        assert_eq!(mapped.read_obj::<u8>(GuestAddress(0x10_1fff)).unwrap(), 5);
    }

    #[test]
    fn memory_of_another_size_or_snapshot_is_refused() {
        let memory = memory::create(size()).unwrap();
        let file = tempfile::tempfile().unwrap();
        save(&memory, &[], None, &ID, &file).unwrap();
        let refused = |size: MemSize, id| map(size, again(&file), None, id).unwrap_err().to_string();
        assert!(refused(MemSize::try_from(5).unwrap(), &ID).contains("right size"));
        assert!(refused(size(), &[8; 16]).contains("another snapshot"));
        file.set_len(4 << 20).unwrap();
        assert!(refused(size(), &ID).contains("right size"));
        let null = File::open("/dev/null").unwrap();
        assert!(map(size(), null, None, &ID).is_err());
    }
}
