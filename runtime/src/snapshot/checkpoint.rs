//! A checkpoint: a container's machine as its engine keeps it, in a directory that the engine packs and sends around.
//!
//! ```text
//! <directory>/mvm.json  what it is; written last
//! <directory>/state     CPUs and devices, packed
//! <directory>/memory    RAM, packed
//! <directory>/writes    the disk of the container's writes, packed, if it has one
//! ```
//!
//! Layers of the image are not in it: the engine has them, and their digests say whether they are the same. It may come
//! from anywhere: no name but these is looked for, links are not followed, and everything is bounded and digested.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::manifest::{Ran, SavedMachine, disk_file, here, memory_file, state_file};
use super::packed::{Digested, pack, unpack};
use crate::catalog::{Format, create};
use crate::failure::{Context, Failure};

/// Those that this build writes and reads.
const FORMAT: Format = Format {
    what: "checkpoints",
    version: 1,
    max_bytes: 1 << 20,
    help: Some("restore it with the mvm that made it"),
};
/// What is on record of it.
const RECORD: &str = "mvm.json";
/// Longest name of a processor or of a program's content, in bytes.
const MAX_TEXT: usize = 1024;
/// Longest state, in bytes; the machine's process reads less.
const MAX_STATE: u64 = 16 << 20;
/// How much longer than RAM its file is at most, in bytes.
const MEMORY_HEADER: u64 = 1 << 20;

/// What a checkpoint is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Checkpoint {
    version: u32,
    /// The processor and the host's kernel it ran on.
    processor: String,
    /// SHA-256 of the program that was the machine.
    vmm_sha256: String,
    /// The container's first process, by the number its agent knows.
    pub(crate) process: u64,
    /// That has a terminal.
    pub(crate) terminal: bool,
    /// Its machine.
    pub(crate) machine: SavedMachine,
    /// SHA-256 of each disk that is only read, in order.
    pub(crate) layers: Vec<String>,
    files: Files,
}

/// Its files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Files {
    state: PackedFile,
    memory: PackedFile,
    writes: Option<PackedFile>,
}

/// A file in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PackedFile {
    /// Its length unpacked, in bytes.
    bytes: u64,
    /// Of it as it is packed.
    sha256: String,
}

/// A file of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    State,
    Memory,
    Writes,
}

impl Piece {
    fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Memory => "memory",
            Self::Writes => "writes",
        }
    }
}

impl Checkpoint {
    /// One of what was saved of a machine whose program is at `program`.
    ///
    /// # Errors
    /// It cannot be told what it ran on.
    pub(crate) fn of(
        machine: SavedMachine,
        (process, terminal): (u64, bool),
        layers: Vec<String>,
        program: &Path,
    ) -> Result<Self, Failure> {
        let processor =
            crate::template::processor().context(|| "cannot tell the host's processor".to_owned())?;
        let vmm_sha256 = crate::digest::sha256(program);
        let vmm_sha256 = vmm_sha256.context(|| format!("cannot digest {}", program.display()))?;
        let files = Files::default();
        Ok(Self { version: FORMAT.version, processor, vmm_sha256, process, terminal, machine, layers, files })
    }

    /// Writes it to `to` from the files that were saved in `from`. Nothing of it is left there if that fails.
    ///
    /// # Errors
    /// One of its names is taken, or the host's reason.
    pub(crate) fn write(mut self, from: &Path, to: &Path) -> Result<(), Failure> {
        let mut made = Vec::new();
        let written = self.write_to(from, to, &mut made);
        if written.is_err() {
            for path in made {
                let _ = fs::remove_file(path);
            }
        }
        written
    }

    fn write_to(&mut self, from: &Path, to: &Path, made: &mut Vec<PathBuf>) -> Result<(), Failure> {
        let mut packed = |piece: Piece, from: &Path| {
            let path = to.join(piece.name());
            let file = create(&path)?;
            made.push(path);
            let from = File::open(from).context(|| format!("cannot read {}", from.display()))?;
            let mut stream = Digested::new(BufWriter::new(file));
            let bytes = pack(&from, &mut stream).and_then(|bytes| stream.flush().map(|()| bytes));
            let bytes = bytes.context(|| format!("cannot write the {} to {}", piece.name(), to.display()))?;
            Ok::<_, Failure>(PackedFile { bytes, sha256: stream.finish().1 })
        };
        let writes = self.machine.written().map(|number| packed(Piece::Writes, &disk_file(from, number)));
        self.files = Files {
            state: packed(Piece::State, &state_file(from))?,
            memory: packed(Piece::Memory, &memory_file(from))?,
            writes: writes.transpose()?,
        };
        let path = to.join(RECORD);
        let failed = || format!("cannot write {}", path.display());
        let text = serde_json::to_vec_pretty(self).context(failed)?;
        let mut record = create(&path)?;
        made.push(path.clone());
        record.write_all(&text).context(failed)
    }

    /// Whether it can be what was written.
    fn check(&self) -> Result<(), Failure> {
        let wrong = |what: &str| Err(Failure::new(format!("it makes no sense: {what}")));
        self.machine.check()?;
        let written = self.machine.written().and_then(|number| self.machine.disks.get(number));
        if self.layers.len() != self.machine.disks.iter().filter(|disk| disk.read_only).count() {
            return wrong("not a digest for each disk");
        }
        if self.files.writes.as_ref().map(|file| file.bytes) != written.map(|disk| disk.bytes) {
            return wrong("another disk of writes than its machine has");
        }
        if self.processor.len().max(self.vmm_sha256.len()) > MAX_TEXT {
            return wrong("words longer than there are");
        }
        let memory = self.machine.bytes();
        if self.files.memory.bytes > memory.saturating_add(MEMORY_HEADER)
            || self.files.state.bytes > MAX_STATE
        {
            return wrong("more memory or devices than its machine has");
        }
        Ok(())
    }

    /// Whether a machine can go on from it on this host, as far as can be told without trying.
    fn check_host(&self) -> Result<(), Failure> {
        let (processor, vmm_sha256) = here(None)?;
        let ran = Ran { processor: &self.processor, vmm_sha256: &self.vmm_sha256 };
        let here = Ran { processor: &processor, vmm_sha256: &vmm_sha256 };
        ran.fits(self.machine.protocol, &here).map_err(Failure::refused)
    }
}

/// A checkpoint that is there.
#[derive(Debug)]
pub(crate) struct Opened {
    /// What it is.
    pub(crate) checkpoint: Checkpoint,
    directory: OwnedFd,
    path: PathBuf,
}

impl Opened {
    /// The one in `directory`.
    ///
    /// # Errors
    /// There is none, or one of another version or that cannot be.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let failed = || format!("cannot read the checkpoint in {}", path.display());
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let directory = File::options().read(true).custom_flags(flags).open(path).context(failed)?.into();
        let record = open_file(&directory, RECORD).context(failed).map_err(|failure| {
            failure.help("only what a task of this runtime was checkpointed to can be restored with it")
        })?;
        let checkpoint: Checkpoint = FORMAT.understand(record, failed)?;
        checkpoint.check().context(failed)?;
        Ok(Self { checkpoint, directory, path: path.to_owned() })
    }

    /// Whether a machine can go on from it on this host.
    ///
    /// # Errors
    /// What does not fit, and the way out.
    pub(crate) fn check_host(&self) -> Result<(), Failure> {
        self.checkpoint.check_host().context(|| format!("cannot restore from {}", self.path.display()))
    }

    /// Unpacks a file of it into `to`, which is empty.
    ///
    /// # Errors
    /// It is not what was written, or the host's reason. What is in `to` by then is of no use.
    pub(crate) fn unpack(&self, piece: Piece, to: &File) -> Result<(), Failure> {
        let name = piece.name();
        let failed = || format!("cannot unpack the {name} in {}", self.path.display());
        let files = &self.checkpoint.files;
        let packed = match piece {
            Piece::State => Some(&files.state),
            Piece::Memory => Some(&files.memory),
            Piece::Writes => files.writes.as_ref(),
        };
        let PackedFile { bytes, sha256 } = packed.ok_or_else(|| Failure::new(failed()))?;
        let file = open_file(&self.directory, name).context(failed)?;
        let mut stream = Digested::new(BufReader::new(file));
        unpack(&mut stream, to, *bytes).context(failed)?;
        if stream.finish().1 != *sha256 {
            let why = Failure::new("its digest is another than was written down");
            return Err(Failure::because(failed(), why).help("the checkpoint is damaged: make another"));
        }
        Ok(())
    }
}

/// Opens a regular file of the directory. Whatever else is there is not so much as opened.
fn open_file(directory: &OwnedFd, name: &str) -> std::io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let found = File::from(openat(directory, name, flags, Mode::empty())?);
    if !found.metadata()?.is_file() {
        return Err(std::io::Error::other(format!("{name} is no file")));
    }
    File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
pub(super) mod tests;
