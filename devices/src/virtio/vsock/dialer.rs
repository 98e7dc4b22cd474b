//! How the device asks its parent process for a stream when the guest dials the host.
//!
//! The process that runs the device can open nothing itself. Its parent holds the other end of a
//! `SOCK_SEQPACKET` socket pair, on which each message is 16 bytes, little-endian:
//!
//! | message | direction | bytes 0–7 | bytes 8–11 | bytes 12–15 | file |
//! | --- | --- | --- | --- | --- | --- |
//! | [`Dial`] | to the parent | id | port the guest dialled | 0 | none |
//! | [`Dialled`] | to the device | id | 1 accepted, 0 refused | 0 | the stream, if accepted |
//!
//! The parent answers in any order. An answer that comes too late is thrown away, its file closed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{self, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType};

use crate::sys;

/// Bytes of either message.
const MESSAGE_SIZE: usize = 16;

/// The guest wants a connection to a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dial {
    /// Names the question in its answer. Never used twice.
    pub id: u64,
    /// The port the guest dialled.
    pub port: u32,
}

/// The parent's answer.
#[derive(Debug)]
pub struct Dialled {
    /// The question's id.
    pub id: u64,
    /// The connected stream socket; `None` refuses the connection.
    pub stream: Option<OwnedFd>,
}

/// The device's end.
#[derive(Debug)]
pub(super) struct Dialer {
    socket: OwnedFd,
}

impl Dialer {
    /// # Errors
    /// `socket` is no connected `SOCK_SEQPACKET` UNIX socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        expect_unix(&socket, SockType::SeqPacket)?;
        socket::getpeername::<socket::UnixAddr>(socket.as_raw_fd())?;
        Ok(Self { socket })
    }

    /// # Errors
    /// `WouldBlock` when the parent has too many unread questions.
    pub(super) fn ask(&self, dial: Dial) -> io::Result<()> {
        send(self.socket.as_fd(), &encode(dial.id, dial.port), None, MsgFlags::MSG_DONTWAIT)
    }

    /// The next answer that is there; `None` when the parent is gone.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub(super) fn answer(&self) -> io::Result<Option<Dialled>> {
        let received = receive(self.socket.as_fd(), libc::MSG_DONTWAIT)?;
        Ok(received.map(|(id, accepted, stream)| Dialled { id, stream: stream.filter(|_| accepted == 1) }))
    }

    pub(super) fn file(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The parent's end: reads questions, as its socket's mode says, and sends answers.
#[derive(Debug)]
pub struct DialServer {
    socket: OwnedFd,
}

impl DialServer {
    /// A connected pair: the parent's end, and the file to give to the device.
    ///
    /// # Errors
    /// The host's reason.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { socket: ours }, theirs))
    }

    /// The next question; `None` when the device is gone.
    ///
    /// # Errors
    /// The host's reason; `WouldBlock` on a non-blocking socket when there is none.
    pub fn recv(&self) -> io::Result<Option<Dial>> {
        Ok(receive(self.socket.as_fd(), 0)?.map(|(id, port, _)| Dial { id, port }))
    }

    /// Answers question `id` with a connected stream socket. The caller may close its copy. Never waits: a
    /// guest that stops its device has nobody read answers, and may ask on.
    ///
    /// # Errors
    /// The host's reason; `WouldBlock` when the device has too many unread answers, or it is gone.
    pub fn accept(&self, id: u64, stream: BorrowedFd<'_>) -> io::Result<()> {
        send(self.socket.as_fd(), &encode(id, 1), Some(stream), MsgFlags::MSG_DONTWAIT)
    }

    /// Answers question `id` with a refusal.
    ///
    /// # Errors
    /// As [`DialServer::accept`].
    pub fn refuse(&self, id: u64) -> io::Result<()> {
        send(self.socket.as_fd(), &encode(id, 0), None, MsgFlags::MSG_DONTWAIT)
    }
}

impl AsFd for DialServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Checks that a file is what it is said to be.
pub(super) fn expect_unix(file: &OwnedFd, kind: SockType) -> io::Result<()> {
    let address: socket::SockaddrStorage = socket::getsockname(file.as_raw_fd())?;
    let family = socket::SockaddrLike::family(&address);
    if family != Some(AddressFamily::Unix) || socket::getsockopt(file, socket::sockopt::SockType)? != kind {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is another kind of socket"));
    }
    Ok(())
}

fn encode(id: u64, value: u32) -> [u8; MESSAGE_SIZE] {
    let mut bytes = [0; MESSAGE_SIZE];
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    bytes[8..12].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// The fields of a message. A last word that is not 0 is for a later version to give a meaning.
fn decode(bytes: [u8; MESSAGE_SIZE]) -> (u64, u32) {
    let all = u128::from_le_bytes(bytes);
    let id = u64::try_from(all & u128::from(u64::MAX)).unwrap_or(0);
    let value = u32::try_from((all >> 64) & u128::from(u32::MAX)).unwrap_or(0);
    (id, value)
}

fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    file: Option<BorrowedFd<'_>>,
    flags: MsgFlags,
) -> io::Result<()> {
    let files = file.map(|file| [file.as_raw_fd()]);
    let control = files.as_ref().map(|files| [ControlMessage::ScmRights(files)]);
    let control = control.as_ref().map_or(&[][..], |control| &control[..]);
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match socket::sendmsg::<()>(socket.as_raw_fd(), &[io::IoSlice::new(bytes)], control, flags, None) {
            Err(nix::Error::EINTR) => {}
            // A packet is sent whole or not at all.
            result => return Ok(result.map(drop)?),
        }
    }
}

/// One message: id, value, file. `None`: the other end is closed.
fn receive(socket: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<Option<(u64, u32, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE_SIZE];
    match sys::receive_with_files(socket, &mut bytes, flags)? {
        (0, _) => Ok(None),
        (MESSAGE_SIZE, files) => {
            let (id, value) = decode(bytes);
            Ok(Some((id, value, files.into_iter().next())))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "message of the wrong length")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_question_and_its_answers_cross_with_the_stream() {
        let (server, file) = DialServer::pair().unwrap();
        let dialer = Dialer::new(file).unwrap();
        assert_eq!(dialer.answer().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        for port in [0, 1024, u32::MAX] {
            dialer.ask(Dial { id: u64::from(port) << 20, port }).unwrap();
            assert_eq!(server.recv().unwrap(), Some(Dial { id: u64::from(port) << 20, port }));
        }
        let (mut near, far) = UnixStream::pair().unwrap();
        server.accept(7, far.as_fd()).unwrap();
        drop(far);
        server.refuse(u64::MAX).unwrap();
        let first = dialer.answer().unwrap().unwrap();
        assert_eq!(first.id, 7);
        let mut far = UnixStream::from(first.stream.unwrap());
        far.write_all(b"x").unwrap();
        let mut byte = [0];
        near.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        let second = dialer.answer().unwrap().unwrap();
        assert_eq!(second.id, u64::MAX);
        assert!(second.stream.is_none());
    }

    #[test]
    fn each_end_sees_the_other_go() {
        let (server, file) = DialServer::pair().unwrap();
        drop(Dialer::new(file).unwrap());
        assert_eq!(server.recv().unwrap(), None);
        let (server, file) = DialServer::pair().unwrap();
        drop(server);
        let dialer = Dialer::new(file).unwrap();
        assert!(dialer.answer().unwrap().is_none());
        assert_eq!(dialer.ask(Dial { id: 1, port: 1 }).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_parent_that_does_not_read_never_blocks_the_device() {
        let (_server, file) = DialServer::pair().unwrap();
        let dialer = Dialer::new(file).unwrap();
        let refused = (0..100_000).find_map(|id| dialer.ask(Dial { id, port: 1 }).err());
        assert_eq!(refused.unwrap().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn another_kind_of_file_is_refused() {
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(Dialer::new(stream.into()).is_err());
        assert!(Dialer::new(std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }
}
