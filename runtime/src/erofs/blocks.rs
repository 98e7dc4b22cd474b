//! The image file while it grows: buffered, append only, block by block.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;

use super::error::Error;
use super::format::{BLOCK, BLOCK_SIZE};

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;

/// Appends to a file through a buffer, leaving holes where asked to.
pub(super) struct BlockFile {
    file: File,
    buffer: Vec<u8>,
    /// Where the buffer's first byte belongs.
    flushed: u64,
}

impl BlockFile {
    /// Starts at byte `start` of `file`.
    pub(super) fn new(file: File, start: u64) -> Self {
        Self { file, buffer: Vec::with_capacity(BUFFER), flushed: start }
    }

    pub(super) fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// The number of the next block; the position must be at a block's start.
    pub(super) fn next_block(&self) -> Result<u32, Error> {
        u32::try_from(self.position().div_ceil(BLOCK_SIZE)).map_err(|_| Error::TooLarge)
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        if bytes.len() >= BUFFER {
            self.file.write_all_at(bytes, self.flushed).map_err(Error::Write)?;
            self.flushed += bytes.len() as u64;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Appends what `read` puts into a buffer of at most `len` bytes, and returns what it returned.
    pub(super) fn append_from(
        &mut self,
        len: usize,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Result<io::Result<usize>, Error> {
        if self.buffer.len() == BUFFER {
            self.flush()?;
        }
        let start = self.buffer.len();
        let end = BUFFER.min(start + len);
        self.buffer.resize(end, 0);
        let result = read(&mut self.buffer[start..end]);
        let got = result.as_ref().copied().unwrap_or(0).min(end - start);
        self.buffer.truncate(start + got);
        Ok(result)
    }

    /// Moves on by `len` bytes that read as zero.
    pub(super) fn skip(&mut self, len: u64) -> Result<(), Error> {
        match usize::try_from(len) {
            Ok(len) if self.buffer.len().saturating_add(len) <= BUFFER => {
                self.buffer.resize(self.buffer.len() + len, 0);
            }
            _ => {
                self.flush()?;
                self.flushed = self.flushed.checked_add(len).ok_or(Error::TooLarge)?;
            }
        }
        Ok(())
    }

    /// Moves on to the start of a block.
    pub(super) fn pad(&mut self) -> Result<(), Error> {
        let rest = self.position() % BLOCK_SIZE;
        if rest == 0 { Ok(()) } else { self.skip(BLOCK as u64 - rest) }
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.file.write_all_at(&self.buffer, self.flushed).map_err(Error::Write)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left and hands the file back, as long as what was appended.
    pub(super) fn into_file(mut self) -> Result<File, Error> {
        self.flush()?;
        self.file.set_len(self.flushed).map_err(Error::Write)?;
        self.file.flush().map_err(Error::Write)?;
        Ok(self.file)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }
}
