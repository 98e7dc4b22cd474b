//! Directories that are there for as long as somebody works in them.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

/// A directory that goes away with this; if its owner dies first, with the next one made.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: TempDir,
    /// For as long as it is at work.
    _lock: Flock<File>,
}

impl Scratch {
    /// A new one in `root`, whose name begins with `prefix`. Those of the dead are swept.
    pub(crate) fn new(root: &Path, prefix: &str) -> io::Result<Self> {
        sweep(root, prefix);
        loop {
            let mode = Permissions::from_mode(0o700);
            let directory = tempfile::Builder::new().prefix(prefix).permissions(mode).tempdir_in(root)?;
            // A sweep may come between, even before it is opened.
            let opened = match File::open(directory.path()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            let lock = Flock::lock(opened, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
            if is_at(&lock, directory.path()) {
                return Ok(Self { directory, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Leaves it where it is by now.
    pub(super) fn keep(self) {
        let _ = self.directory.keep();
    }

    /// Removes it.
    pub(super) fn close(self) -> io::Result<()> {
        self.directory.close()
    }
}

/// Removes directories of `root` whose owner died. What cannot be removed now is tried again by the next sweep.
pub(super) fn sweep(root: &Path, prefix: &str) {
    let Ok(entries) = root.read_dir() else { return };
    let ours = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes());
    for path in entries.flatten().filter(ours).map(|entry| entry.path()) {
        let Ok(directory) = File::open(&path) else { continue };
        if let Ok(_lock) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Whether an open file is the one at a path.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let place = |metadata: io::Result<fs::Metadata>| metadata.ok().map(|it| (it.dev(), it.ino()));
    place(path.metadata()).is_some_and(|there| place(file.metadata()) == Some(there))
}
