//! Room beside the images for what is there for a moment, such as the blobs of an image that is fetched.

use super::Store;
use crate::catalog::Scratch;
use crate::image::error::{Error, Result};
use crate::image::source::Key;

/// How the directories' names begin.
const PREFIX: &str = "scratch-";

impl Store {
    /// Whether what a key stands for is there.
    pub(in crate::image) fn has(&self, key: &Key) -> bool {
        self.find(&key.hex()).is_ok_and(|found| found.is_some())
    }

    /// A new directory, gone with the value.
    pub(in crate::image) fn scratch(&self) -> Result<Scratch> {
        Scratch::new(&self.root, PREFIX).map_err(|source| Error::Write { path: self.root.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
