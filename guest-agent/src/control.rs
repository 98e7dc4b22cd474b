//! The control connection: frames in and out, never waiting.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use mvm_protocol::{DecodeError, Decoder, GuestMessage, HostMessage, decode, encode, limits::MAX_UNSENT};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, send},
    unistd::read,
};

use crate::kmsg;

/// Bytes read from the host at a time.
const CHUNK: usize = 16 * 1024;

/// The connection to the host.
pub(crate) struct Control {
    socket: OwnedFd,
    decoder: Decoder,
    /// What is read goes here first; only as much of it as ever arrived at once is real memory.
    chunk: Vec<u8>,
    /// The last reading took everything there was.
    drained: bool,
    unsent: Vec<u8>,
    /// The host has answered the hello.
    pub(crate) greeted: bool,
}

/// The connection has ended or must end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Lost;

/// What a frame held.
pub(crate) enum Incoming {
    /// A message this agent knows.
    Message(Box<HostMessage>),
    /// A request whose verb is of a later version.
    Unknown { id: u64 },
}

impl Control {
    /// A connection that is non-blocking by now.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        let (decoder, chunk) = (Decoder::new(), vec![0; CHUNK]);
        Self { socket, decoder, chunk, drained: false, unsent: Vec::new(), greeted: false }
    }

    /// What epoll watches.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether bytes wait until the host reads.
    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Takes what has arrived; `false` when that is all for now.
    pub(crate) fn receive(&mut self) -> Result<bool, Lost> {
        if std::mem::take(&mut self.drained) {
            return Ok(false);
        }
        match read(&self.socket, &mut self.chunk) {
            Ok(0) => Err(Lost),
            Ok(count) => {
                self.decoder.push(&self.chunk[..count]);
                self.drained = count < self.chunk.len();
                Ok(true)
            }
            Err(Errno::EAGAIN) => Ok(false),
            Err(Errno::EINTR) => Ok(true),
            Err(_) => Err(Lost),
        }
    }

    /// The next message that has arrived whole.
    pub(crate) fn next_message(&mut self) -> Result<Option<Incoming>, Lost> {
        let malformed = |error: DecodeError| {
            kmsg::say(&format!("control connection dropped: {error}"));
            Lost
        };
        let Some(payload) = self.decoder.next_payload().map_err(malformed)? else {
            return Ok(None);
        };
        match decode(payload) {
            Ok(message) => Ok(Some(Incoming::Message(Box::new(message)))),
            Err(error) => match HostMessage::request_id_in(payload) {
                Some(id) => Ok(Some(Incoming::Unknown { id })),
                None => Err(malformed(error)),
            },
        }
    }

    /// Sends a message, or keeps it until the host reads, or until [`Control::flush`] if it is not for `now`.
    pub(crate) fn send(&mut self, message: &GuestMessage, now: bool) -> Result<(), Lost> {
        let frame = encode(message).map_err(|error| {
            kmsg::say(&format!("control connection dropped: {error}"));
            Lost
        })?;
        if self.unsent.len().saturating_add(frame.len()) > MAX_UNSENT {
            kmsg::say("control connection dropped: the host does not read");
            return Err(Lost);
        }
        self.unsent.extend_from_slice(&frame);
        if now { self.flush() } else { Ok(()) }
    }

    /// Writes what can be written.
    pub(crate) fn flush(&mut self) -> Result<(), Lost> {
        let mut sent = 0;
        while sent < self.unsent.len() {
            match send(self.socket.as_raw_fd(), &self.unsent[sent..], MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => return Err(Lost),
            }
        }
        self.unsent.drain(..sent);
        if self.unsent.is_empty() {
            self.unsent = Vec::new();
        }
        Ok(())
    }
}
