//! A part of an open file, read without moving the file's own offset.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::OFlag;
use std::os::unix::fs::OpenOptionsExt as _;

use super::error::{Error, Result};

/// Bytes `at..end` of a file.
#[derive(Clone, Debug)]
pub(super) struct FileSlice {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl FileSlice {
    /// All of a regular file. Devices, pipes and the like are refused: by what was opened, not by
    /// what the path was a moment ago.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let open = |source| Error::Open { path: path.to_owned(), source };
        // Opening a pipe would wait for its writer.
        let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        if !metadata.is_file() {
            return Err(open(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        Ok(Self { file: Arc::new(file), at: 0, end: metadata.len() })
    }

    /// All of a file that is open already.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let end = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), at: 0, end })
    }

    pub(super) fn len(&self) -> u64 {
        self.end - self.at
    }

    /// Where the next byte is in the file.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// Another part of the same file, if it is inside this one.
    pub(super) fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len).filter(|end| *end <= self.end)?;
        Some(Self { file: Arc::clone(&self.file), at: start, end })
    }

    /// Moves on without reading.
    pub(super) fn skip(&mut self, len: u64) -> io::Result<()> {
        self.at = self
            .at
            .checked_add(len)
            .filter(|at| *at <= self.end)
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        Ok(())
    }
}

impl Read for FileSlice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.len()).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}
