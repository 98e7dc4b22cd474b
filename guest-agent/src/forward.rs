//! Connections to programs that listen on the guest's loopback addresses.

use std::{
    net::{Ipv6Addr, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd},
};

use mvm_protocol::{Reply, Token, limits::MAX_STREAMS};
use nix::{
    errno::Errno,
    sys::{
        epoll::{EpollEvent, EpollFlags},
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, connect, getsockopt, socket, sockopt,
        },
    },
};

use crate::{
    agent::Agent,
    error::{Context, Error, Result},
    requests,
    streams::Kind,
};

/// The first epoll key of a connection under way; there are at most [`MAX_STREAMS`].
pub(crate) const FORWARDS: u64 = 1 << 16;

/// A connection that has not been answered yet.
pub(crate) struct Connecting {
    socket: OwnedFd,
    /// The request that waits for it.
    request: u64,
    port: u16,
    token: Token,
    address: Loopback,
}

/// The addresses in the order they are tried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loopback {
    V4,
    V6,
}

/// Begins a connection; whether it is open already.
fn dial(address: Loopback, port: u16) -> nix::Result<(OwnedFd, bool)> {
    let family = if address == Loopback::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    let connected = match address {
        Loopback::V4 => connect(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port)),
        Loopback::V6 => {
            let to = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
            connect(socket.as_raw_fd(), &SockaddrIn6::from(to))
        }
    };
    match connected {
        Ok(()) => Ok((socket, true)),
        Err(Errno::EINPROGRESS) => Ok((socket, false)),
        Err(errno) => Err(errno),
    }
}

impl Agent {
    /// Connects to a port and joins it with a stream; `None` while that is under way.
    pub(crate) fn forward(&mut self, request: u64, port: u16, token: Token) -> Option<Result<Reply>> {
        if let Err(error) = self.streams.check_room(self.forwards.iter().flatten().count().saturating_add(1))
        {
            return Some(Err(error));
        }
        self.try_address(request, port, token, Loopback::V4)
    }

    fn try_address(
        &mut self,
        request: u64,
        port: u16,
        token: Token,
        address: Loopback,
    ) -> Option<Result<Reply>> {
        match dial(address, port) {
            Ok((socket, true)) => Some(self.join(socket, token)),
            Ok((socket, false)) => {
                let connecting = Connecting { socket, request, port, token, address };
                self.await_connection(connecting).err().map(Err)
            }
            Err(_) if address == Loopback::V4 => self.try_address(request, port, token, Loopback::V6),
            Err(errno) => Some(Err(refused(port, errno))),
        }
    }

    fn await_connection(&mut self, connecting: Connecting) -> Result<()> {
        let free = self.forwards.iter().position(Option::is_none).unwrap_or(self.forwards.len());
        if free >= MAX_STREAMS {
            return Err(Error::Busy("as many connections are under way as may be"));
        }
        let event = EpollEvent::new(EpollFlags::EPOLLOUT, FORWARDS.saturating_add(free as u64));
        self.epoll.add(&connecting.socket, event).context(|| "cannot watch a connection".into())?;
        if free == self.forwards.len() {
            self.forwards.push(None);
        }
        if let Some(slot) = self.forwards.get_mut(free) {
            *slot = Some(connecting);
        }
        Ok(())
    }

    /// Something has come of the connection in this slot.
    pub(crate) fn serve_connection(&mut self, slot: usize) {
        let Some(Connecting { socket, request, port, token, address }) =
            self.forwards.get_mut(slot).and_then(Option::take)
        else {
            return;
        };
        let _ = self.epoll.delete(&socket);
        let outcome = getsockopt(&socket, sockopt::SocketError).map_or_else(|errno| errno, Errno::from_raw);
        let answer = match outcome {
            errno if errno as i32 == 0 => Some(self.join(socket, token)),
            _ if address == Loopback::V4 => self.try_address(request, port, token, Loopback::V6),
            errno => Some(Err(refused(port, errno))),
        };
        if let Some(answer) = answer {
            self.respond(request, answer);
        }
    }

    fn join(&mut self, end: OwnedFd, token: Token) -> Result<Reply> {
        let stream = requests::open_stream(&*self.dialer, None, (Kind::Connection, token.0, end))?;
        self.streams.add(&self.epoll, stream);
        Ok(Reply::Done)
    }
}

fn refused(port: u16, errno: Errno) -> Error {
    Error::System { what: format!("cannot connect to port {port} of the guest"), errno }
}
