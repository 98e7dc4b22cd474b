//! Guest RAM: anonymous private mappings, and files mapped into them copy-on-write.
#![allow(unsafe_code)] // mapping a file over part of a region

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mvm_devices::memory::{GuestAddress, GuestMemoryBackend, Memory};

use crate::config::MemSize;
use crate::error::{Error, Result};
use crate::layout::{self, PAGE_SIZE};

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
    fn mapping_outside_ram_or_off_page_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let memory = memory();
        assert!(map_file(&memory, &file, 0, 0x3f_f000, 8192).is_err());
        assert!(map_file(&memory, &file, 0, 0x1001, 4096).is_err());
        assert!(map_file(&memory, &file, 512, 0x1000, 4096).is_err());
        assert!(map_file(&memory, &file, 0, u64::MAX - 4095, 4096).is_err());
    }
}
