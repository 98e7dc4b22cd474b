//! One direction of a stream: bytes from one descriptor to another, at the pace of the slower.
//!
//! Nothing is read while earlier bytes wait, so a reader that stalls holds up its own stream alone, and
//! at most one buffer of it is kept here.

use std::os::fd::{AsRawFd, BorrowedFd};

use mvm_protocol::limits::STREAM_BUFFER;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, send},
    unistd::{read, write},
};

/// Reads in one go at most this often, so that one busy stream does not starve the rest.
const READS_PER_TURN: usize = 8;

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    /// Bytes that were read and could not be written yet.
    pending: Vec<u8>,
    /// How many of them have been written since.
    written: usize,
    source: Source,
}

#[derive(Debug, Default)]
enum Source {
    #[default]
    Open,
    /// The process is gone: take what it left, at most this many bytes, then call it the end.
    Draining(usize),
    Ended,
}

/// How a turn of a flow went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// More may come; wait until the source can be read.
    AwaitSource,
    /// Wait until the sink can be written.
    AwaitSink,
    /// All bytes up to the end are written.
    Finished,
    /// The sink takes no more.
    Broken,
}

impl Flow {
    /// From now on the source ends where it would have to be waited for, or after `most` bytes.
    pub(crate) fn drain(&mut self, most: usize) {
        if matches!(self.source, Source::Open) {
            self.source = Source::Draining(most);
        }
    }

    /// Moves what can be moved without waiting.
    pub(crate) fn turn(&mut self, from: BorrowedFd<'_>, to: Sink<'_>, buffer: &mut [u8]) -> Turn {
        let mut reads = 0;
        loop {
            match self.flush(to) {
                Ok(()) => {}
                Err(Errno::EAGAIN) => return Turn::AwaitSink,
                Err(_) => return Turn::Broken,
            }
            let most = match self.source {
                Source::Ended | Source::Draining(0) => return Turn::Finished,
                Source::Draining(left) => left.min(buffer.len()),
                Source::Open if reads == READS_PER_TURN => return Turn::AwaitSource,
                Source::Open => buffer.len(),
            };
            reads += 1;
            match read(from, &mut buffer[..most]) {
                // A pseudo-terminal whose other side is closed says EIO.
                Ok(0) | Err(Errno::EIO | Errno::ECONNRESET) => self.source = Source::Ended,
                Ok(count) => self.pass_on(to, &buffer[..count]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if matches!(self.source, Source::Open) => return Turn::AwaitSource,
                Err(_) => self.source = Source::Ended,
            }
        }
    }

    fn pass_on(&mut self, to: Sink<'_>, bytes: &[u8]) {
        if let Source::Draining(left) = &mut self.source {
            *left = left.saturating_sub(bytes.len());
        }
        // An error shows again when the rest is flushed.
        let written = to.write(bytes).unwrap_or(0);
        self.pending.extend_from_slice(&bytes[written..]);
        debug_assert!(self.pending.len() <= STREAM_BUFFER);
    }

    fn flush(&mut self, to: Sink<'_>) -> nix::Result<()> {
        while self.written < self.pending.len() {
            match to.write(&self.pending[self.written..]) {
                Ok(count) => self.written += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.pending = Vec::new();
        self.written = 0;
        Ok(())
    }
}

/// Where a flow writes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sink<'a> {
    /// The host.
    Socket(BorrowedFd<'a>),
    /// The process.
    File(BorrowedFd<'a>),
    /// Nobody: what a process's descendants write after it was reported gone.
    Nowhere,
}

impl Sink<'_> {
    fn write(self, bytes: &[u8]) -> nix::Result<usize> {
        match self {
            Self::Socket(fd) => send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL),
            Self::File(fd) => write(fd, bytes),
            Self::Nowhere => Ok(bytes.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use nix::{fcntl::OFlag, unistd::pipe2};

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    #[test]
    fn a_source_that_has_ended_finishes_the_flow_after_its_last_byte() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let (ours, mut theirs) = pair();
        let mut flow = Flow::default();
        write(&writer, b"last words").unwrap();
        drop(writer);
        let turn = flow.turn(reader.as_fd(), Sink::Socket(ours.as_fd()), &mut [0; 4]);
        assert_eq!(turn, Turn::Finished);
        drop(ours);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
    }

    #[test]
    fn a_sink_that_stalls_keeps_one_buffer_and_loses_nothing() {
        let (mut source, from) = pair();
        from.set_nonblocking(true).unwrap();
        let (ours, mut theirs) = pair();
        theirs.set_nonblocking(true).unwrap();
        let mut flow = Flow::default();
        let mut buffer = vec![0; STREAM_BUFFER];
        let bytes: Vec<u8> = (0..4_000_000_u32).map(|at| (at / 7) as u8).collect();
        let (mut sent, mut seen, mut stalls) = (0, Vec::new(), 0);
        while seen.len() < bytes.len() {
            sent += source.write(&bytes[sent..]).unwrap_or(0);
            match flow.turn(from.as_fd(), Sink::Socket(ours.as_fd()), &mut buffer) {
                Turn::AwaitSink => stalls += 1,
                Turn::AwaitSource => {}
                other => panic!("{other:?}"),
            }
            assert!(flow.pending.len() <= STREAM_BUFFER);
            let mut chunk = [0; 10_000];
            while let Ok(count @ 1..) = theirs.read(&mut chunk) {
                seen.extend_from_slice(&chunk[..count]);
                if stalls == 0 {
                    break;
                }
            }
        }
        assert!(stalls > 0, "the test must have stalled the sink");
        assert!(seen == bytes);
    }

    #[test]
    fn draining_takes_what_is_there_and_does_not_wait_for_a_writer_that_stays() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let (ours, mut theirs) = pair();
        let mut flow = Flow::default();
        write(&writer, b"12345678").unwrap();
        flow.drain(5);
        assert_eq!(flow.turn(reader.as_fd(), Sink::Socket(ours.as_fd()), &mut [0; 64]), Turn::Finished);
        let mut five = [0; 5];
        theirs.read_exact(&mut five).unwrap();
        assert_eq!(&five, b"12345");

        let mut flow = Flow::default();
        flow.drain(100);
        assert_eq!(flow.turn(reader.as_fd(), Sink::Socket(ours.as_fd()), &mut [0; 64]), Turn::Finished);
        let mut three = [0; 3];
        theirs.read_exact(&mut three).unwrap();
        assert_eq!(&three, b"678");
    }

    #[test]
    fn a_sink_that_is_gone_breaks_the_flow() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let (ours, theirs) = pair();
        drop(theirs);
        write(&writer, b"x").unwrap();
        let turn = Flow::default().turn(reader.as_fd(), Sink::Socket(ours.as_fd()), &mut [0; 4]);
        assert_eq!(turn, Turn::Broken);
    }
}
