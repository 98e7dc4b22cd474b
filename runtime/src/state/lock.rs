//! Who owns a directory: the process that has its lock file locked, for as long as it lives.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::catalog::is_at;

/// A lock on a file, until this is dropped.
///
/// It belongs to the open file (`F_OFD_SETLK`, fcntl(2)), as one of flock(2) does, and unlike that it can be looked
/// at: a process that lists containers must not seem to own them meanwhile.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "what is locked is the open file")] File);

impl Lock {
    /// Makes the file, locked.
    ///
    /// # Errors
    /// It is there already; the host's reason.
    pub(super) fn make(path: &Path) -> io::Result<Option<Self>> {
        Self::on(File::options().create_new(true).write(true).open(path)?, path, false)
    }

    /// Takes the lock, unless somebody else has it or the file is another meanwhile.
    ///
    /// # Errors
    /// `NotFound` if there is no such file; the host's reason.
    pub(super) fn take(path: &Path) -> io::Result<Option<Self>> {
        Self::on(File::options().write(true).open(path)?, path, false)
    }

    /// Takes the lock as soon as nobody else has it; `None` if the file is gone by then.
    ///
    /// # Errors
    /// As for [`Lock::take`].
    pub(super) fn wait(path: &Path) -> io::Result<Option<Self>> {
        Self::on(File::options().write(true).open(path)?, path, true)
    }

    /// Whether somebody has the lock. Nobody has one on a file that is not there.
    ///
    /// # Errors
    /// The host's reason.
    pub(super) fn is_held(path: &Path) -> io::Result<bool> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        let mut lock = whole(libc::F_WRLCK);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    fn on(file: File, path: &Path, wait: bool) -> io::Result<Option<Self>> {
        let lock = whole(libc::F_WRLCK);
        loop {
            let how = if wait { FcntlArg::F_OFD_SETLKW(&lock) } else { FcntlArg::F_OFD_SETLK(&lock) };
            match fcntl(&file, how) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
        // It may have been removed, and another made in its place, since it was opened.
        Ok(is_at(&file, path).then_some(Self(file)))
    }
}

/// A lock of a whole file, however long it gets.
fn whole(kind: libc::c_int) -> libc::flock {
    part(kind, 0, 0)
}

/// A lock of some bytes of a file.
pub(super) fn part(kind: libc::c_int, start: i64, bytes: i64) -> libc::flock {
    // Both are numbers below four.
    let narrow = |number: libc::c_int| libc::c_short::try_from(number).unwrap_or_default();
    libc::flock {
        l_type: narrow(kind),
        l_whence: narrow(libc::SEEK_SET),
        l_start: start,
        l_len: bytes,
        l_pid: 0,
    }
}
