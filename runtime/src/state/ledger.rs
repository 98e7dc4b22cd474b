//! The ledger: which of the host's resources a container has. Each is noted before it is made, so that whatever a
//! crash leaves behind is named here; undoing what was never made is no error.
//!
//! The file is appended to, a line for each resource. A line that a crash cut short names nothing that was made.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::process::ProcessId;
use crate::failure::{Context, Failure};

/// Largest ledger that is read, in bytes.
const MAX_LEDGER: u64 = 4 << 20;

/// Something of the host that a container has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Resource {
    /// A process. Noted once it has a number: until then it watches whoever started it and ends with it.
    Process(ProcessId),
    /// A file or socket.
    File {
        /// Where.
        path: PathBuf,
    },
    /// A directory with all in it.
    Directory {
        /// Where.
        path: PathBuf,
    },
    /// A control group; its processes are killed.
    Cgroup {
        /// Where.
        path: PathBuf,
    },
}

/// A container's ledger.
#[derive(Debug)]
pub struct Ledger {
    file: File,
}

impl Ledger {
    /// Opens a ledger, new or old.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let mut options = File::options();
        let file = options.create(true).append(true).read(true).mode(0o600).open(path);
        Ok(Self { file: file.context(|| format!("cannot open {}", path.display()))? })
    }

    /// Notes a resource that is about to be made.
    ///
    /// # Errors
    /// It cannot be written down: then it must not be made.
    pub fn note(&self, resource: &Resource) -> Result<(), Failure> {
        let failed = || "cannot note a resource in the ledger".to_owned();
        // A line of its own even after one that was cut short.
        let mut line = b"\n".to_vec();
        serde_json::to_writer(&mut line, resource).context(failed)?;
        line.push(b'\n');
        (&self.file).write_all(&line).context(failed)
    }

    /// Everything that was noted, in order.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn entries(&self) -> Result<Vec<Resource>, Failure> {
        let failed = || "cannot read the ledger".to_owned();
        let mut text = Vec::new();
        let mut file = self.file.try_clone().context(failed)?;
        std::io::Seek::rewind(&mut file).context(failed)?;
        file.take(MAX_LEDGER).read_to_end(&mut text).context(failed)?;
        Ok(text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }

    /// Undoes everything, the last first. What is not there is undone.
    ///
    /// # Errors
    /// The first that could not be undone; the rest has been tried all the same.
    pub fn settle(&self) -> Result<(), Failure> {
        let mut first = Ok(());
        for resource in self.entries()?.iter().rev() {
            let undone = resource.undo();
            if first.is_ok() {
                first = undone;
            }
        }
        first
    }
}

impl Resource {
    /// Removes it if it is there.
    ///
    /// # Errors
    /// It is there and stays.
    pub fn undo(&self) -> Result<(), Failure> {
        let gone = |result: std::io::Result<()>, what: &Path| match result {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.context(|| format!("cannot remove {}", what.display())),
        };
        match self {
            Self::Process(id) => {
                id.kill();
                Ok(())
            }
            Self::File { path } => gone(fs::remove_file(path), path),
            Self::Directory { path } => gone(fs::remove_dir_all(path), path),
            Self::Cgroup { path } => {
                // Version 2 has a file for it; what it does not reach the removal will say.
                let _ = fs::write(path.join("cgroup.kill"), "1");
                gone(fs::remove_dir(path), path)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_undone_the_last_first_and_twice_is_once() {
        let dir = tempfile::tempdir().unwrap();
        let (outer, inner) = (dir.path().join("d"), dir.path().join("d/f"));
        let ledger = Ledger::open(&dir.path().join("ledger")).unwrap();
        ledger.note(&Resource::Directory { path: outer.clone() }).unwrap();
        ledger.note(&Resource::File { path: inner.clone() }).unwrap();
        ledger.note(&Resource::File { path: dir.path().join("never made") }).unwrap();
        fs::create_dir(&outer).unwrap();
        fs::write(&inner, "").unwrap();
        ledger.settle().unwrap();
        assert!(!outer.exists());
        ledger.settle().unwrap();
    }

    #[test]
    fn every_prefix_of_a_ledger_names_the_whole_lines_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let files: Vec<_> = (0..4).map(|n| Resource::File { path: format!("/none/{n}").into() }).collect();
        let ledger = Ledger::open(&path).unwrap();
        files.iter().for_each(|file| ledger.note(file).unwrap());
        let whole = fs::read(&path).unwrap();
        for end in 0..=whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let entries = Ledger::open(&path).unwrap().entries().unwrap();
            assert_eq!(entries, files[..entries.len()], "{end}");
            // And what is noted after a torn line is read.
            let ledger = Ledger::open(&path).unwrap();
            ledger.note(&files[0]).unwrap();
            assert_eq!(ledger.entries().unwrap().last(), Some(&files[0]), "{end}");
        }
    }

    #[test]
    fn a_process_is_killed_unless_its_number_is_another_s() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        Resource::Process(ProcessId { started: id.started + 1, ..id }).undo().unwrap();
        assert!(id.is_alive(), "another process was killed");
        let ledger = Ledger::open(&dir.path().join("ledger")).unwrap();
        ledger.note(&Resource::Process(id)).unwrap();
        ledger.settle().unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
