//! Making room: what was not used for long goes first, what a machine uses stays.

use std::fs::File;
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};

use super::{Cached, Store, remove_entry};
use crate::image::error::{Error, Result};

/// What may stay in a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// Most bytes on the host; the least recently used go until the rest fits.
    pub bytes: Option<u64>,
    /// Only what was used less than this ago stays.
    pub unused: Option<Duration>,
    /// File systems of images without a name go too.
    pub named: bool,
    /// File systems of which everything they were made from is gone from the host go too.
    pub only_with_origin: bool,
}

/// What pruning did.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Pruned {
    /// What was removed.
    pub removed: Vec<Cached>,
    /// Bytes of the host that were freed.
    pub freed_bytes: u64,
    /// How many would have gone but are in use.
    pub in_use: usize,
}

impl Store {
    /// Removes what does not fit into `keep`. File systems in use, which is who holds a
    /// [`super::Rootfs`], are left.
    pub fn prune(&self, keep: &Keep) -> Result<Pruned> {
        self.sweep()?;
        let (now, mut kept_bytes, mut pruned) = (SystemTime::now(), 0_u64, Pruned::default());
        for cached in self.list()? {
            let fits = keep.bytes.is_none_or(|most| kept_bytes.saturating_add(cached.disk_bytes) <= most);
            // A clock that was set back makes nothing old.
            let age = now.duration_since(cached.last_used).unwrap_or_default();
            let fresh = keep.unused.is_none_or(|longest| age < longest);
            let rooted = !keep.only_with_origin || cached.images.iter().any(|image| image.origin.exists());
            let called = !keep.named || cached.images.iter().any(|image| image.name.is_some());
            if fits && fresh && rooted && called {
                kept_bytes = kept_bytes.saturating_add(cached.disk_bytes);
            } else if self.remove_unused(&cached)? {
                pruned.freed_bytes = pruned.freed_bytes.saturating_add(cached.disk_bytes);
                pruned.removed.push(cached);
            } else {
                kept_bytes = kept_bytes.saturating_add(cached.disk_bytes);
                pruned.in_use += 1;
            }
        }
        Ok(pruned)
    }

    /// Removes a file system unless someone uses it, or works on it; whether it did.
    fn remove_unused(&self, cached: &Cached) -> Result<bool> {
        let Some(_lock) = self.lock_now(&cached.key)? else { return Ok(false) };
        let path = self.path(&cached.key, "erofs");
        let file = File::open(&path).map_err(|source| Error::Open { path, source })?;
        // Whoever opens it from now on waits for this lock, and then finds the file gone.
        let Ok(_unused) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
        remove_entry(self, &cached.key)?;
        Ok(true)
    }
}
