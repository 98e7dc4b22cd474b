//! What crosses the control socket of a container between its owner and other processes of mvm: frames as towards
//! the agent, with open files beside them.

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use mvm_devices::sys::receive_with_files;
use mvm_devices::throttle::Limit;
use mvm_protocol::{Decoder, Get, Got, Put, RootStats, WindowSize, encode};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::snapshot::BaseMemory;

/// Most files that come with one message: a process's three streams.
const MAX_FILES: usize = 3;

/// What is asked of an owner. A connection carries one request; after [`Request::Exec`] what concerns that process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run another process in the container. Answered with [`Reply::Started`], then [`Reply::Exited`].
    Exec(Exec),
    /// The terminal of this connection's process has another size.
    Resize(WindowSize),
    /// Send this connection's process a signal; without one, the container's first.
    Signal {
        /// Its number.
        signal: i32,
        /// Every process of the container gets it.
        everyone: bool,
    },
    /// Have the container end: SIGTERM, after the time SIGKILL, and no restart. Answered when it has ended.
    Stop {
        /// Seconds.
        grace_s: u32,
    },
    /// Stop its processes.
    Pause,
    /// Let them go on.
    Resume,
    /// Limit how fast its machine may use disks and network, until it ends.
    Limit(Vec<Limit>),
    /// Its use of resources. Answered with [`Reply::Stats`].
    Stats,
    /// Put files into it.
    Put(Put),
    /// Read a file or directory of it. Answered with [`Reply::Got`].
    Get(Get),
    /// Save its machine into files in a directory. Answered with [`Reply::Saved`] once it goes on.
    Save {
        /// The directory, its owner's alone.
        directory: PathBuf,
    },
    /// The same, with the changes to a base for its memory.
    SaveAbove {
        /// The directory.
        directory: PathBuf,
        /// The base.
        base: BaseMemory,
    },
}

/// A process to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub args: Vec<String>,
    /// Variables on top of the container's, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory; `None` is the container's.
    pub cwd: Option<String>,
    /// `user[:group]`; `None` is the container's.
    pub user: Option<String>,
    /// It gets a terminal of this size.
    pub terminal: Option<WindowSize>,
    /// Its standard input is connected.
    pub stdin: bool,
}

/// What an owner answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It was done.
    Done,
    /// The process runs. With it come its streams: the terminal, or standard input where it was asked for, output
    /// and error.
    Started,
    /// The process has ended, as a shell would show it.
    Exited(u8),
    /// Use of resources.
    Stats(RootStats),
    /// A file or directory.
    Got(Got),
    /// What was saved: a [`crate::snapshot::SavedRun`] as JSON.
    Saved(String),
    /// It could not be done.
    Failed {
        /// What and why, as it is printed.
        report: String,
        /// What a command line exits with.
        exit_code: u8,
    },
}

/// A connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    decoder: Decoder,
    files: Vec<OwnedFd>,
}

impl Wire {
    /// Over a connected socket.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::new(), files: Vec::new() }
    }

    /// A second writer of the same connection. It must not read.
    ///
    /// # Errors
    /// The host's reason.
    pub(super) fn writer(&self) -> io::Result<Self> {
        Ok(Self::new(self.stream.try_clone()?))
    }

    /// Sends a message and files with it.
    ///
    /// # Errors
    /// The host's reason, or the message is too long.
    pub(super) fn send<T: Serialize>(&self, message: &T, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let frame = encode(message).map_err(io::Error::other)?;
        let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let mut rights: &[_] = if numbers.is_empty() { &[] } else { &rights };
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            let fd = self.stream.as_raw_fd();
            match sendmsg::<()>(fd, &[IoSlice::new(rest)], rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    rights = &[];
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next message and the files that came by then; `None` once the other side has closed.
    ///
    /// # Errors
    /// The host's reason, or what came is no message.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            if let Some(message) = self.decoder.next_message().map_err(io::Error::other)? {
                return Ok(Some((message, std::mem::take(&mut self.files))));
            }
            if !self.read_some()? {
                return Ok(None);
            }
        }
    }

    fn read_some(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 64 * 1024];
        let count = match receive_with_files(self.stream.as_fd(), &mut bytes, 0) {
            Ok((count, files)) => {
                self.files.extend(files);
                count
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        if self.files.len() > MAX_FILES {
            return Err(io::Error::new(ErrorKind::InvalidData, "too many files"));
        }
        self.decoder.push(bytes.get(..count).unwrap_or_default());
        Ok(count > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    fn pair() -> (Wire, Wire) {
        let (a, b) = UnixStream::pair().unwrap();
        (Wire::new(a), Wire::new(b))
    }

    #[test]
    fn a_message_arrives_with_its_files() {
        let (a, mut b) = pair();
        let (reader, mut writer) = std::io::pipe().unwrap();
        a.send(&Reply::Started, &[reader.as_fd()]).unwrap();
        a.send(&Reply::Exited(3), &[]).unwrap();
        drop((a, reader));
        let (reply, mut files) = b.receive::<Reply>().unwrap().unwrap();
        assert_eq!((reply, files.len()), (Reply::Started, 1));
        writer.write_all(b"hello").unwrap();
        drop(writer);
        let text = std::io::read_to_string(File::from(files.remove(0))).unwrap();
        assert_eq!(text, "hello");
        assert_eq!(b.receive::<Reply>().unwrap().unwrap().0, Reply::Exited(3));
        assert!(b.receive::<Reply>().unwrap().is_none());
    }

    #[test]
    fn more_files_than_a_process_has_streams_end_a_connection() {
        let (a, mut b) = pair();
        let (reader, _writer) = std::io::pipe().unwrap();
        a.send(&Reply::Started, &[reader.as_fd(); MAX_FILES + 1]).unwrap();
        assert!(b.receive::<Reply>().is_err());
    }

    #[test]
    fn nonsense_ends_a_connection() {
        let (mut a, mut b) = pair();
        a.stream.write_all(&[0xff; 64]).unwrap();
        assert!(b.receive::<Request>().is_err());
    }
}
