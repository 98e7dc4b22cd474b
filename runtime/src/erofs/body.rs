//! Bodies of regular files: whole blocks in the image, small ones in a spool until their inodes
//! are written.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::blocks::BlockFile;
use super::error::Error;
use super::format::{BLOCK, BLOCK_SIZE, EXTENDED_INODE};

/// Largest body that can share a block with its inode.
const MAX_INLINE: usize = BLOCK - EXTENDED_INODE;

/// The body of a regular file, as the writer that took it in knows it. Two nodes may share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content(pub(super) Place);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Empty,
    /// In the spool.
    Small {
        offset: u64,
        len: u16,
    },
    /// In the image, from a block's start.
    Blocks {
        first: u32,
        len: u64,
    },
}

impl Content {
    /// The body of an empty file, which needs no writer.
    pub const EMPTY: Self = Self(Place::Empty);

    /// Length of the file in bytes.
    pub fn size(self) -> u64 {
        match self.0 {
            Place::Empty => 0,
            Place::Small { len, .. } => u64::from(len),
            Place::Blocks { len, .. } => len,
        }
    }

    pub(super) fn first_block(self) -> Option<u32> {
        match self.0 {
            Place::Blocks { first, .. } => Some(first),
            _ => None,
        }
    }
}

/// All bodies of an image being written.
pub(super) struct Bodies {
    image: BlockFile,
    spool: BlockFile,
    /// Every run of blocks given to a body, in order.
    runs: Vec<Range<u32>>,
}

impl Bodies {
    pub(super) fn new(image: File, spool: File) -> Self {
        Self { image: BlockFile::new(image, BLOCK_SIZE), spool: BlockFile::new(spool, 0), runs: Vec::new() }
    }

    /// Takes in a body of `len` bytes of which only `extents` come from `body`, in order; between
    /// them it is zero.
    pub(super) fn append(
        &mut self,
        body: &mut dyn Read,
        len: u64,
        extents: &[Range<u64>],
    ) -> Result<Content, Error> {
        check(len, extents)?;
        match usize::try_from(len) {
            Ok(0) => Ok(Content::EMPTY),
            Ok(small) if small <= MAX_INLINE => self.append_small(body, small, extents),
            _ => self.append_blocks(body, len, extents),
        }
    }

    fn append_small(
        &mut self,
        body: &mut dyn Read,
        len: usize,
        extents: &[Range<u64>],
    ) -> Result<Content, Error> {
        let mut bytes = [0; MAX_INLINE];
        for extent in extents {
            // `check` keeps extents inside `len`, which is at most MAX_INLINE.
            let range = extent.start as usize..extent.end as usize;
            let part = bytes.get_mut(range).ok_or(Error::BadExtents { len: len as u64 })?;
            read_full(body, part, len as u64)?;
        }
        let offset = self.spool.position();
        self.spool.append(&bytes[..len])?;
        Ok(Content(Place::Small { offset, len: u16::try_from(len).map_err(|_| Error::TooLarge)? }))
    }

    fn append_blocks(
        &mut self,
        body: &mut dyn Read,
        len: u64,
        extents: &[Range<u64>],
    ) -> Result<Content, Error> {
        let first = self.image.next_block()?;
        let mut done = 0;
        for extent in extents {
            self.image.skip(extent.start - done)?;
            self.copy(body, extent.end - extent.start, len)?;
            done = extent.end;
        }
        self.image.skip(len - done)?;
        self.image.pad()?;
        self.runs.push(first..self.image.next_block()?);
        Ok(Content(Place::Blocks { first, len }))
    }

    fn copy(&mut self, body: &mut dyn Read, extent: u64, len: u64) -> Result<(), Error> {
        let mut left = extent;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX);
            let got = match self.image.append_from(want, |buffer| body.read(buffer))? {
                Ok(0) => return Err(Error::ShortBody { len, got: extent - left }),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(source) => return Err(Error::ReadBody { len, source }),
            };
            left = left.saturating_sub(got as u64);
        }
        Ok(())
    }

    /// Ends the taking in: the image to append metadata to, the small bodies, and the runs of
    /// blocks given out.
    pub(super) fn into_parts(mut self) -> Result<(BlockFile, Spool, Vec<Range<u32>>), Error> {
        self.image.flush()?;
        Ok((self.image, Spool(self.spool.into_file()?), self.runs))
    }
}

/// Small bodies, waiting for their inodes.
pub(super) struct Spool(File);

impl Spool {
    pub(super) fn read(&self, offset: u64, len: u16, out: &mut Vec<u8>) -> Result<(), Error> {
        let start = out.len();
        out.resize(start + usize::from(len), 0);
        self.0.read_exact_at(&mut out[start..], offset).map_err(Error::Write)
    }
}

fn check(len: u64, extents: &[Range<u64>]) -> Result<(), Error> {
    let mut done = 0;
    for extent in extents {
        if extent.start < done || extent.end < extent.start || extent.end > len {
            return Err(Error::BadExtents { len });
        }
        done = extent.end;
    }
    Ok(())
}

fn read_full(body: &mut dyn Read, part: &mut [u8], len: u64) -> Result<(), Error> {
    let mut got = 0;
    while got < part.len() {
        match body.read(&mut part[got..]) {
            Ok(0) => return Err(Error::ShortBody { len, got: got as u64 }),
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Error::ReadBody { len, source }),
        }
    }
    Ok(())
}
