//! Keeps files open for this process, in a table of their own.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use mvm_devices::sys::receive_with_files;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A thread with a table of files of its own. A process that starts another one copies its table; one that has
/// started thousands would pay for all their files, which the owner of one machine does not.
#[derive(Debug)]
pub(super) struct Keeper {
    to: UnixStream,
    thread: JoinHandle<io::Result<()>>,
}

impl Keeper {
    pub(super) fn new() -> io::Result<Self> {
        let (to, from) = UnixStream::pair()?;
        Ok(Self { to, thread: thread::spawn(move || keep(&from)) })
    }

    /// Has a file kept until [`Keeper::end`].
    pub(super) fn keep(&self, file: &OwnedFd) -> io::Result<()> {
        self.send(&[ControlMessage::ScmRights(&[file.as_raw_fd()])])
    }

    /// Closes all of them.
    pub(super) fn end(self) -> io::Result<()> {
        self.send(&[])?;
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the keeper of the files failed")))
    }

    fn send(&self, control: &[ControlMessage<'_>]) -> io::Result<()> {
        sendmsg::<()>(self.to.as_raw_fd(), &[IoSlice::new(b"k")], control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

fn keep(from: &UnixStream) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    let mut kept = Vec::new();
    loop {
        let (_, files) = receive_with_files(from.as_fd(), &mut [0], 0)?;
        // Not the end of the stream, which this table holds open itself.
        if files.is_empty() {
            return Ok(());
        }
        kept.extend(files);
    }
}
