//! The machine's side of the control socket: several clients, bounded in number and in bytes each.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::{MAX_REQUEST_BYTES, Reply, Request};

/// Most clients at a time; further ones are closed at once.
const MAX_CLIENTS: usize = 8;

/// Listens on the control socket, on the main thread's epoll.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    clients: BTreeMap<u64, Client>,
    first_token: u64,
    next_token: u64,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
}

impl Server {
    /// Serves `socket`, a listening UNIX socket. Events carry `token` for it and larger ones for clients.
    pub(crate) fn new(socket: OwnedFd, epoll: &Epoll, token: u64) -> io::Result<Self> {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        Ok(Self { listener, clients: BTreeMap::new(), first_token: token, next_token: token + 1 })
    }

    /// Serves what is ready on `token`; requests go to `answer`.
    pub(crate) fn ready(&mut self, token: u64, epoll: &Epoll, mut answer: impl FnMut(Request) -> Reply) {
        if token == self.first_token {
            self.accept(epoll);
        } else if let Some(client) = self.clients.get_mut(&token)
            && client.serve(&mut answer).is_err()
        {
            // Closing the stream takes it off the epoll.
            self.clients.remove(&token);
        }
    }

    fn accept(&mut self, epoll: &Epoll) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let event = EpollEvent::new(EpollFlags::EPOLLIN, self.next_token);
            if epoll.add(stream.as_fd(), event).is_ok() {
                self.clients.insert(self.next_token, Client { stream, input: Vec::new() });
                self.next_token += 1;
            }
        }
    }
}

impl Client {
    /// Reads what is there and answers each whole line. An error closes the client.
    fn serve(&mut self, answer: &mut impl FnMut(Request) -> Reply) -> io::Result<()> {
        let mut chunk = [0; 1024];
        loop {
            let read = match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.input.extend(chunk.iter().take(read));
            while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                self.reply(&line, answer)?;
            }
            if self.input.len() >= MAX_REQUEST_BYTES {
                let error = format!("a request has at most {MAX_REQUEST_BYTES} bytes");
                let _ = self.send(&Reply::Error(error));
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    fn reply(&mut self, line: &[u8], answer: &mut impl FnMut(Request) -> Reply) -> io::Result<()> {
        let reply = match serde_json::from_slice(line) {
            Ok(request) => answer(request),
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
