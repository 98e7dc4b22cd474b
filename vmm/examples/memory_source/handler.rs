//! Brings the pages of saved machines: what `mvm restore --memory-source` connects to, in its simplest form.
//!
//! The machine's process connects to a UNIX stream socket and sends one message: a JSON array of
//! `{base_host_virt_addr, size, offset, page_size}`, and the descriptor of a userfaultfd. Each page that is touched is
//! then reported on that, and brought by `UFFDIO_COPY`; memory that was given back to the host is reported too, and is
//! zeroes when it is touched again. The connection has to stay open for as long as the machine runs, and ends with it.
#![allow(unsafe_code)] // ioctls, reading events, and receiving a descriptor

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::Deserialize;

const WAKE: libc::Ioctl = 0x8010_aa02;
const COPY: libc::Ioctl = 0xc028_aa03;
const ZEROES: libc::Ioctl = 0xc020_aa04;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
/// Bytes of `struct uffd_msg`.
const EVENT: usize = 32;
/// Most bytes of what is said of the memory.
const MAX_MESSAGE: usize = 64 << 10;

/// Where a part of the memory is in the machine's process, and in the file.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Mapping {
    pub(crate) base_host_virt_addr: u64,
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) page_size: u64,
}

/// A machine whose memory this process has.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) socket: UnixStream,
    pub(crate) mappings: Vec<Mapping>,
    pub(crate) userfault: File,
    /// Pages that were given back.
    pub(crate) removed: BTreeSet<u64>,
    /// How many pages were brought.
    pub(crate) brought: u64,
}

impl Machine {
    /// The machine at the other end of `socket`.
    pub(crate) fn meet(socket: UnixStream) -> io::Result<Self> {
        let mut text = vec![0; MAX_MESSAGE];
        let (length, userfault) = {
            let (mut parts, mut room) = ([IoSliceMut::new(&mut text)], cmsg_space!([i32; 1]));
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut room), flags)?;
            let fds = message.cmsgs()?.find_map(|part| match part {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            let fd = fds.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "no userfaultfd came"))?;
            // SAFETY: the kernel has just made this descriptor, for nobody else.
            (message.bytes, unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let mappings = serde_json::from_slice(text.get(..length).unwrap_or_default())?;
        Ok(Self { socket, mappings, userfault: userfault.into(), removed: BTreeSet::new(), brought: 0 })
    }

    /// Brings pages of `memory` until the machine has ended.
    pub(crate) fn serve(&mut self, memory: &File) -> io::Result<()> {
        loop {
            let mut ready = [
                PollFd::new(self.userfault.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                polled => polled?,
            };
            let [faults, socket] = ready.map(|it| it.revents().is_some_and(|events| !events.is_empty()));
            if socket && self.socket.read(&mut [0; 16])? == 0 {
                return Ok(());
            }
            if faults {
                self.bring(memory)?;
            }
        }
    }

    /// Does what is reported now.
    fn bring(&mut self, memory: &File) -> io::Result<()> {
        let mut faults = BTreeSet::new();
        loop {
            // All that is reported first: until it is known what was given back nothing can be brought.
            let mut event = [0; EVENT];
            match self.userfault.read(&mut event) {
                Ok(EVENT) => self.note(&event, &mut faults),
                Ok(_) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let Some(page) = faults.pop_first() else { return Ok(()) };
                    match self.bring_page(page, memory) {
                        // It is being given back: that is reported next.
                        Err(error) if error.kind() == ErrorKind::WouldBlock => drop(faults.insert(page)),
                        brought => brought?,
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn note(&mut self, event: &[u8; EVENT], faults: &mut BTreeSet<u64>) {
        let word = |at: usize| {
            let bytes = event.get(at..).and_then(|rest| rest.first_chunk()).copied();
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        match event.first() {
            Some(&EVENT_PAGEFAULT) => drop(faults.insert(word(16))),
            Some(&EVENT_REMOVE) => {
                let (start, end) = (word(8), word(16));
                if let Some(mapping) = self.mapping(start) {
                    let pages = (start..end).step_by(usize::try_from(mapping.page_size).unwrap_or(4096));
                    self.removed.extend(pages);
                }
            }
            _ => {}
        }
    }

    fn mapping(&self, address: u64) -> Option<Mapping> {
        let holds = |it: &&Mapping| address.wrapping_sub(it.base_host_virt_addr) < it.size;
        self.mappings.iter().find(holds).cloned()
    }

    fn bring_page(&mut self, address: u64, memory: &File) -> io::Result<()> {
        let mapping = self.mapping(address).ok_or(ErrorKind::InvalidData)?;
        let (size, start) = (mapping.page_size, address - address % mapping.page_size);
        let brought = if self.removed.contains(&start) {
            let mut zeroes = [start, size, 0, 0];
            self.ioctl(ZEROES, &mut zeroes)
        } else {
            let mut page = vec![0; usize::try_from(size).unwrap_or_default()];
            memory.read_exact_at(&mut page, start - mapping.base_host_virt_addr + mapping.offset)?;
            let mut copy = [start, page.as_ptr() as u64, size, 0, 0];
            self.ioctl(COPY, &mut copy)
        };
        match brought {
            // Another fault has brought it.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.ioctl(WAKE, &mut [start, size]),
            // It is not there any more, or the whole process is not.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
            Ok(()) => {
                self.brought += 1;
                Ok(())
            }
            other => other,
        }
    }

    fn ioctl<const N: usize>(&self, number: libc::Ioctl, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: each of these takes a structure of as many words as its number says, which is what callers give, and
        // writes to none but that and the machine's memory; a page that is copied is there until the call returns.
        match unsafe { libc::ioctl(self.userfault.as_raw_fd(), number, words.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
