//! The file descriptors this process inherited: each is taken once, by the part of the machine it is for.
#![allow(unsafe_code)] // turning inherited descriptor numbers into owned descriptors

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use mvm_devices::fd::{FdSlot, FdSource};
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::Pid;

use crate::config::{CONFIG_FD, FIRST_SLOT, LAST_SLOT};
use crate::error::{Error, Result};

/// Inherited descriptors, and which of them are taken. One per process.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    taken: BTreeSet<u32>,
}

impl Slots {
    /// Takes the descriptor the configuration is read from.
    pub(crate) fn take_config(&mut self) -> io::Result<OwnedFd> {
        self.take_number(CONFIG_FD)
    }

    /// Takes the descriptor in `slot`; `purpose` is for messages.
    pub(crate) fn take_for(&mut self, slot: FdSlot, purpose: &'static str) -> Result<OwnedFd> {
        self.take(slot).map_err(|source| Error::Slot { slot: slot.0, purpose, source })
    }

    /// Takes the descriptor in `slot` if there is one.
    pub(crate) fn take_optional(
        &mut self,
        slot: Option<FdSlot>,
        purpose: &'static str,
    ) -> Result<Option<OwnedFd>> {
        slot.map(|slot| self.take_for(slot, purpose)).transpose()
    }

    /// Closes every inherited descriptor beyond the first `count` slots, which nobody meant to pass. To be
    /// called before anything is opened.
    pub(crate) fn close_beyond(&self, count: u32) -> io::Result<()> {
        let first = FIRST_SLOT.saturating_add(count);
        // SAFETY: takes numbers only. The descriptors closed were inherited and are not owned by anything here.
        match unsafe { libc::close_range(first, u32::MAX, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn take_number(&mut self, slot: u32) -> io::Result<OwnedFd> {
        let number = RawFd::try_from(slot).map_err(|_| io::ErrorKind::InvalidInput)?;
        if !self.taken.insert(slot) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the slot is named twice"));
        }
        // SAFETY: F_GETFD only reads the descriptor table.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `number` is open (checked above), and nothing else in this process owns it: descriptors from
        // CONFIG_FD on were inherited for `Slots` alone, and `taken` hands out each once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

impl FdSource for Slots {
    fn take(&mut self, slot: FdSlot) -> io::Result<OwnedFd> {
        if !(FIRST_SLOT..=LAST_SLOT).contains(&slot.0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "slots go from 4 to 1023"));
        }
        self.take_number(slot.0)
    }
}

/// A close-on-exec copy of `fd` whose number is `floor` or above.
pub(crate) fn duplicate_above(fd: &OwnedFd, floor: RawFd) -> io::Result<OwnedFd> {
    let copy = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(floor))?;
    // SAFETY: the call succeeded, so `copy` is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A descriptor that becomes readable when child `pid`, which has not been waited for, ends.
pub(crate) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
