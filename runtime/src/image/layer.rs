//! One layer: decompressed, checked against its digests, and put on the tree, in a single pass.

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, printable};
use super::limits::{MAX_RATIO, MAX_TOTAL_BYTES, RATIO_FREE_BYTES};
use super::merge::Merger;
use super::packed::Packing;
use super::progress::Progress;
use super::slice::FileSlice;
use super::tarball::{Entry, EntryKind, Input, Tarball};
use crate::erofs::{self, Kind, Meta, Node, Writer};

/// Bytes decompressed and hashed at once.
const BUFFER: usize = 256 << 10;
/// log2 of the largest window a zstd frame may ask memory for; zstd's own default.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Names that begin like this are not files: they hide files of lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// Names that begin like this are notes of an old union file system.
const NOTE: &[u8] = b".wh..wh.";
/// Hides everything lower layers have in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A layer as an image names it.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) blob: FileSlice,
    /// Digest of the blob as it is stored; archives of `docker save` have none.
    pub(super) digest: Option<Digest>,
    /// Digest of the tar stream.
    pub(super) diff_id: Digest,
}

impl Layer {
    /// Puts the layer on the tree; bodies go to `writer`. Nothing of it may be used unless this
    /// succeeds: digests are known at the end only.
    pub(super) fn apply(
        &self,
        merger: &mut Merger,
        writer: &mut Writer,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let stream = Unpacked::open(self, progress)?;
        let mut tarball = Tarball::new(stream);
        while let Some(entry) = tarball.next()? {
            apply_entry(entry, &mut tarball, merger, writer)?;
        }
        tarball.into_input().finish(self)
    }
}

fn apply_entry(
    entry: Entry,
    tarball: &mut Tarball<Unpacked<'_>>,
    merger: &mut Merger,
    writer: &mut Writer,
) -> Result<()> {
    let Entry { path, meta, kind } = entry;
    let trimmed = path.strip_suffix(b"/").unwrap_or(&path);
    let (parent, name) = match trimmed.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => {
            (trimmed.get(..slash).unwrap_or_default(), trimmed.get(slash + 1..).unwrap_or_default())
        }
        None => (&b""[..], trimmed),
    };
    if name == OPAQUE {
        return merger.opaque(&path, parent);
    }
    if name.starts_with(NOTE) {
        return Ok(());
    }
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        return merger.whiteout(&path, parent, hidden);
    }
    let kind = match kind {
        EntryKind::HardLink(target) => return merger.hard_link(&path, &target),
        EntryKind::File { size, extents } => {
            merger.charge_data(size)?;
            Kind::File(writer.append_sparse(tarball, size, &extents).map_err(|error| body(error, &path))?)
        }
        EntryKind::Directory => return merger.insert(&path, Node::directory(meta)).map(drop),
        EntryKind::Symlink(target) => Kind::Symlink(target.into()),
        EntryKind::CharDevice { major, minor } => Kind::CharDevice { major, minor },
        EntryKind::BlockDevice { major, minor } => Kind::BlockDevice { major, minor },
        EntryKind::Fifo => Kind::Fifo,
    };
    let meta = if matches!(kind, Kind::Symlink(_)) { Meta { mode: 0o777, ..meta } } else { meta };
    merger.insert(&path, Node { meta, kind }).map(drop)
}

/// Failures of the layer are the layer's, not those of the image being written.
fn body(error: erofs::Error, path: &[u8]) -> Error {
    match error {
        erofs::Error::ReadBody { source, .. } => match source.downcast::<Error>() {
            Ok(error) => error,
            Err(source) => Error::Read { what: printable(path), source },
        },
        erofs::Error::ShortBody { .. } => {
            Error::Entry { path: printable(path), reason: "the layer ends in the middle of it" }
        }
        other => Error::Erofs(other),
    }
}

/// The tar stream of a layer, hashed and counted on its way.
struct Unpacked<'a> {
    decoder: Decoder<'a>,
    hasher: Option<Hasher>,
    buffer: Vec<u8>,
    at: usize,
    total: u64,
}

enum Decoder<'a> {
    Plain(Stored<'a>),
    Gzip(MultiGzDecoder<BufReader<Stored<'a>>>),
    Zstd(zstd::Decoder<'static, BufReader<Stored<'a>>>),
}

impl<'a> Unpacked<'a> {
    fn open(layer: &Layer, progress: &'a mut dyn Progress) -> Result<Self> {
        let packing = Packing::of(&layer.blob).map_err(read)?;
        let stored_digest = layer.digest.as_ref().filter(|digest| **digest != layer.diff_id);
        let stored = Stored {
            slice: layer.blob.clone(),
            hasher: stored_digest.map(Digest::hasher),
            total: 0,
            progress,
        };
        let buffered = |stored| BufReader::with_capacity(BUFFER, stored);
        let decoder = match packing {
            Packing::None => Decoder::Plain(stored),
            Packing::Gzip => Decoder::Gzip(MultiGzDecoder::new(buffered(stored))),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(buffered(stored)).map_err(read)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(read)?;
                Decoder::Zstd(decoder)
            }
        };
        Ok(Self { decoder, hasher: Some(layer.diff_id.hasher()), buffer: Vec::new(), at: 0, total: 0 })
    }

    /// Reads on to the end, and compares the digests.
    fn finish(mut self, layer: &Layer) -> Result<()> {
        while self.fill().map_err(super::tarball::stream)? {}
        if let Some(hasher) = self.hasher.take() {
            matches_digest("the unpacked layer", hasher, &layer.diff_id)?;
        }
        let mut stored = match self.decoder {
            Decoder::Plain(stored) => stored,
            Decoder::Gzip(decoder) => decoder.into_inner().into_inner(),
            Decoder::Zstd(decoder) => decoder.finish().into_inner(),
        };
        io::copy(&mut stored, &mut io::sink()).map_err(read)?;
        match (stored.hasher, &layer.digest) {
            (Some(hasher), Some(digest)) => matches_digest("the layer", hasher, digest),
            _ => Ok(()),
        }
    }

    /// The next piece of the stream; false at its end.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.resize(BUFFER, 0);
        self.at = 0;
        let mut got = 0;
        while let Some(rest) = self.buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.decoder.read(rest) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.buffer.truncate(got);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&self.buffer);
        }
        self.total = self.total.saturating_add(got as u64);
        self.check_bounds()?;
        Ok(got > 0)
    }

    fn check_bounds(&self) -> io::Result<()> {
        let limit = |what, limit| Err(io::Error::other(Error::Limit { what, limit }));
        let stored = self.decoder.stored();
        if self.total > MAX_TOTAL_BYTES {
            return limit("bytes of an unpacked layer", MAX_TOTAL_BYTES);
        }
        if self.total > RATIO_FREE_BYTES.saturating_add(stored.saturating_mul(MAX_RATIO)) {
            return limit("bytes unpacked from one byte of a layer", MAX_RATIO);
        }
        Ok(())
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.buffer.len() && !self.fill()? {
            return Ok(0);
        }
        let got = self.buffer.get(self.at..).unwrap_or_default().read(buffer)?;
        self.at += got;
        Ok(got)
    }
}

impl Input for Unpacked<'_> {
    fn skip(&mut self, mut len: u64) -> io::Result<()> {
        while len > 0 {
            if self.at == self.buffer.len() && !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let left = self.buffer.len() - self.at;
            let step = usize::try_from(len).unwrap_or(usize::MAX).min(left);
            self.at += step;
            len -= step as u64;
        }
        Ok(())
    }
}

impl Decoder<'_> {
    /// Bytes of the blob that were read so far.
    fn stored(&self) -> u64 {
        match self {
            Self::Plain(stored) => stored.total,
            Self::Gzip(decoder) => decoder.get_ref().get_ref().total,
            Self::Zstd(decoder) => decoder.get_ref().get_ref().total,
        }
    }
}

impl Read for Decoder<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stored) => stored.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// The layer's blob, hashed and counted on its way.
struct Stored<'a> {
    slice: FileSlice,
    hasher: Option<Hasher>,
    total: u64,
    progress: &'a mut dyn Progress,
}

impl Read for Stored<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.slice.read(buffer)?;
        if let (Some(hasher), Some(bytes)) = (&mut self.hasher, buffer.get(..got)) {
            hasher.update(bytes);
        }
        self.total += got as u64;
        self.progress.advance(got as u64);
        Ok(got)
    }
}

/// Ends a hash and holds it against what it should be.
pub(super) fn matches_digest(what: &str, hasher: Hasher, expected: &Digest) -> Result<()> {
    let found = hasher.finish();
    if found == *expected {
        return Ok(());
    }
    Err(Error::Digest { what: what.to_owned(), expected: expected.to_string(), found: found.to_string() })
}

fn read(source: io::Error) -> Error {
    Error::Read { what: "the layer".to_owned(), source }
}
