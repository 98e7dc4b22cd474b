//! The thread of a client: reads the control connection and greets stream connections.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::{Duration, Instant},
};

use mvm_protocol::{Decoder, GuestMessage, STREAM_HEADER_LEN, StreamHeader};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::state::Shared;

/// Stream connections whose header has not arrived; more wait in the source's backlog.
const MAX_HALF_OPEN: usize = 32;

/// How long a stream connection may take to send its 16 bytes.
const HEADER_TIME: Duration = Duration::from_secs(2);

/// Where the connections a guest opens to the stream port arrive.
pub trait StreamSource: Send + 'static {
    /// Readable when a connection waits.
    fn readiness(&self) -> BorrowedFd<'_>;
    /// The next connection, without waiting. Any error but `WouldBlock` means that no more will come.
    fn accept(&self) -> io::Result<UnixStream>;
}

impl StreamSource for UnixListener {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        self.set_nonblocking(true)?;
        Self::accept(self).map(|(stream, _)| stream)
    }
}

/// All the thread owns.
pub(super) struct Link<S> {
    pub(super) shared: Arc<Shared>,
    pub(super) control: UnixStream,
    pub(super) decoder: Decoder,
    pub(super) streams: S,
    /// Streams can still arrive.
    pub(super) accepting: bool,
    /// Readable, or hung up, when the client is dropped.
    pub(super) stop: OwnedFd,
    /// Closed when the connection is lost, and its loss is known to every call.
    pub(super) _held: OwnedFd,
}

/// A stream connection whose header is on the way.
struct HalfOpen {
    stream: UnixStream,
    header: [u8; STREAM_HEADER_LEN],
    have: usize,
    deadline: Instant,
}

impl<S: StreamSource> Link<S> {
    /// Runs until the connection ends or the client is dropped.
    pub(super) fn run(mut self) {
        let mut half_open: Vec<HalfOpen> = Vec::new();
        let reason = loop {
            match self.turn(&mut half_open) {
                Ok(true) => {}
                Ok(false) => break "it was closed".to_owned(),
                Err(reason) => break reason,
            }
        };
        self.shared.lose(reason);
        // Callers hold a duplicate; the guest is to see the end now.
        let _ = self.control.shutdown(std::net::Shutdown::Both);
    }

    /// Waits for something to happen and serves it; `false` when it is over.
    fn turn(&mut self, half_open: &mut Vec<HalfOpen>) -> Result<bool, String> {
        // What was read together with the hello may already hold messages.
        self.take_messages()?;
        let listening = self.accepting && half_open.len() < MAX_HALF_OPEN;
        let mut fds = vec![
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(half_open.iter().map(|it| PollFd::new(it.stream.as_fd(), PollFlags::POLLIN)));
        if listening {
            // Left out otherwise: a source that has hung up is always ready.
            fds.push(PollFd::new(self.streams.readiness(), PollFlags::POLLIN));
        }
        let earliest = half_open.iter().map(|it| it.deadline).min();
        match poll(&mut fds, timeout_until(earliest)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(format!("cannot poll: {errno}")),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if is(&ready, 1) {
            return Ok(false);
        }
        let control = is(&ready, 0);
        let streams = listening && ready.last().copied().unwrap_or(false);
        self.read_headers(half_open, ready.get(2..).unwrap_or_default());
        if streams {
            self.greet(half_open);
        }
        if control {
            return self.read_control();
        }
        Ok(true)
    }

    fn take_messages(&mut self) -> Result<(), String> {
        loop {
            match self.decoder.next_message::<GuestMessage>() {
                Ok(Some(message)) => self.shared.take(message)?,
                Ok(None) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn read_control(&mut self) -> Result<bool, String> {
        let mut chunk = [0; 16 * 1024];
        match self.control.read(&mut chunk) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.decoder.push(chunk.get(..count).unwrap_or_default());
                self.take_messages()?;
                Ok(true)
            }
            Err(error) if would_block(&error) => Ok(true),
            Err(error) => Err(error.to_string()),
        }
    }

    fn greet(&mut self, half_open: &mut Vec<HalfOpen>) {
        match self.streams.accept() {
            Ok(stream) if stream.set_nonblocking(true).is_ok() => {
                let deadline = Instant::now() + HEADER_TIME;
                half_open.push(HalfOpen { stream, header: [0; STREAM_HEADER_LEN], have: 0, deadline });
            }
            Ok(_) => {}
            Err(error) if would_block(&error) => {}
            // Starts that wait for a stream end by their deadline; the rest goes on.
            Err(_) => self.accepting = false,
        }
    }

    fn read_headers(&self, half_open: &mut Vec<HalfOpen>, ready: &[bool]) {
        let now = Instant::now();
        for (index, mut it) in std::mem::take(half_open).into_iter().enumerate() {
            if is(ready, index) && !it.read_some() {
                continue;
            }
            if it.have < STREAM_HEADER_LEN {
                if it.deadline > now {
                    half_open.push(it);
                }
            } else if let Ok(header) = StreamHeader::decode(&it.header)
                && it.stream.set_nonblocking(false).is_ok()
            {
                self.shared.stream_opened(header.token, it.stream);
            }
        }
    }
}

impl HalfOpen {
    /// Reads what is there of the header and not a byte more; `false` when the connection is of no use.
    fn read_some(&mut self) -> bool {
        match self.stream.read(self.header.get_mut(self.have..).unwrap_or_default()) {
            Ok(0) => false,
            Ok(count) => {
                self.have = self.have.saturating_add(count);
                true
            }
            Err(error) => would_block(&error),
        }
    }
}

fn is(ready: &[bool], index: usize) -> bool {
    ready.get(index).copied().unwrap_or(false)
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn timeout_until(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    let millis = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
    PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
}
