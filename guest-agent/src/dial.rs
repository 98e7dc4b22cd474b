//! How the agent reaches the host: vsock in a guest, UNIX sockets when it is tried out without one.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use mvm_protocol::HOST_CID;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// A way to the host.
pub(crate) trait Dialer {
    /// One connection to a port of the host, in blocking mode.
    fn dial(&self, port: u32) -> io::Result<OwnedFd>;
}

/// The way through the hypervisor.
pub(crate) struct Vsock;

impl Dialer for Vsock {
    fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
        Ok(fd)
    }
}

/// Sockets `<base>_<port>`, which is where a VMM delivers a guest's connections on the host.
pub(crate) struct UnixSockets {
    pub(crate) base: String,
}

impl Dialer for UnixSockets {
    fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        UnixStream::connect(format!("{}_{port}", self.base)).map(OwnedFd::from)
    }
}

/// The way `MVM_AGENT_DIAL` names (`unix:<base>`), vsock without it.
pub(crate) fn dialer(choice: Option<&str>) -> Box<dyn Dialer> {
    match choice.and_then(|choice| choice.strip_prefix("unix:")) {
        Some(base) => Box::new(UnixSockets { base: base.to_owned() }),
        None => Box::new(Vsock),
    }
}
