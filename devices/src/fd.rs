//! How a device's configuration names a file the host already opened.

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// The number of an inherited file descriptor, as it stands in a serialised configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdSlot(pub u32);

/// Hands each opened file to the one device that names it.
pub trait FdSource {
    /// Gives the file up to the caller; a slot that is empty or taken already is an error.
    fn take(&mut self, slot: FdSlot) -> io::Result<OwnedFd>;
}

#[cfg(any(test, feature = "testing"))]
impl FdSource for std::collections::HashMap<FdSlot, OwnedFd> {
    fn take(&mut self, slot: FdSlot) -> io::Result<OwnedFd> {
        self.remove(&slot).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}
