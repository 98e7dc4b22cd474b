//! Room beside the images for what is there for a moment, such as the blobs of an image that is fetched.

use std::fs::{self, File};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use super::{Store, is_at};
use crate::image::error::{Error, Result};
use crate::image::source::Key;

/// How the directories' names begin.
const PREFIX: &str = "scratch-";

/// A directory that goes away with this; if its owner dies first, with the next one made.
pub(in crate::image) struct Scratch {
    directory: TempDir,
    _lock: Flock<File>,
}

impl Scratch {
    pub(in crate::image) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Store {
    /// Whether what a key stands for is there.
    pub(in crate::image) fn has(&self, key: &Key) -> bool {
        self.find(&key.hex()).is_ok_and(|found| found.is_some())
    }

    /// A new directory.
    pub(in crate::image) fn scratch(&self) -> Result<Scratch> {
        let fail = |source| Error::Write { path: self.root.clone(), source };
        self.sweep_scratch();
        loop {
            let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&self.root).map_err(fail)?;
            let lock = File::open(directory.path()).map_err(fail)?;
            let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| fail(errno.into()))?;
            // A sweep may have come between.
            if is_at(&lock, directory.path()) {
                return Ok(Scratch { directory, _lock: lock });
            }
        }
    }

    /// Removes directories whose owner died. What cannot be removed now is tried again by the next one.
    fn sweep_scratch(&self) {
        let Ok(entries) = self.root.read_dir() else { return };
        let scratch =
            entries.flatten().filter(|it| it.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()));
        for path in scratch.map(|entry| entry.path()) {
            let Ok(directory) = File::open(&path) else { continue };
            if let Ok(_lock) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_of_the_dead_is_swept_and_that_of_the_living_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::create_dir_all(dir.path().join("scratch-dead/blobs")).unwrap();
        let living = store.scratch().unwrap();
        assert!(!dir.path().join("scratch-dead").exists());
        drop(store.scratch().unwrap());
        assert!(living.path().is_dir());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}
