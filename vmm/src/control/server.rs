//! The machine's side of the control socket: several clients, bounded in number and in bytes and files each.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use mvm_devices::fd::{FdSlot, FdSource};
use mvm_devices::sys::{MAX_FILES, receive_with_files};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};

use super::{MAX_REQUEST_BYTES, Reply, Request};

/// Most clients at a time; further ones are closed at once.
const MAX_CLIENTS: usize = 8;

/// Serves clients on the main thread's epoll.
#[derive(Debug)]
pub(crate) struct Server {
    /// Absent where the one client came connected.
    listener: Option<UnixListener>,
    clients: BTreeMap<u64, Client>,
    first_token: u64,
    next_token: u64,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// Files that came with the bytes of `input`.
    files: Vec<OwnedFd>,
}

/// The files that came with a request, by their place in it from 0. Those nobody takes are closed.
#[derive(Debug, Default)]
pub(crate) struct Received(Vec<Option<OwnedFd>>);

impl FdSource for Received {
    fn take(&mut self, slot: FdSlot) -> io::Result<OwnedFd> {
        let place = usize::try_from(slot.0).ok().and_then(|slot| self.0.get_mut(slot));
        let taken = place.and_then(Option::take);
        taken.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "no such file came with the request, or it is named twice",
            )
        })
    }
}

impl Server {
    /// Serves `socket`, a listening UNIX socket or a connected one. Events carry `token` for a listening one and
    /// larger ones for clients.
    pub(crate) fn new(socket: OwnedFd, epoll: &Epoll, token: u64) -> io::Result<Self> {
        let mut server =
            Self { listener: None, clients: BTreeMap::new(), first_token: token, next_token: token + 1 };
        if getsockopt(&socket, AcceptConn)? {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            // Told of each connection once: one that there are no files for waits, and nobody spins meanwhile.
            let each = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(listener.as_fd(), EpollEvent::new(each, token))?;
            server.listener = Some(listener);
        } else {
            server.add(UnixStream::from(socket), epoll)?;
        }
        Ok(server)
    }

    /// Serves what is ready on `token`; requests go to `answer` with the files that came along.
    pub(crate) fn ready(
        &mut self,
        token: u64,
        epoll: &Epoll,
        mut answer: impl FnMut(Request, Received) -> Reply,
    ) {
        if token == self.first_token {
            self.accept(epoll);
        } else if let Some(client) = self.clients.get_mut(&token)
            && client.serve(&mut answer).is_err()
        {
            // Closing the stream takes it off the epoll.
            self.clients.remove(&token);
            // There may be room now for one that waits.
            self.accept(epoll);
        }
    }

    fn accept(&mut self, epoll: &Epoll) {
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            // One that cannot be served is closed.
            let _ = self.add(stream, epoll);
        }
    }

    fn add(&mut self, stream: UnixStream, epoll: &Epoll) -> io::Result<()> {
        if self.clients.len() >= MAX_CLIENTS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        stream.set_nonblocking(true)?;
        epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, self.next_token))?;
        self.clients.insert(self.next_token, Client { stream, input: Vec::new(), files: Vec::new() });
        self.next_token += 1;
        Ok(())
    }
}

impl Client {
    /// Reads what is there and answers each whole line. An error closes the client.
    fn serve(&mut self, answer: &mut impl FnMut(Request, Received) -> Reply) -> io::Result<()> {
        let mut chunk = [0; 1024];
        loop {
            let (read, files) = match receive_with_files(self.stream.as_fd(), &mut chunk, libc::MSG_DONTWAIT)
            {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    let _ = self.send(&Reply::Error(format!("cannot read the request: {error}")));
                    return Err(error);
                }
            };
            self.input.extend(chunk.iter().take(read));
            self.files.extend(files);
            while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                self.reply(&line, answer)?;
            }
            if self.input.len() >= MAX_REQUEST_BYTES || self.files.len() > MAX_FILES {
                let error = format!("a request has at most {MAX_REQUEST_BYTES} bytes and {MAX_FILES} files");
                let _ = self.send(&Reply::Error(error));
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    fn reply(&mut self, line: &[u8], answer: &mut impl FnMut(Request, Received) -> Reply) -> io::Result<()> {
        let files = Received(self.files.drain(..).map(Some).collect());
        let reply = match serde_json::from_slice(line) {
            Ok(request) => answer(request, files),
            Err(error) => Reply::Error(format!("not a request: {error}")),
        };
        self.send(&reply)
    }

    /// A client that does not read its replies is closed.
    fn send(&mut self, reply: &Reply) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(reply).map_err(io::Error::other)?;
        bytes.push(b'\n');
        self.stream.write_all(&bytes)
    }
}
