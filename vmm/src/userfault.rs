//! userfaultfd: missing pages of this process's memory are another's to bring (`linux/userfaultfd.h`).
#![allow(unsafe_code)] // the system call, and ioctls on what it returns

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The only version there is.
const API: u64 = 0xaa;
/// Who has the descriptor is told what was given back to the host.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Pages that are not there are reported.
const REGISTER_MODE_MISSING: u64 = 1;
/// On `/dev/userfaultfd`.
const NEW: libc::Ioctl = 0xaa00;
const HANDSHAKE: libc::Ioctl = 0xc018_aa3f;
const REGISTER: libc::Ioctl = 0xc020_aa00;

/// `struct uffdio_api`.
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// Reports pages of this process that are missing.
///
/// As long as one copy of it is open whoever touches such a page waits for it; with the last one they become zeroes.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

impl Userfault {
    /// A new one for this process: of `device`, which is `/dev/userfaultfd`, or by the right of this process, which a
    /// jailed one has not.
    ///
    /// What KVM and system calls touch must be reported too, so that it takes a right: whoever stops the kernel where it
    /// touches memory can win races in it.
    pub(crate) fn new(device: Option<&File>) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let made = match device {
            // SAFETY: the ioctl takes flags by value, and returns a new descriptor or -1.
            Some(device) => unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) },
            // SAFETY: the same of the system call.
            None => RawFd::try_from(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }).unwrap_or(-1),
        };
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so it is a new descriptor that nothing else owns.
        let made = Self(unsafe { OwnedFd::from_raw_fd(made) });
        let mut handshake = Handshake { api: API, features: FEATURE_EVENT_REMOVE, ioctls: 0 };
        // SAFETY: the structure is what this ioctl reads and writes.
        made.ioctl(|fd| unsafe { libc::ioctl(fd, HANDSHAKE, &raw mut handshake) })?;
        Ok(made)
    }

    /// Has missing pages of `length` bytes from `start` on reported, which is anonymous memory.
    pub(crate) fn register(&self, start: u64, length: u64) -> io::Result<()> {
        let mut register = Register { start, length, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the structure is what this ioctl reads and writes. What is registered changes for nobody but in time.
        self.ioctl(|fd| unsafe { libc::ioctl(fd, REGISTER, &raw mut register) })
    }

    fn ioctl(&self, call: impl FnOnce(RawFd) -> libc::c_int) -> io::Result<()> {
        if call(self.0.as_raw_fd()) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
