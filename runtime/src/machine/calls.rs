//! Guest-initiated vsock connections: the machine asks for a socket per call, and gets it here.
//!
//! Ports of the agent end in this process; any other port goes to `vsock.sock_PORT` in the machine's socket
//! directory, as with Firecracker, if something listens there.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mvm_devices::virtio::vsock::dialer::{Dial, DialServer};
use mvm_protocol::{CONTROL_PORT, STREAM_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::agent::StreamSource;

/// Name of the machine's vsock socket in its socket directory.
pub const VSOCK_SOCKET: &str = "vsock.sock";

/// The machine's calls, as they come. Whoever holds this must answer them: the guest waits.
#[derive(Debug)]
pub struct Calls {
    server: DialServer,
    sockets: Option<PathBuf>,
}

/// Where one call went.
enum Answered {
    /// To this process: the near end of the connection.
    Here(u32, UnixStream),
    /// To a listener in the socket directory, or nowhere.
    Elsewhere,
    /// The machine is gone.
    Over,
}

impl Calls {
    pub(super) fn new(server: DialServer, sockets: Option<PathBuf>) -> Self {
        Self { server, sockets }
    }

    /// Waits for the agent's control connection; other calls are answered meanwhile. `None` if the machine
    /// ended first.
    ///
    /// # Errors
    /// `TimedOut` after `deadline`, or the host's reason.
    pub fn control(&self, deadline: Duration) -> io::Result<Option<UnixStream>> {
        let end = Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut ready = [PollFd::new(self.server.as_fd(), PollFlags::POLLIN)];
            let timeout =
                PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut ready, timeout) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            }
            match self.answer()? {
                Answered::Here(CONTROL_PORT, stream) => return Ok(Some(stream)),
                Answered::Over => return Ok(None),
                // Nothing was started that could open a stream: dropping it refuses it.
                Answered::Here(..) | Answered::Elsewhere => {}
            }
        }
    }

    /// Answers calls to other processes until the machine ends: for machines without an agent of ours.
    ///
    /// # Errors
    /// The host's reason.
    pub fn forward(self) -> io::Result<()> {
        while !matches!(self.answer()?, Answered::Over) {}
        Ok(())
    }

    /// Takes the next call, waiting for it, and answers it.
    fn answer(&self) -> io::Result<Answered> {
        let Some(Dial { id, port }) = self.server.recv()? else { return Ok(Answered::Over) };
        if port == CONTROL_PORT || port == STREAM_PORT {
            let (near, far) = UnixStream::pair()?;
            self.server.accept(id, far.as_fd())?;
            return Ok(Answered::Here(port, near));
        }
        let listener = self.sockets.as_ref().map(|dir| dir.join(format!("{VSOCK_SOCKET}_{port}")));
        match listener.and_then(|path| UnixStream::connect(path).ok()) {
            Some(stream) => self.server.accept(id, stream.as_fd())?,
            None => self.server.refuse(id)?,
        }
        Ok(Answered::Elsewhere)
    }
}

impl StreamSource for Calls {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.server.as_fd()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        match self.answer()? {
            Answered::Here(STREAM_PORT, stream) => Ok(stream),
            // A second control connection is not expected of an agent that lives: dropping it ends it.
            Answered::Here(..) | Answered::Elsewhere => Err(ErrorKind::WouldBlock.into()),
            Answered::Over => Err(ErrorKind::ConnectionAborted.into()),
        }
    }
}
