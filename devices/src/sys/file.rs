//! System calls on a disk's backing file that `std` does not have.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Access mode and status flags of an open file (`F_GETFL`).
///
/// # Errors
/// The host's reason.
pub fn status_flags(file: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

/// Makes reads and writes of an open file answer `WouldBlock` instead of waiting.
///
/// # Errors
/// The host's reason.
pub fn set_nonblocking(file: BorrowedFd<'_>) -> io::Result<()> {
    let flags = status_flags(file)? | libc::O_NONBLOCK;
    // SAFETY: F_SETFL takes a number and touches no memory of ours.
    super::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })
}

/// Locks a whole file without waiting, exclusively or shared, for as long as this open file description
/// lives: closing another description of the same file does not end it, as it would a POSIX lock.
///
/// # Errors
/// `WouldBlock` when another description holds a lock that excludes this one; else the host's reason.
pub fn lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let range = libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(io::Error::other)?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: 0,
        l_len: 0, // to the end, wherever it is
        l_pid: 0, // required to be 0 for a description's lock
    };
    // SAFETY: F_OFD_SETLK reads one flock, which outlives the call.
    super::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) })
}

/// Gives the storage behind a range back; it reads as zeroes from then on. The file's size stays.
///
/// # Errors
/// The host's reason; `EOPNOTSUPP` where the file system cannot.
pub fn punch_hole(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    allocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Makes a range read as zeroes and keeps storage for it. The file's size stays.
///
/// # Errors
/// The host's reason; `EOPNOTSUPP` where the file system cannot.
pub fn zero_range(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    allocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

fn allocate(file: BorrowedFd<'_>, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let offset = libc::off_t::try_from(offset).map_err(too_far)?;
    let len = libc::off_t::try_from(len).map_err(too_far)?;
    loop {
        // SAFETY: fallocate takes plain numbers and touches no memory of ours.
        let result = super::check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) });
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
