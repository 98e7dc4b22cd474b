//! Starts a machine's process: for programs that open everything and hand it over.
//!
//! The child gets exactly the given descriptors, an empty environment, `/dev/null` as standard input and
//! output, and nothing else: it closes what else it inherits before it does anything. It logs what this process
//! logs: at the same level, if that is beyond warnings.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, Uid, mkdtemp};

use crate::config::{CONFIG_FD, FIRST_SLOT, FdSlot, LAST_SLOT, MAX_CONFIG_BYTES, MachineConfig};
use crate::exit::Exit;
use crate::fds::{duplicate_above, pidfd_open};
use crate::process;
use crate::status::Event;

/// Name of the machine's program.
pub const PROGRAM: &str = "mvm-vmm";
/// Overrides where the program is looked for.
pub const PROGRAM_VARIABLE: &str = "MVM_VMM";
/// `log` has the kernel tell of system calls that a machine's process may not make, and let it make them: for whoever
/// changes what it does (`CONTRIBUTING.md`).
const SECCOMP_VARIABLE: &str = "MVM_SECCOMP";
/// Where distributions put programs that are not called by hand.
const LIBEXEC: [&str; 3] = ["/usr/local/libexec/mvm", "/usr/libexec/mvm", "/usr/lib/mvm"];
/// Begins the name of a directory that is about to be removed; what mkdtemp(3) makes up follows.
const NOWHERE: &str = "mvm-root-";
const MADE_UP: &str = "XXXXXX";
/// Longest event line that is read.
const MAX_EVENT_BYTES: u64 = 64 * 1024;

/// A machine could not be started, or its process gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program was not found.
    #[error("cannot find {PROGRAM}: set {PROGRAM_VARIABLE}, or install it beside this program or in PATH")]
    NotFound,
    /// The configuration cannot be handed over.
    #[error("the configuration has {0} bytes, and at most {MAX_CONFIG_BYTES} are accepted")]
    ConfigTooLarge(usize),
    /// More files than slots.
    #[error("a machine takes at most {0} files")]
    TooManyFiles(u32),
    /// A system call failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// The descriptors a machine inherits, in order of slots.
#[derive(Debug, Default)]
pub struct Files(Vec<OwnedFd>);

impl Files {
    /// Adds a file; the slot goes into the configuration.
    pub fn add(&mut self, file: impl Into<OwnedFd>) -> FdSlot {
        self.0.push(file.into());
        FdSlot(FIRST_SLOT.saturating_add(u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX)))
    }
}

/// What a machine's process is started with.
#[derive(Debug)]
pub struct Launch {
    /// The machine. `status` is set by [`Launch::spawn`].
    pub config: MachineConfig,
    /// What the configuration's slots name.
    pub files: Files,
    /// Where the process's messages go; nowhere unless given.
    pub stderr: Option<OwnedFd>,
}

/// A machine's process. It ends with the reader of its events, and so with this process at the latest; the last
/// copy of the reader can be kept elsewhere.
#[derive(Debug)]
pub struct Child {
    /// Process identifier; valid until [`Child::wait`] returned.
    pub pid: Pid,
    /// Readable once the process has ended.
    pub pidfd: OwnedFd,
    /// What it tells.
    pub events: Events,
}

/// How a machine's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The machine ran and ended.
    Exit(Exit),
    /// The machine could not be started: its events or messages say why.
    FailedToStart,
    /// The process ended otherwise, by this exit code.
    Code(i32),
    /// The process was killed by this signal.
    Signal(i32),
}

impl Launch {
    /// Starts the process, by the program found as [`find_program`] says.
    pub fn spawn(self) -> Result<Child> {
        let program = find_program()?;
        self.spawn_program(&program)
    }

    /// Starts `program` as the machine's process.
    pub fn spawn_program(mut self, program: &Path) -> Result<Child> {
        let (reader, writer) = io::pipe().map_err(|source| Error::System("make a pipe", source))?;
        self.config.status = Some(self.files.add(writer));
        if Uid::effective().is_root() {
            let nowhere = nowhere(&std::env::temp_dir())
                .map_err(|source| Error::System("make an empty directory", source))?;
            self.config.root = Some(self.files.add(nowhere));
        }
        let config = config_file(&self.config)?;
        let pid = spawn(program, &config, &self.files, self.stderr.as_ref())?;
        let pidfd = pidfd_open(pid).map_err(|source| Error::System("watch the machine's process", source))?;
        Ok(Child { pid, pidfd, events: Events(BufReader::new(File::from(OwnedFd::from(reader)))) })
    }
}

impl Child {
    /// Waits for the process to end.
    pub fn wait(&self) -> Result<Ended> {
        loop {
            match waitpid(self.pid, None::<WaitPidFlag>) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(Ended::from_code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Ended::Signal(signal as i32)),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(Error::System("wait for the machine", error.into())),
            }
        }
    }
}

impl Ended {
    fn from_code(code: i32) -> Self {
        match u8::try_from(code) {
            Ok(Exit::FAILED_TO_START) => Ended::FailedToStart,
            Ok(small) => Exit::from_code(small).map_or(Ended::Code(code), Ended::Exit),
            Err(_) => Ended::Code(code),
        }
    }
}

/// The events of a machine, in order; ends with the process.
#[derive(Debug)]
pub struct Events(BufReader<File>);

impl Events {
    /// The descriptor that is readable when there is an event.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }

    /// Waits for the next event, or the end, no longer than `time`. Tells whether there is one.
    pub fn wait(&self, time: Duration) -> io::Result<bool> {
        let end = Instant::now() + time;
        while self.0.buffer().is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(1..) => break,
                Ok(_) | Err(nix::errno::Errno::EINTR) if left >= Duration::from_millis(1) => {}
                Ok(_) | Err(nix::errno::Errno::EINTR) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

impl Iterator for Events {
    type Item = io::Result<Event>;

    fn next(&mut self) -> Option<io::Result<Event>> {
        let mut line = String::new();
        match self.0.by_ref().take(MAX_EVENT_BYTES).read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).map_err(io::Error::other)),
            Err(error) => Some(Err(error)),
        }
    }
}

/// Looks for `mvm-vmm`: the variable [`PROGRAM_VARIABLE`], below the prefix that `MVM_PREFIX` names, beside
/// this program, in libexec, in `PATH`.
pub fn find_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(PROGRAM_VARIABLE) {
        return Ok(path.into());
    }
    let prefix = std::env::var_os("MVM_PREFIX").map(|prefix| PathBuf::from(prefix).join("bin"));
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    // Tests and examples lie one directory below the programs they are built with.
    let above = beside.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let path = std::env::var_os("PATH").unwrap_or_default();
    [prefix, beside, above]
        .into_iter()
        .flatten()
        .chain(LIBEXEC.map(PathBuf::from))
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(PROGRAM))
        .find(|candidate| candidate.is_file())
        .ok_or(Error::NotFound)
}

/// Removes empty directories that processes left which were killed while they started a machine.
pub fn sweep() {
    sweep_in(&std::env::temp_dir());
}

fn sweep_in(place: &Path) {
    for entry in place.read_dir().into_iter().flatten().flatten() {
        let name = entry.file_name();
        let length = NOWHERE.len().saturating_add(MADE_UP.len());
        if name.as_bytes().starts_with(NOWHERE.as_bytes()) && name.len() == length {
            // One in which something is stays.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// A directory that was removed: nothing is in it, and nothing can be made in it.
fn nowhere(place: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    loop {
        let path = mkdtemp(&place.join(format!("{NOWHERE}{MADE_UP}")))?;
        let opened = match open(&path, flags, Mode::empty()) {
            // It was swept before it was opened.
            Err(nix::Error::ENOENT) => continue,
            opened => opened,
        };
        match std::fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(opened?),
        }
    }
}

fn config_file(config: &MachineConfig) -> Result<OwnedFd> {
    let text =
        serde_json::to_vec(config).map_err(|error| Error::System("write the configuration", error.into()))?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        return Err(Error::ConfigTooLarge(text.len()));
    }
    let failed = |source| Error::System("write the configuration", source);
    let memfd = memfd_create(c"mvm-config", MFdFlags::MFD_CLOEXEC).map_err(|error| failed(error.into()))?;
    let mut file = File::from(memfd);
    file.write_all(&text).and_then(|()| io::Seek::rewind(&mut file)).map_err(failed)?;
    Ok(file.into())
}

/// Starts the program with `config` as descriptor 3 and `files` from descriptor 4 on.
fn spawn(program: &Path, config: &OwnedFd, files: &Files, stderr: Option<&OwnedFd>) -> Result<Pid> {
    let failed = |source: nix::Error| Error::System("start the machine's process", source.into());
    let sources: Vec<_> = std::iter::once(config).chain(&files.0).collect();
    let first_free = CONFIG_FD + u32::try_from(sources.len()).unwrap_or(u32::MAX);
    if first_free > LAST_SLOT {
        return Err(Error::TooManyFiles(LAST_SLOT - FIRST_SLOT));
    }
    // Copies above every target: then no dup2 replaces a descriptor that a later one needs.
    let floor = RawFd::try_from(first_free).unwrap_or(RawFd::MAX);
    let copies = sources
        .iter()
        .map(|fd| duplicate_above(fd, floor))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|source| Error::System("copy a descriptor", source))?;

    let mut actions = PosixSpawnFileActions::init().map_err(failed)?;
    for (target, copy) in (3..).zip(&copies) {
        actions.add_dup2(copy.as_raw_fd(), target).map_err(failed)?;
    }
    let errors = stderr
        .map(|fd| duplicate_above(fd, floor))
        .transpose()
        .map_err(|source| Error::System("copy a descriptor", source))?;
    if let Some(errors) = &errors {
        actions.add_dup2(errors.as_raw_fd(), 2).map_err(failed)?;
    }
    for target in if errors.is_some() { 0..2 } else { 0..3 } {
        actions.add_open(target, c"/dev/null", OFlag::O_RDWR, Mode::empty()).map_err(failed)?;
    }

    let mut attributes = PosixSpawnAttr::init().map_err(failed)?;
    attributes.set_sigmask(&SigSet::empty()).map_err(failed)?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK).map_err(failed)?;
    let level = log::max_level();
    let level = (level > log::LevelFilter::Warn).then(|| level.as_str().as_bytes().to_vec());
    let log_only = std::env::var(SECCOMP_VARIABLE).is_ok_and(|value| value == "log");
    let log_only = log_only.then(|| process::LOG_ONLY.as_bytes().to_vec());
    let arguments = [program.as_os_str().as_bytes().to_vec(), files.0.len().to_string().into_bytes()]
        .into_iter()
        .chain(level)
        .chain(log_only)
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Error::System("name the machine's program", error.into()))?;
    posix_spawn(program, &actions, &attributes, &arguments, &[] as &[&CStr]).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn what_was_left_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["mvm-root-abcdef", "mvm-root-fuller/x", "mvm-root-of-another", "other"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        sweep_in(dir.path());
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["mvm-root-fuller", "mvm-root-of-another", "other"]);
    }

    #[test]
    fn whoever_sweeps_is_in_nobody_s_way() {
        let dir = tempfile::tempdir().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    sweep_in(dir.path());
                }
            });
            let made: Vec<_> = (0..500).map(|_| nowhere(dir.path()).map(drop)).collect();
            done.store(true, Ordering::Relaxed);
            assert!(made.iter().all(Result::is_ok), "{made:?}");
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
