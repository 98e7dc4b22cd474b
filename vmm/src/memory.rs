//! Guest RAM: anonymous private mappings, and files mapped into them copy-on-write or read.
#![allow(unsafe_code)] // mapping a file over part of a region, and reading one into it

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mvm_devices::memory::{GuestAddress, GuestMemoryBackend, Memory};

use crate::config::MemSize;
use crate::error::{Error, Result};
use crate::layout::{self, PAGE_SIZE};

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// Makes `size` of zeroed RAM. Pages cost nothing until they are touched.
pub(crate) fn create(size: MemSize) -> Result<Memory> {
    let ranges: Vec<_> = layout::ram_regions(size.bytes())
        .into_iter()
        .map(|(start, length)| (GuestAddress(start), usize::try_from(length).unwrap_or(usize::MAX)))
        .collect();
    Memory::from_ranges(&ranges).map_err(|source| Error::Memory { mib: size.mib(), source })
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

    use mvm_devices::memory::Bytes;

    use super::*;

    fn memory() -> Memory {
        create(MemSize::try_from(4).unwrap()).unwrap()
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
