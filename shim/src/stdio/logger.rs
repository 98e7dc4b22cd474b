//! A logging program: `binary://PROGRAM?ARGUMENTS`. It reads standard output on descriptor 3 and standard error on
//! descriptor 4, and closes descriptor 5 when it is ready.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};

use super::Owner;
use crate::error::{Error, Result};

/// Longest a program may take to get ready, in milliseconds.
const READY_MS: u16 = 10_000;
/// The descriptors a program is given.
const FIRST_GIVEN: i32 = 3;
const LAST_GIVEN: i32 = 5;

/// A logging program that runs.
#[derive(Debug)]
pub(crate) struct Logger {
    pid: Pid,
}

impl Logger {
    /// Starts a program and waits until it is ready; gives the writing ends for standard output and standard error.
    pub(super) fn start(program: &Path, arguments: &[String], owner: &Owner) -> Result<(Self, [File; 2])> {
        let failed = |error: io::Error| {
            Error::invalid_argument(format!(
                "cannot start the logging program {}: {error}",
                program.display()
            ))
        };
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()));
        let (stdout, our_stdout) = pipe()?;
        let (stderr, our_stderr) = pipe()?;
        let (our_ready, ready) = pipe()?;
        let pid = spawn(program, arguments, owner, &[&stdout, &stderr, &ready]).map_err(failed)?;
        let logger = Self { pid };
        drop((stdout, stderr, ready));
        if let Err(error) = wait_ready(our_ready) {
            let _ = kill(pid, Signal::SIGKILL);
            logger.wait();
            return Err(failed(error));
        }
        Ok((logger, [File::from(our_stdout), File::from(our_stderr)]))
    }

    /// Waits until the program has ended, which it does when its input ends.
    pub(super) fn wait(&self) {
        let _ = waitpid(self.pid, None);
    }
}

fn spawn(program: &Path, arguments: &[String], owner: &Owner, fds: &[&OwnedFd; 3]) -> io::Result<Pid> {
    let mut actions = PosixSpawnFileActions::init()?;
    // First out of the way of all numbers involved, then to their places: any of ours may be 3, 4 or 5.
    let free = fds.iter().map(|fd| fd.as_raw_fd()).fold(LAST_GIVEN, i32::max) + 1;
    for (fd, number) in fds.iter().zip(free..) {
        actions.add_dup2(fd.as_raw_fd(), number)?;
    }
    for (number, place) in (free..).zip(FIRST_GIVEN..=LAST_GIVEN) {
        actions.add_dup2(number, place)?;
        actions.add_close(number)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    // This program ignores it, which a new program would inherit.
    let mut defaults = SigSet::empty();
    defaults.add(Signal::SIGPIPE);
    attributes.set_sigdefault(&defaults)?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
    let program = CString::new(program.as_os_str().as_bytes())?;
    let mut argv = vec![program.clone()];
    for argument in arguments {
        argv.push(CString::new(argument.as_str())?);
    }
    let mut environment = Vec::new();
    for (name, value) in std::env::vars_os() {
        environment.push(CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())?);
    }
    environment.push(CString::new(format!("CONTAINER_ID={}", owner.container))?);
    environment.push(CString::new(format!("CONTAINER_NAMESPACE={}", owner.namespace))?);
    Ok(posix_spawn(program.as_c_str(), &actions, &attributes, &argv, &environment)?)
}

/// Ready is a byte or the end.
fn wait_ready(pipe: OwnedFd) -> io::Result<()> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(READY_MS))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not get ready"));
    }
    let mut byte = [0];
    File::from(pipe).read(&mut byte).map(drop)
}
