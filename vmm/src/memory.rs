//! Guest RAM: anonymous private mappings, and files mapped into them copy-on-write or read.
#![allow(unsafe_code)] // mapping a file over part of a region, reading one into it, and opening one

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mvm_devices::memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap, Memory, NoMemory, Region};
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder};

use crate::config::{MachineConfig, MemSize};
use crate::error::{Error, Result};
use crate::layout::{self, PAGE_SIZE};

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// How much memory a machine has, and can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// What it boots with.
    pub ram: MemSize,
    /// Bytes that can be plugged into it at most.
    pub pluggable: u64,
    /// Bytes of these that the guest has already.
    pub shown: u64,
}

impl Extent {
    /// That of a machine that boots.
    pub(crate) fn of(config: &MachineConfig) -> Result<Self> {
        Ok(Self { ram: config.memory, pluggable: config.pluggable()?, shown: 0 })
    }

    /// Bytes the guest has: RAM, and what it may have plugged.
    pub(crate) fn bytes(&self) -> u64 {
        self.ram.bytes().saturating_add(self.shown)
    }

    /// What of it the guest has: `(start, length)` of each region, in order of address.
    pub(crate) fn regions(&self) -> Vec<(u64, u64)> {
        let mut regions = layout::ram_regions(self.ram.bytes());
        if self.shown > 0 {
            regions.push((layout::pluggable(self.ram.bytes()), self.shown));
        }
        regions
    }
}

impl From<MemSize> for Extent {
    /// Memory of this size and no more.
    fn from(ram: MemSize) -> Self {
        Self { ram, pluggable: 0, shown: 0 }
    }
}

/// Makes zeroed memory. Pages cost nothing until they are touched, nor does what is not shown.
pub(crate) fn create(extent: impl Into<Extent>) -> Result<Memory> {
    let extent = extent.into();
    let map = |start, length| {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        GuestRegionMmap::from_range(GuestAddress(start), length, None).map_err(NoMemory::Region)
    };
    let ram = layout::ram_regions(extent.ram.bytes());
    let mut regions: Vec<_> =
        ram.into_iter().map(|(start, length)| map(start, length).map(Region::from)).collect();
    if extent.pluggable > 0 {
        regions.push(reserve(layout::pluggable(extent.ram.bytes()), extent.pluggable));
    }
    let regions = regions.into_iter().collect::<Result<_, _>>();
    let failed = |source| Error::Memory { mib: extent.bytes() >> 20, source };
    let memory = regions.and_then(Memory::new).map_err(failed)?;
    match memory.iter().last() {
        Some(region) if extent.shown > 0 => {
            open(region, extent.shown).map_err(Error::system("open pluggable memory"))?;
            region.show(extent.shown);
        }
        _ => {}
    }
    Ok(memory)
}

/// Addresses for memory that may be plugged one day. Nobody can access them, so that no host counts them.
fn reserve(start: u64, length: u64) -> Result<Region, NoMemory> {
    let mapped = MmapRegionBuilder::new(usize::try_from(length).unwrap_or(usize::MAX))
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(FromRangesError::MmapRegion)?;
    let mapped = GuestRegionMmap::new(mapped, GuestAddress(start));
    Ok(Region::hidden(mapped.ok_or(FromRangesError::InvalidGuestRegion)?))
}

/// Lets the first `bytes` of a region be accessed, before they are shown.
pub(crate) fn open(region: &Region, bytes: u64) -> io::Result<()> {
    let length = usize::try_from(bytes.min(region.mapped())).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: all of the region is mapped for as long as it is there, and what is within is plain memory, of which
    // no reference is ever made.
    let opened =
        unsafe { libc::mprotect(region.as_ptr().cast(), length, libc::PROT_READ | libc::PROT_WRITE) };
    if opened == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Maps `length` bytes of `file` from `offset` at guest address `at`: readable and writable, private, read
/// from the page cache on first touch and shared with every other machine until written.
///
/// All three must be multiples of the page size, and the range must lie in one region of `memory`.
pub(crate) fn map_file(memory: &Memory, file: &File, offset: u64, at: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    if !(offset | at | length).is_multiple_of(PAGE_SIZE) {
        return Err(invalid());
    }
    let length = usize::try_from(length).map_err(|_| invalid())?;
    let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
    let slice = memory.get_slice(GuestAddress(at), length).map_err(|_| invalid())?;
    let host = slice.ptr_guard_mut();
    // SAFETY: `get_slice` vouches that [host, host + length) lies inside one live mapping that `memory` owns;
    // both ends are page-aligned, so nothing outside it is replaced. `memory` goes on to own and unmap the
    // range. Guest memory is only reached through volatile accesses, so no reference sees it change.
    let mapped = unsafe {
        libc::mmap(
            host.as_ptr().cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Backs the huge page around guest address `at` by small pages, for a block of which little will be touched.
/// A hint: without it the machine takes up to 2 MiB more.
pub(crate) fn small_pages_around(memory: &Memory, at: u64) {
    let start = at & !(HUGE_PAGE - 1);
    let Ok(slice) = memory.get_slice(GuestAddress(start), HUGE_PAGE as usize) else { return };
    // SAFETY: the slice vouches for a live mapping of that length; the advice changes no byte of it.
    let _ =
        unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), libc::MADV_NOHUGEPAGE) };
}

/// Reads exactly `length` bytes of `file` from `offset` into guest memory at `at`.
///
/// The range must lie in one region of `memory`. It goes there directly, through no buffer.
pub(crate) fn read_file(memory: &Memory, file: &File, offset: u64, at: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let length = usize::try_from(length).map_err(|_| invalid())?;
    let slice = memory.get_slice(GuestAddress(at), length).map_err(|_| invalid())?;
    let mut done = 0;
    while done < length {
        let rest = slice.offset(done).map_err(|_| invalid())?;
        let position = offset.checked_add(done as u64).and_then(|at| libc::off_t::try_from(at).ok());
        let host = rest.ptr_guard_mut();
        // SAFETY: `rest` vouches for `rest.len()` bytes at `host` inside a live mapping of guest memory, which
        // is only accessed volatilely, so the kernel may write it at any time.
        let read = unsafe {
            libc::pread(file.as_raw_fd(), host.as_ptr().cast(), rest.len(), position.ok_or_else(invalid)?)
        };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mvm_devices::memory::{Bytes, GuestMemoryRegion};

    use super::*;

    fn memory() -> Memory {
        create(MemSize::try_from(4).unwrap()).unwrap()
    }

    #[test]
    fn pluggable_memory_is_there_as_far_as_it_is_shown() {
        let extent = Extent { ram: 4.try_into().unwrap(), pluggable: 256 << 20, shown: 128 << 20 };
        let memory = create(extent).unwrap();
        let there: Vec<_> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        assert_eq!(there, extent.regions());
        assert_eq!(there, [(0, 4 << 20), (layout::HOLE_END, 128 << 20)]);
        assert_eq!(extent.bytes(), 132 << 20);
        let last = GuestAddress(layout::HOLE_END + (128 << 20) - 1);
        memory.write_obj(7u8, last).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(last.0 + 1)).is_err());
    }

    #[test]
    fn a_mapped_file_is_seen_and_writes_stay_private() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let memory = memory();
        map_file(&memory, &file, 4096, 0x10_0000, 4096).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0fff)).unwrap(), 7);
        memory.write_obj(9u8, GuestAddress(0x10_0000)).unwrap();
        map_file(&memory, &file, 4096, 0x20_0000, 4096).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x20_0000)).unwrap(), 7);
    }

    #[test]
    fn a_read_file_is_there_and_a_short_one_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let memory = memory();
        read_file(&memory, &file, 3, 0x1001, 7).unwrap();
        assert_eq!(memory.read_obj::<[u8; 8]>(GuestAddress(0x1001)).unwrap(), *b"3456789\0");
        let error = read_file(&memory, &file, 3, 0x1001, 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(read_file(&memory, &file, 0, 0x3f_ffff, 2).is_err());
    }

    #[test]
    fn mapping_outside_ram_or_off_page_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let memory = memory();
        assert!(map_file(&memory, &file, 0, 0x3f_f000, 8192).is_err());
        assert!(map_file(&memory, &file, 0, 0x1001, 4096).is_err());
        assert!(map_file(&memory, &file, 512, 0x1000, 4096).is_err());
        assert!(map_file(&memory, &file, 0, u64::MAX - 4095, 4096).is_err());
    }
}
