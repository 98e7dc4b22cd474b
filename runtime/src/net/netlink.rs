//! rtnetlink(7): requests to the kernel's network tables, their answers, and word of changes.
//!
//! One socket belongs to the network name space of the thread that opened it.

mod address;
#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing;
mod link;
mod message;
mod route;
mod traffic;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
};

pub(super) use address::{AddressEntry, NeighbourEntry};
pub(super) use link::LinkEntry;
pub(super) use message::{Message, attributes, text};
pub(super) use route::RouteEntry;

/// Room for one datagram of a list. The kernel fills at most 32 KiB when it is offered that.
const DATAGRAM: usize = 32 * 1024;

/// A connection to the network tables.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    datagram: Vec<u8>,
}

impl Netlink {
    /// Opens one in the calling thread's name space.
    pub(super) fn open() -> nix::Result<Self> {
        Self::of(SockProtocol::NetlinkRoute, 0)
    }

    /// Opens one that is told of changes; `groups` are bits `RTMGRP_*`.
    pub(super) fn with_groups(groups: u32) -> nix::Result<Self> {
        Self::of(SockProtocol::NetlinkRoute, groups)
    }

    /// Opens one to another part of the kernel.
    pub(super) fn of(protocol: SockProtocol, groups: u32) -> nix::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self { socket, sequence: 0, datagram: vec![0; DATAGRAM] })
    }

    /// Has the kernel do it.
    pub(super) fn perform(&mut self, message: Message) -> nix::Result<()> {
        self.exchange(message.acknowledged(), |_| {})
    }

    /// Asks for a list; `parse` turns each entry's payload into what is wanted, or passes over it.
    pub(super) fn list<T>(
        &mut self,
        message: Message,
        mut parse: impl FnMut(&[u8]) -> Option<T>,
    ) -> nix::Result<Vec<T>> {
        let mut list = Vec::new();
        self.exchange(message.dump(), |payload| list.extend(parse(payload)))?;
        Ok(list)
    }

    /// Asks for one thing.
    pub(super) fn get<T>(
        &mut self,
        message: Message,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> nix::Result<Option<T>> {
        let mut found = None;
        self.exchange(message.acknowledged(), |payload| found = parse(payload))?;
        Ok(found)
    }

    /// Has the kernel do all of `batch`, of which each message asks for an answer, or nothing. Stops at the first
    /// error; the socket is of no use after that.
    pub(super) fn transact(&mut self, begin: Message, batch: Vec<Message>, end: Message) -> nix::Result<()> {
        let mut open = batch.len();
        let messages = std::iter::once(begin).chain(batch).chain(std::iter::once(end));
        let bytes: Vec<u8> = messages
            .flat_map(|message| {
                self.sequence = self.sequence.wrapping_add(1);
                message.finish(self.sequence)
            })
            .collect();
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        while open > 0 {
            let count = self.receive()?;
            let mut rest = self.datagram.get(..count).unwrap_or_default();
            while let Some((header, payload, next)) = message::split(rest) {
                rest = next;
                if i32::from(header.kind) == libc::NLMSG_ERROR {
                    message::acknowledgement(payload)?;
                    open = open.saturating_sub(1);
                }
            }
        }
        Ok(())
    }

    /// Throws away word of changes that has arrived. Word that was lost for want of room counts as well.
    pub(super) fn drain(&mut self) -> nix::Result<()> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.datagram, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a request and reads its answers to the end: an error, an acknowledgement, or a list.
    fn exchange(&mut self, message: Message, mut each: impl FnMut(&[u8])) -> nix::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        loop {
            let count = self.receive()?;
            let mut rest = self.datagram.get(..count).unwrap_or_default();
            while let Some((header, payload, next)) = message::split(rest) {
                rest = next;
                if header.sequence != self.sequence {
                    continue;
                }
                match i32::from(header.kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => return message::acknowledgement(payload),
                    _ => each(payload),
                }
            }
        }
    }

    fn receive(&mut self) -> nix::Result<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.datagram, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
