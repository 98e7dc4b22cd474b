//! Host processes that call: the listening socket, and callers that have not yet said which port they want.
//!
//! A caller writes `CONNECT <port>\n`; it reads `OK <local port>\n` once the guest has accepted, or the
//! end of the stream. Bytes after its line are the connection's and are left in the socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, sockopt};

use super::deadlines::{Deadline, Deadlines};
use super::dialer::expect_unix;
use super::muxer::Waiter;
use super::{FIRST_CALLER, LISTENER};
use crate::device::{EventSet, Io};
use crate::error::Error;

/// Most bytes of a caller's line, its end included.
const LINE_SIZE: usize = 32;
/// Most callers that have not said what they want.
const MAX_CALLERS: u16 = 32;
/// How long a caller may take for its line.
const LINE_TIME: Duration = Duration::from_secs(1);
/// How long to leave callers alone when the host is out of files.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    watched: bool,
    /// Nobody is let in for now.
    closed: bool,
    callers: Vec<Option<Caller>>,
}

#[derive(Debug)]
struct Caller {
    stream: UnixStream,
    line: [u8; LINE_SIZE],
    len: usize,
    deadline: Deadline,
}

impl Listener {
    /// # Errors
    /// `socket` is no listening UNIX stream socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        expect_unix(&socket, SockType::Stream)?;
        if !getsockopt(&socket, sockopt::AcceptConn)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen"));
        }
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket, watched: false, closed: false, callers: Vec::new() })
    }

    /// Lets nobody in until [`Listener::open`].
    pub(super) fn close(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.closed = true;
        self.settle(io)
    }

    /// Lets callers in.
    pub(super) fn open(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.closed = false;
        self.settle(io)
    }

    /// Starts watching anew after the loop forgot everything.
    pub(super) fn resume(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.watched = false;
        for (place, caller) in (0u16..).zip(&self.callers) {
            if let Some(caller) = caller {
                io.watch(caller.stream.as_raw_fd(), token(place), EventSet::IN)?;
            }
        }
        self.settle(io)
    }

    /// Closes every caller. None is watched any more.
    pub(super) fn clear(&mut self) {
        self.callers.clear();
        self.watched = false;
        self.closed = false;
    }

    /// Lets in who waits, as far as there is room.
    pub(super) fn accept(&mut self, io: &mut Io<'_>, deadlines: &mut Deadlines<Waiter>) -> Result<(), Error> {
        while !self.closed
            && let Some(place) = self.vacancy()
        {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    io.watch(stream.as_raw_fd(), token(place), EventSet::IN)?;
                    let deadline = deadlines.set(LINE_TIME, Waiter::Caller(place));
                    let caller = Caller { stream, line: [0; LINE_SIZE], len: 0, deadline };
                    if let Some(slot) = self.callers.get_mut(usize::from(place)) {
                        *slot = Some(caller);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of files or memory: whoever waits would wake the loop over and over.
                    log::warn!("cannot accept a connection to the guest: {error}");
                    deadlines.set(PAUSE, Waiter::Listener);
                    self.closed = true;
                }
            }
        }
        self.settle(io)
    }

    /// A caller wrote something. Returns its port and stream once its line is complete; one that does not
    /// keep to the rules is closed.
    pub(super) fn read(
        &mut self,
        place: u16,
        io: &mut Io<'_>,
        deadlines: &mut Deadlines<Waiter>,
    ) -> Result<Option<(u32, UnixStream)>, Error> {
        let Some(Some(caller)) = self.callers.get_mut(usize::from(place)) else { return Ok(None) };
        let port = match caller.read_line() {
            Ok(None) => return Ok(None),
            Ok(Some(port)) => Some(port),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => {
                log::debug!("closed a caller: {error}");
                None
            }
        };
        deadlines.clear(caller.deadline, Waiter::Caller(place));
        let stream = self.dismiss(place, io)?;
        Ok(port.zip(stream))
    }

    /// Takes a caller out, to be used or closed.
    pub(super) fn dismiss(&mut self, place: u16, io: &mut Io<'_>) -> Result<Option<UnixStream>, Error> {
        let caller = self.callers.get_mut(usize::from(place)).and_then(Option::take);
        let stream = caller.map(|caller| caller.stream);
        if let Some(stream) = &stream {
            io.unwatch(stream.as_raw_fd())?;
        }
        self.settle(io)?;
        Ok(stream)
    }

    fn vacancy(&mut self) -> Option<u16> {
        if let Some(place) = self.callers.iter().position(Option::is_none) {
            return u16::try_from(place).ok();
        }
        let place = u16::try_from(self.callers.len()).ok().filter(|place| *place < MAX_CALLERS)?;
        self.callers.push(None);
        Some(place)
    }

    /// Watches for callers while one could be let in.
    fn settle(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        let wanted = !self.closed && self.vacancy().is_some();
        match (self.watched, wanted) {
            (false, true) => io.watch(self.socket.as_raw_fd(), LISTENER, EventSet::IN)?,
            (true, false) => io.unwatch(self.socket.as_raw_fd())?,
            _ => {}
        }
        self.watched = wanted;
        Ok(())
    }
}

impl Caller {
    /// Takes what is there of the line and nothing behind it. `None`: more must come.
    fn read_line(&mut self) -> io::Result<Option<u32>> {
        let room = self.line.get_mut(self.len..).unwrap_or_default();
        let there = recv(self.stream.as_raw_fd(), room, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
        let seen = room.get(..there).unwrap_or_default();
        let end = seen.iter().position(|byte| *byte == b'\n');
        let take = end.map_or(there, |at| at.saturating_add(1));
        let part = room.get_mut(..take).unwrap_or_default();
        // It was there a moment ago, and only this process reads this socket.
        if there == 0 || recv(self.stream.as_raw_fd(), part, MsgFlags::MSG_DONTWAIT)? != take {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.len = self.len.saturating_add(take);
        if end.is_some() {
            let line = self.line.get(..self.len).unwrap_or_default();
            return parse(line).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        if self.len >= LINE_SIZE { Err(io::ErrorKind::InvalidData.into()) } else { Ok(None) }
    }
}

/// The port of a line `CONNECT <port>\n`.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn token(place: u16) -> u32 {
    FIRST_CALLER.saturating_add(place.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_proper_line_names_a_port() {
        assert_eq!(parse(b"CONNECT 0\n"), Some(0));
        assert_eq!(parse(b"CONNECT 52\n"), Some(52));
        assert_eq!(parse(b"CONNECT 4294967295\n"), Some(u32::MAX));
        for bad in [
            "CONNECT 4294967296\n",
            "CONNECT \n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 1",
            "CONNECT 1 \n",
            "CONNECT  1\n",
            "connect 1\n",
            "CONNECT 0x10\n",
            "\n",
            "",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
