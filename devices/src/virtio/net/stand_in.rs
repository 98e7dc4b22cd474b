//! A network card whose tap is one end of a socket: for tests that have no right to make taps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::header::Agreed;
use super::tap::Tap;
use super::{Config, Net};
use crate::device::VirtioDevice;

/// One end of a pair that carries whole frames.
struct Socket(OwnedFd);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Tap for Socket {
    fn segments_udp(&self) -> bool {
        true
    }

    fn prepare(&mut self, _: Agreed) -> io::Result<()> {
        Ok(())
    }
}

/// A card, and the other end of its cable: a packet is a frame after a header of twelve bytes.
///
/// # Errors
/// The host has no socket left.
pub fn card(config: &Config) -> io::Result<(Box<dyn VirtioDevice>, OwnedFd)> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    Ok((Box::new(Net::new(config, Socket(near))), far))
}
