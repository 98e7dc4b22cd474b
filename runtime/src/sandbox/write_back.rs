//! What containers wrote to a copied file goes to the host's file when they are removed, as through a bind mount.
//!
//! The host's file is held from when it was mounted on, so that it is that one which is written, whatever its path
//! means by then; it is held so that nobody is kept from executing it.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use mvm_protocol::{Get, GotContent, Place};

use super::files::MAX_BYTES;
use crate::agent::AgentClient;

/// A file of the host that containers may write.
#[derive(Debug)]
pub(super) struct Original(File);

impl Original {
    /// The file at `source`, which is followed if it is a link.
    pub(super) fn open(source: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(source).map(Self)
    }

    /// Gives it new content. It stays the same file: others may have it mounted.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        OpenOptions::new().write(true).truncate(true).open(path)?.write_all(bytes)
    }
}

/// The bytes of the file that is share `name` in the guest. What is no file, larger than what is copied, or not told
/// by `end` is an error.
pub(super) fn fetch(agent: &AgentClient, name: &str, end: Instant) -> io::Result<Vec<u8>> {
    let most = usize::try_from(MAX_BYTES).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    loop {
        let offset = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let get = Get { place: Place::Shared(name.to_owned()), path: String::new(), offset };
        match agent.get_by(get, end).map_err(io::Error::other)?.content {
            GotContent::File(part) if part.is_empty() => return Ok(bytes),
            GotContent::File(part) if bytes.len().saturating_add(part.len()) <= most => bytes.extend(part),
            _ => {
                let why = format!("it is no file of at most {MAX_BYTES} bytes any more");
                return Err(io::Error::new(ErrorKind::InvalidData, why));
            }
        }
    }
}
