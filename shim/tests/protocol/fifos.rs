//! The fifos of a client, and what it reads and writes there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::thread::{self, JoinHandle};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::O_NONBLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::containerd::Containerd;
use crate::host::PATIENCE;

/// Streams by path.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// A fifo below the directory, by its path.
pub(crate) fn fifo(containerd: &Containerd, name: &str) -> String {
    let path = containerd.directory.path().join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path.display().to_string()
}

/// Reads a fifo to its end on a thread. It is open before this returns, so that its end is not missed.
pub(crate) fn read_all(path: &str) -> JoinHandle<Vec<u8>> {
    let mut file = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path).unwrap();
    thread::spawn(move || {
        // The first byte may come with the last call of a test: what never comes must not hold it up for ever.
        let time = PollTimeout::try_from(PATIENCE * 10).unwrap();
        let ready = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], time).unwrap();
        assert_eq!(ready, 1, "nobody ever wrote");
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Writes to a fifo on a thread, and closes it.
pub(crate) fn write_all(path: &str, bytes: Vec<u8>) -> JoinHandle<()> {
    let path = path.to_owned();
    thread::spawn(move || File::options().write(true).open(path).unwrap().write_all(&bytes).unwrap())
}
