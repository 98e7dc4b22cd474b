//! Guest-initiated vsock connections: the machine asks for a socket per call, and gets it here.
//!
//! Ports of the agent end in this process; any other port goes to `vsock.sock_PORT` in the machine's socket
//! directory, as with Firecracker, if something listens there.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mvm_devices::virtio::vsock::dialer::{Dial, DialServer};
use mvm_protocol::{CONTROL_PORT, STREAM_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};

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
            if left.is_zero() {
                // A guest that dials other ports on and on has one waiting whenever it is looked.
                return Err(ErrorKind::TimedOut.into());
            }
            let mut ready = [PollFd::new(self.server.as_fd(), PollFlags::POLLIN)];
            let timeout =
                PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut ready, timeout) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                Ok(_) => {}
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
            // Out of files is no reason to give the machine up: its agent's call is refused.
            let Ok((near, far)) = UnixStream::pair() else { return self.refuse(id) };
            return match self.server.accept(id, far.as_fd()) {
                Ok(()) => Ok(Answered::Here(port, near)),
                Err(error) if is_passing(&error) => self.refuse(id),
                Err(error) => Err(error),
            };
        }
        let listener = self.sockets.as_ref().map(|dir| dir.join(format!("{VSOCK_SOCKET}_{port}")));
        let Some(stream) = listener.and_then(|path| connect(&path).ok()) else { return self.refuse(id) };
        match self.server.accept(id, stream.as_fd()) {
            Ok(()) => Ok(Answered::Elsewhere),
            Err(error) if is_passing(&error) => self.refuse(id),
            Err(error) => Err(error),
        }
    }

    /// Refuses a call. If not even that can be told, the machine refuses it by itself when its time is up.
    fn refuse(&self, id: u64) -> io::Result<Answered> {
        match self.server.refuse(id) {
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(Answered::Elsewhere),
        }
    }
}

/// Whether an answer could not be sent now only: the machine has not read those before it, or the user has
/// too many files on their way.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS))
}

/// Connects without waiting: a listener whose queue is full refuses. The stream is non-blocking.
fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(stream)
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use nix::sys::socket::{MsgFlags, recv, send};

    use super::*;

    /// Longest a test waits for what must not take long.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn calls(sockets: Option<PathBuf>) -> (Calls, OwnedFd) {
        let (server, machine) = DialServer::pair().unwrap();
        (Calls::new(server, sockets), machine)
    }

    /// Plays a machine whose guest dials `port` over and over while the control connection is waited for.
    /// Returns how that ended and how many answers said yes and no.
    fn dial_for_ever(
        calls: Calls,
        machine: &OwnedFd,
        port: u32,
        reads: bool,
    ) -> (Option<ErrorKind>, [usize; 2]) {
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let result = calls.control(Duration::from_millis(300));
            let _ = done.send((result.err().map(|error| error.kind()), calls));
        });
        let mut question = [0; 16];
        question[8..12].copy_from_slice(&port.to_le_bytes());
        let end = Instant::now() + PATIENCE;
        let mut answers = [0, 0];
        while Instant::now() < end {
            while send(machine.as_raw_fd(), &question, MsgFlags::MSG_DONTWAIT).is_ok() {}
            let mut answer = [0; 16];
            while reads && recv(machine.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) == Ok(16) {
                answers[usize::from(answer[8] == 0)] += 1;
            }
            if let Ok((kind, _calls)) = ended.try_recv() {
                return (kind, answers);
            }
        }
        panic!("a guest that dials on keeps its parent waiting");
    }

    #[test]
    fn a_guest_that_dials_other_ports_for_ever_does_not_put_the_deadline_off() {
        let (calls, machine) = calls(None);
        let (ended, [_, refused]) = dial_for_ever(calls, &machine, 9, true);
        assert_eq!(ended, Some(ErrorKind::TimedOut));
        assert!(refused > 1);
    }

    #[test]
    fn a_machine_that_reads_no_answers_does_not_hold_its_parent() {
        for port in [9, STREAM_PORT] {
            let (calls, machine) = calls(None);
            assert_eq!(dial_for_ever(calls, &machine, port, false).0, Some(ErrorKind::TimedOut), "{port}");
        }
    }

    #[test]
    fn a_listener_that_accepts_nobody_does_not_hold_the_other_calls() {
        let dir = tempfile::tempdir().unwrap();
        let full = UnixListener::bind(dir.path().join(format!("{VSOCK_SOCKET}_7"))).unwrap();
        // Room for a few: then the test does not depend on how many calls a busy host gets through.
        nix::sys::socket::listen(&full, nix::sys::socket::Backlog::new(3).unwrap()).unwrap();
        let (calls, machine) = calls(Some(dir.path().to_path_buf()));
        let (ended, [accepted, refused]) = dial_for_ever(calls, &machine, 7, true);
        assert_eq!(ended, Some(ErrorKind::TimedOut));
        assert!(accepted > 0 && refused > 0, "{accepted} and {refused}");
    }
}
