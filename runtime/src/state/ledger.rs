//! The ledger: which of the host's resources a container has. Each is noted before it is made, so that whatever a
//! crash leaves behind is named here; undoing what was never made is no error.
//!
//! The file is appended to, a line for each resource. A line that a crash cut short names nothing that was made.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::process::ProcessId;
use crate::cgroup;
use crate::failure::{Context, Failure};
use crate::net::{TwinTrace, remove_forward, sweep_leases};

/// Name of a ledger in the directory it is about.
pub(super) const NAME: &str = "ledger";
/// Largest ledger that is read, in bytes.
const MAX_LEDGER: u64 = 4 << 20;
/// Longest wait for a process that was killed to be gone: until then it has what it had.
const DYING: Duration = Duration::from_secs(5);

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
    /// A directory with all in it, and what a ledger in it names.
    Directory {
        /// Where.
        path: PathBuf,
    },
    /// A control group; others may have made themselves at home in it, and then it stays.
    Cgroup {
        /// Where.
        path: PathBuf,
    },
    /// A tap that stands for a link, and the redirection between them.
    Twin(TwinTrace),
    /// What makes a name space's localhost the guest's.
    Forward {
        /// Where the network name space is.
        netns: PathBuf,
    },
    /// A port of a bridge of ours: its lease, and what of bridges and rules of nftables follows from it.
    Port {
        /// Where the leases are.
        leases: PathBuf,
    },
}

/// A container's ledger.
#[derive(Debug)]
pub struct Ledger {
    file: File,
}

impl Ledger {
    /// The ledger of what belongs to a directory, new or old.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn of(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join(NAME);
        let file = File::options().create(true).append(true).read(true).mode(0o600).open(&path);
        Ok(Self { file: file.context(|| format!("cannot open {}", path.display()))? })
    }

    /// The same ledger for another user of it.
    ///
    /// # Errors
    /// The host's reason.
    pub fn try_clone(&self) -> Result<Self, Failure> {
        Ok(Self { file: self.file.try_clone().context(|| "cannot share the ledger".to_owned())? })
    }

    /// Notes a process that has just been started.
    ///
    /// # Errors
    /// It cannot be written down: then it must be ended.
    pub fn note_process(&self, pid: i32) -> Result<(), Failure> {
        // One that is gone already needs no note.
        ProcessId::of(pid).map_or(Ok(()), |id| self.note(&Resource::Process(id)))
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

    /// Undoes what `wanted` holds for: processes first, which use the rest, and the last first. What is not there is undone.
    ///
    /// # Errors
    /// The first that could not be undone; the rest has been tried all the same.
    pub fn undo(&self, wanted: impl Fn(&Resource) -> bool) -> Result<(), Failure> {
        let mut first = Ok(());
        let mut entries = self.entries()?;
        entries.reverse();
        entries.sort_by_key(|resource| !matches!(resource, Resource::Process(_)));
        for resource in entries.iter().filter(|resource| wanted(resource)) {
            let undone = resource.undo();
            if first.is_ok() {
                first = undone;
            }
        }
        first
    }

    /// Undoes everything, as [`Ledger::undo`] does, and forgets it. What is not there is undone.
    ///
    /// # Errors
    /// The first that could not be undone; the rest has been tried all the same.
    pub fn settle(&self) -> Result<(), Failure> {
        self.undo(|_| true)?;
        self.file.set_len(0).context(|| "cannot empty the ledger".to_owned())
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
                if id.end(DYING) {
                    return Ok(());
                }
                Err(Failure::new(format!("process {} was killed and does not end", id.pid)))
            }
            Self::File { path } => gone(fs::remove_file(path), path),
            Self::Directory { path } => {
                if path.join(NAME).exists() {
                    // What it names is lost with it: first that, then the directory.
                    Ledger::of(path)?.settle()?;
                }
                gone(fs::remove_dir_all(path), path)
            }
            Self::Cgroup { path } => gone(cgroup::remove(path), path),
            Self::Twin(trace) => trace.remove(),
            Self::Forward { netns } => remove_forward(netns),
            Self::Port { leases } => sweep_leases(leases),
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
        let ledger = Ledger::of(dir.path()).unwrap();
        ledger.note(&Resource::Directory { path: outer.clone() }).unwrap();
        ledger.note(&Resource::File { path: inner.clone() }).unwrap();
        ledger.note(&Resource::File { path: dir.path().join("never made") }).unwrap();
        fs::create_dir(&outer).unwrap();
        fs::write(&inner, "").unwrap();
        ledger.settle().unwrap();
        assert!(!outer.exists());
        assert_eq!(ledger.entries().unwrap(), []);
        ledger.settle().unwrap();
    }

    #[test]
    fn a_directory_s_own_ledger_is_settled_before_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, elsewhere) = (dir.path().join("sandbox"), dir.path().join("elsewhere"));
        fs::create_dir(&inner).unwrap();
        fs::write(&elsewhere, "").unwrap();
        Ledger::of(&inner).unwrap().note(&Resource::File { path: elsewhere.clone() }).unwrap();
        Resource::Directory { path: inner.clone() }.undo().unwrap();
        assert!(!inner.exists() && !elsewhere.exists());
    }

    #[test]
    fn processes_end_before_what_they_use_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("used");
        fs::write(&file, "").unwrap();
        // It ends as soon as the file is gone: by itself, if it was not killed before.
        let wait = format!("while [ -e {} ]; do :; done; echo gone", file.display());
        let mut shell = std::process::Command::new("/bin/sh");
        let mut child = shell.args(["-c", &wait]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        let ledger = Ledger::of(dir.path()).unwrap();
        ledger.note(&Resource::Process(id)).unwrap();
        ledger.note(&Resource::File { path: file.clone() }).unwrap();
        let reaper = std::thread::spawn(move || {
            let mut said = String::new();
            std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut said).unwrap();
            (child.wait().unwrap(), said)
        });
        ledger.settle().unwrap();
        assert!(!file.exists());
        let (status, said) = reaper.join().unwrap();
        assert!(!status.success() && said.is_empty(), "{status} {said}");
    }

    #[test]
    fn what_cannot_be_undone_stays_noted_and_the_rest_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(dir.path()).unwrap();
        let (file, stays) = (dir.path().join("file"), dir.path().join("stays"));
        fs::create_dir(&stays).unwrap();
        fs::write(&file, "").unwrap();
        for path in [&file, &stays] {
            ledger.note(&Resource::File { path: path.clone() }).unwrap(); // one is a directory
        }
        ledger.settle().unwrap_err();
        assert!(!file.exists());
        fs::remove_dir(&stays).unwrap();
        ledger.settle().unwrap();
        assert_eq!(ledger.entries().unwrap(), []);
    }

    #[test]
    fn every_prefix_of_a_ledger_names_the_whole_lines_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let files: Vec<_> = (0..4).map(|n| Resource::File { path: format!("/none/{n}").into() }).collect();
        let ledger = Ledger::of(dir.path()).unwrap();
        files.iter().for_each(|file| ledger.note(file).unwrap());
        let whole = fs::read(&path).unwrap();
        for end in 0..=whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let entries = Ledger::of(dir.path()).unwrap().entries().unwrap();
            assert_eq!(entries, files[..entries.len()], "{end}");
            // And what is noted after a torn line is read.
            let ledger = Ledger::of(dir.path()).unwrap();
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
        let ledger = Ledger::of(dir.path()).unwrap();
        ledger.note(&Resource::Process(id)).unwrap();
        ledger.settle().unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
