//! Huge pages of a saved memory: what machines that go on from it read and never write, above all their kernel.
#![allow(unsafe_code)] // mapping a file, and advice about the mapping

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::memory::HUGE_PAGE;

/// Turns the pages of `memory` that lie in `range`, offsets of it, into huge pages as far as they fill such.
///
/// Whoever maps them has 512 pages with one fault, and so has a guest. Holes among them are filled. It takes Linux 6.1;
/// for a file on a disk also `CONFIG_READ_ONLY_THP_FOR_FS`, that all of it was written back, that nobody has it open for
/// writing, and a file system that programs may be run from.
pub fn gather(memory: &File, range: Range<u64>) -> io::Result<()> {
    let start = range.start.checked_next_multiple_of(HUGE_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
    let end = range.end.min(memory.metadata()?.len()) & !(HUGE_PAGE - 1);
    if start >= end {
        return Ok(());
    }
    let mapping = Mapping::new(memory, start, end - start)?;
    // SAFETY: the range is the mapping's; the advice changes no byte of it.
    let advised = unsafe { libc::madvise(mapping.host, mapping.length, libc::MADV_COLLAPSE) };
    if advised == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A part of a file, in memory where a huge page may begin.
struct Mapping {
    reserved: *mut libc::c_void,
    reserved_length: usize,
    host: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    /// Of `length` bytes from `offset` on, both multiples of a huge page.
    fn new(file: &File, offset: u64, length: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = libc::off_t::try_from(offset).map_err(invalid)?;
        let reserved_length = usize::try_from(length.saturating_add(HUGE_PAGE)).map_err(invalid)?;
        let length = usize::try_from(length).map_err(invalid)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, which replaces none.
        let reserved =
            unsafe { libc::mmap(std::ptr::null_mut(), reserved_length, libc::PROT_NONE, flags, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let into = reserved.align_offset(HUGE_PAGE as usize);
        let host = reserved.cast::<u8>().wrapping_add(into).cast();
        let mapping = Self { reserved, reserved_length, host, length };
        // Linux makes huge pages of a disk's file for those alone who could run it.
        for access in [libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ] {
            // SAFETY: the first place for a huge page in what was reserved has `length` bytes in it: there is one huge
            // page more than that.
            let mapped = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
                libc::mmap(host, length, access, flags, file.as_raw_fd(), offset)
            };
            if mapped != libc::MAP_FAILED {
                return Ok(mapping);
            }
        }
        Err(io::Error::last_os_error())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped in `new`, and nothing refers to what is in it.
        unsafe { libc::munmap(self.reserved, self.reserved_length) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A file of `bytes` in memory, each page of which says which it is.
    fn file(bytes: u64) -> File {
        let file = File::from(
            nix::sys::memfd::memfd_create("huge", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap(),
        );
        file.set_len(bytes).unwrap();
        for at in (0..bytes).step_by(4096) {
            file.write_all_at(&at.to_le_bytes(), at).unwrap();
        }
        file
    }

    #[test]
    fn what_is_gathered_stays_what_it_was() {
        let memory = file(7 << 20);
        // A host without huge pages refuses, which changes nothing either.
        let _ = gather(&memory, (1 << 20) + 5..7 << 20);
        assert_eq!(memory.metadata().unwrap().len(), 7 << 20);
        for at in (0..7 << 20).step_by(4096) {
            let mut word = [0; 8];
            memory.read_exact_at(&mut word, at).unwrap();
            assert_eq!(u64::from_le_bytes(word), at);
        }
    }

    #[test]
    fn a_range_without_a_whole_huge_page_is_left_alone() {
        let memory = file(4 << 20);
        for range in [0..0, 0..(2 << 20) - 1, 1..(4 << 20) - 1, 3 << 20..9 << 20, 2 << 20..(4 << 20) - 1] {
            gather(&memory, range.clone()).unwrap_or_else(|error| panic!("{range:?}: {error}"));
        }
        assert!(gather(&memory, u64::MAX..u64::MAX).is_err());
    }
}
