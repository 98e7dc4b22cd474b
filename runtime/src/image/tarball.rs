//! Tar streams: headers with their PAX and GNU extensions, one entry at a time.
//!
//! Every extension is bounded before it is read. What an entry means follows Go's `archive/tar`,
//! which the engines that write images are built on.

use std::io::{self, Read};
use std::ops::Range;

use tar::{EntryType, Header};

use super::error::{Error, Result, printable};
use super::limits::{MAX_HEADER_BYTES, MAX_PATH_BYTES};
use super::pax::Extensions;
use super::slice::FileSlice;
use super::sparse;
use crate::erofs::{Meta, Mtime};

/// Headers and bodies are padded to this.
pub(super) const RECORD: usize = 512;

/// What a tar stream is read from.
pub(super) trait Input: Read {
    /// Moves on by `len` bytes that nobody wants.
    fn skip(&mut self, len: u64) -> io::Result<()>;
}

impl Input for FileSlice {
    fn skip(&mut self, len: u64) -> io::Result<()> {
        Self::skip(self, len)
    }
}

/// One file of a tar stream.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) meta: Meta,
    pub(super) kind: EntryKind,
}

/// What the entry is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// `size` bytes of which `extents` are in the stream.
    File {
        size: u64,
        extents: Vec<Range<u64>>,
    },
    Directory,
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Reads entries from `R`.
pub(super) struct Tarball<R> {
    input: R,
    /// Bytes of the current body that are not read yet.
    body: u64,
    /// Bytes after it up to the next header.
    padding: u64,
}

impl<R: Input> Tarball<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, body: 0, padding: 0 }
    }

    pub(super) fn input(&self) -> &R {
        &self.input
    }

    /// Length of the current body in the stream, as far as it is not read.
    pub(super) fn body_len(&self) -> u64 {
        self.body
    }

    /// The next entry; `None` at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        while let Some(header) = self.header()? {
            let size = size(&header)?;
            match header.entry_type() {
                EntryType::XHeader => extensions.parse(&self.extension(size, MAX_HEADER_BYTES)?)?,
                EntryType::GNULongName => extensions.path = Some(self.long_name(size)?),
                EntryType::GNULongLink => extensions.link = Some(self.long_name(size)?),
                // Comments of whoever wrote the archive.
                EntryType::XGlobalHeader => self.set_body(size)?,
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
        Ok(None)
    }

    /// The next header; `None` for the two blocks of zeros that end an archive, or its bare end.
    fn header(&mut self) -> Result<Option<Header>> {
        self.skip_body()?;
        let Some(record) = self.record()? else { return Ok(None) };
        if record == [0; RECORD] {
            return match self.record()? {
                None => Ok(None),
                Some(second) if second == [0; RECORD] => Ok(None),
                Some(_) => Err(bad("a lone block of zeros")),
            };
        }
        let header = Header::from_byte_slice(&record).clone();
        let sum: u32 = record.iter().map(|byte| u32::from(*byte)).sum();
        // The checksum counts its own field as blanks.
        let field: u32 = record[148..156].iter().map(|byte| u32::from(*byte)).sum();
        if number(&header.as_old().cksum) != Some(i64::from(sum - field + 8 * 32)) {
            return Err(bad("its checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<Entry> {
        let size = match (is_header_only(header.entry_type()), extensions.size) {
            (true, _) => 0,
            (false, Some(size)) => size,
            (false, None) => size(header)?,
        };
        // Headers of a GNU sparse file are followed by more of its map, before the body.
        let gnu_map = sparse::gnu_map(header, || self.record()?.ok_or_else(truncated))?;
        self.set_body(size)?;
        let map = match gnu_map {
            Some(map) => Some(map),
            None => sparse::pax_map(&extensions.sparse, || {
                let mut record = [0; RECORD];
                self.read_exact(&mut record)?;
                Ok(record)
            })?,
        };
        let Extensions { path, link, .. } = &extensions;
        let path = extensions.sparse.name.as_ref().or(path.as_ref()).cloned();
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = link.clone().or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let kind = self.kind(header, &path, link, map)?;
        Ok(Entry { path, meta: meta(header, extensions)?, kind })
    }

    fn kind(
        &self,
        header: &Header,
        path: &[u8],
        link: Option<Vec<u8>>,
        map: Option<sparse::Map>,
    ) -> Result<EntryKind> {
        let link = || link.ok_or_else(|| bad("a link to nothing"));
        let major = || header.device_major().ok().flatten().ok_or_else(|| bad("a device without a number"));
        let minor = || header.device_minor().ok().flatten().ok_or_else(|| bad("a device without a number"));
        Ok(match header.entry_type() {
            // From before there were types for directories.
            EntryType::Regular if path.ends_with(b"/") => EntryKind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let whole =
                    || sparse::Map { size: self.body, extents: std::iter::once(0..self.body).collect() };
                let map = map.unwrap_or_else(whole);
                if map.stored() != self.body {
                    return Err(bad("the map of a sparse file does not match its length"));
                }
                EntryKind::File { size: map.size, extents: map.extents }
            }
            EntryType::Directory => EntryKind::Directory,
            EntryType::Link => EntryKind::HardLink(link()?),
            EntryType::Symlink => EntryKind::Symlink(link()?),
            EntryType::Char => EntryKind::CharDevice { major: major()?, minor: minor()? },
            EntryType::Block => EntryKind::BlockDevice { major: major()?, minor: minor()? },
            EntryType::Fifo => EntryKind::Fifo,
            other => {
                return Err(bad(&format!("type {:?} of {}", char::from(other.as_byte()), printable(path))));
            }
        })
    }

    /// The whole body of an extension entry.
    fn extension(&mut self, size: u64, limit: u64) -> Result<Vec<u8>> {
        if size > limit {
            return Err(Error::Limit { what: "bytes of a tar header", limit });
        }
        self.set_body(size)?;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(stream)?;
        if bytes.len() as u64 != size {
            return Err(truncated());
        }
        Ok(bytes)
    }

    /// A GNU long name: a string with a zero byte at its end.
    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.extension(size, MAX_PATH_BYTES as u64 + 1)?;
        if let Some(end) = name.iter().position(|byte| *byte == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    fn set_body(&mut self, size: u64) -> Result<()> {
        let padded = size.checked_next_multiple_of(RECORD as u64).ok_or_else(|| bad("its size is absurd"))?;
        self.body = size;
        self.padding = padded - size;
        Ok(())
    }

    fn skip_body(&mut self) -> Result<()> {
        let rest = self.body.checked_add(self.padding).ok_or_else(|| bad("its size is absurd"))?;
        self.input.skip(rest).map_err(stream)?;
        (self.body, self.padding) = (0, 0);
        Ok(())
    }

    /// 512 bytes, or `None` at the very end.
    fn record(&mut self) -> Result<Option<[u8; RECORD]>> {
        let mut record = [0; RECORD];
        let mut got = 0;
        while let Some(rest) = record.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(truncated()),
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(stream(error)),
            }
        }
        Ok(Some(record))
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> Result<()> {
        Read::read_exact(self, bytes).map_err(stream)
    }
}

/// Reads the body of the current entry.
impl<R: Input> Read for Tarball<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.body).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.input.read(buffer.get_mut(..want).unwrap_or_default())?;
        self.body = self.body.saturating_sub(got as u64);
        Ok(got)
    }
}

fn meta(header: &Header, extensions: Extensions) -> Result<Meta> {
    let old = header.as_old();
    let id = |id: Option<u64>, field: &[u8]| {
        let id =
            id.or_else(|| number(field)?.try_into().ok()).ok_or_else(|| bad("its owner is no number"))?;
        u32::try_from(id).map_err(|_| bad("its owner has more than 32 bits"))
    };
    let mode = number(&old.mode).ok_or_else(|| bad("its mode is no number"))? & 0o7777;
    let seconds = number(&old.mtime).ok_or_else(|| bad("its time is no number"))?;
    Ok(Meta {
        // Twelve bits are left.
        mode: mode as u16,
        uid: id(extensions.uid, &old.uid)?,
        gid: id(extensions.gid, &old.gid)?,
        mtime: extensions.mtime.unwrap_or(Mtime { seconds, nanoseconds: 0 }),
        xattrs: extensions.xattrs,
    })
}

fn size(header: &Header) -> Result<u64> {
    let size = number(&header.as_old().size).and_then(|size| size.try_into().ok());
    size.ok_or_else(|| bad("its size is no number"))
}

/// A number in a header: octal digits between blanks and zero bytes, none meaning 0, or GNU's
/// big-endian binary, marked by the first bit.
fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The second bit is the sign; it fills what the field does not have.
        let start = if first & 0x40 == 0 { i64::from(first & 0x3f) } else { i64::from(first | 0xc0) - 256 };
        return rest
            .iter()
            .try_fold(start, |value, byte| value.checked_mul(256)?.checked_add((*byte).into()));
    }
    let text = field.split(|byte| *byte == 0).next()?.trim_ascii();
    text.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

/// Types that never have a body, whatever their size field says.
fn is_header_only(entry_type: EntryType) -> bool {
    matches!(
        entry_type,
        EntryType::Link
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Directory
            | EntryType::Fifo
    )
}

pub(super) fn bad(reason: &str) -> Error {
    Error::Tar { reason: reason.to_owned() }
}

fn truncated() -> Error {
    bad("the archive ends in the middle of it")
}

/// A failure of what the stream comes from, which may have been one of ours in disguise.
pub(super) fn stream(source: io::Error) -> Error {
    match source.downcast::<Error>() {
        Ok(error) => error,
        Err(source) if source.kind() == io::ErrorKind::UnexpectedEof => truncated(),
        Err(source) => Error::Read { what: "the tar stream".to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b" 644 \0\0\0"), Some(0o644));
        assert_eq!(number(&[0; 8]), Some(0));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"12345678"), None, "8 is no octal digit");
        assert_eq!(number(b"-000001\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 2]), Some(258));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0x80, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None, "more than 63 bits");
    }
}
