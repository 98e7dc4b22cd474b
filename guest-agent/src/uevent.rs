//! The kernel's word that a device has come or changed, so that nothing is polled for.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};

/// The multicast group of the kernel's own events.
const KERNEL: u32 = 1;

/// Largest event the kernel sends (`UEVENT_BUFFER_SIZE` and its header).
const EVENT: usize = 8 * 1024;

/// Events from now on.
pub(crate) struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Listens.
    pub(crate) fn new() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
        Ok(Self { socket })
    }

    /// Waits until something has happened; `false` when the deadline came first.
    pub(crate) fn wait(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let timeout = PollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX));
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, timeout), Ok(1)) {
            return false;
        }
        // What happened does not matter: whoever waits looks again. One look serves all that is queued.
        let mut event = [0; EVENT];
        while recv(self.socket.as_raw_fd(), &mut event, MsgFlags::empty()).is_ok() {}
        true
    }
}
