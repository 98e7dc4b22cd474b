//! The tar stream inside a layer's blob: decompressed, hashed and bounded by a thread of its own,
//! while the caller's thread makes files of what came before.

use std::io::{self, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use flate2::bufread::MultiGzDecoder;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result};
use super::layer::{Layer, matches_digest};
use super::limits::{MAX_RATIO, MAX_TOTAL_BYTES, RATIO_FREE_BYTES};
use super::packed::Packing;
use super::progress::Progress;
use super::slice::FileSlice;
use super::tarball::{self, Input};

/// Bytes decompressed and hashed at once.
pub(super) const BUFFER: usize = 256 << 10;
/// Buffers the decompressing thread may be ahead.
const AHEAD: usize = 4;
/// log2 of the largest window a zstd frame may ask memory for; zstd's own default.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Hands the tar stream of `layer` to `consume`. Whatever `consume` leaves is read as well, and
/// both digests of the layer are checked before this succeeds.
pub(super) fn unpack<T>(
    layer: &Layer,
    progress: &mut dyn Progress,
    consume: impl FnOnce(&mut Unpacked<'_>) -> Result<T>,
) -> Result<T> {
    let counter = &AtomicU64::new(0);
    thread::scope(|scope| {
        let (full, filled) = sync_channel(AHEAD);
        let (empty, emptied) = channel();
        let mut stream =
            Unpacked { filled, empty, buffer: Vec::new(), at: 0, read_bytes: counter, told: 0, progress };
        let worker = thread::Builder::new().name("unpack".to_owned());
        let worker = worker.spawn_scoped(scope, move || work(layer, counter, full, emptied)).map_err(read)?;
        let consumed = consume(&mut stream).and_then(|value| {
            while stream.fill().map_err(tarball::stream)? {}
            Ok(value)
        });
        // A worker that waits for room sees that nobody reads on.
        drop(stream);
        let worked = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        consumed.and_then(|value| worked.map(|()| value))
    })
}

/// The consuming end of the stream.
pub(super) struct Unpacked<'a> {
    filled: Receiver<io::Result<Vec<u8>>>,
    /// Buffers go back to be filled again.
    empty: Sender<Vec<u8>>,
    buffer: Vec<u8>,
    at: usize,
    /// Bytes of the blob read so far.
    read_bytes: &'a AtomicU64,
    /// Those of them that `progress` knows about.
    told: u64,
    progress: &'a mut dyn Progress,
}

impl Unpacked<'_> {
    /// Waits for the next piece; false at the end.
    fn fill(&mut self) -> io::Result<bool> {
        // The worker may have ended; then it needs no buffers.
        drop(self.empty.send(std::mem::take(&mut self.buffer)));
        self.at = 0;
        // A worker ends without a word only after all that it had is sent.
        let Ok(piece) = self.filled.recv() else { return Ok(false) };
        self.buffer = piece?;
        let read = self.read_bytes.load(Ordering::Relaxed);
        self.progress.advance(read.saturating_sub(self.told));
        self.told = read;
        Ok(true)
    }

    fn rest(&self) -> &[u8] {
        self.buffer.get(self.at..).unwrap_or_default()
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest().is_empty() && !self.fill()? {
            return Ok(0);
        }
        let got = self.rest().read(buffer)?;
        self.at += got;
        Ok(got)
    }
}

impl Input for &mut Unpacked<'_> {
    fn skip(&mut self, mut len: u64) -> io::Result<()> {
        while len > 0 {
            if self.rest().is_empty() && !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let step = usize::try_from(len).unwrap_or(usize::MAX).min(self.rest().len());
            self.at += step;
            len -= step as u64;
        }
        Ok(())
    }
}

/// The worker: pieces of the stream until its end, an error, or a consumer that is gone.
fn work(
    layer: &Layer,
    read_bytes: &AtomicU64,
    full: SyncSender<io::Result<Vec<u8>>>,
    emptied: Receiver<Vec<u8>>,
) -> Result<()> {
    let mut unpacking = Unpacking::open(layer, read_bytes)?;
    loop {
        let buffer = emptied.try_recv().unwrap_or_default();
        match unpacking.next(buffer) {
            Ok(piece) if piece.is_empty() => return unpacking.finish(layer),
            piece => {
                let failed = piece.is_err();
                // A consumer that is gone has an error of its own to report; else it has this one.
                if full.send(piece).is_err() || failed {
                    return Ok(());
                }
            }
        }
    }
}

/// A layer being decompressed, hashed and counted.
struct Unpacking<'a> {
    decoder: Decoder<'a>,
    hasher: Hasher,
    total: u64,
}

enum Decoder<'a> {
    Plain(Stored<'a>),
    Gzip(MultiGzDecoder<BufReader<Stored<'a>>>),
    Zstd(zstd::Decoder<'static, BufReader<Stored<'a>>>),
}

impl<'a> Unpacking<'a> {
    fn open(layer: &Layer, read_bytes: &'a AtomicU64) -> Result<Self> {
        let packing = Packing::of(&layer.blob).map_err(read)?;
        // The blob of a layer that is not packed is its tar stream: one hash is enough.
        let stored_digest = layer.digest.as_ref().filter(|digest| **digest != layer.diff_id);
        let hasher = stored_digest.map(Digest::hasher);
        let stored = Stored { slice: layer.blob.clone(), hasher, read_bytes };
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
        Ok(Self { decoder, hasher: layer.diff_id.hasher(), total: 0 })
    }

    /// The next piece of the stream, empty at its end.
    fn next(&mut self, mut buffer: Vec<u8>) -> io::Result<Vec<u8>> {
        buffer.resize(BUFFER, 0);
        let mut got = 0;
        while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.decoder.read(rest) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        buffer.truncate(got);
        self.hasher.update(&buffer);
        self.total = self.total.saturating_add(got as u64);
        self.check_bounds()?;
        Ok(buffer)
    }

    fn check_bounds(&self) -> io::Result<()> {
        let limit = |what, limit| Err(io::Error::other(Error::Limit { what, limit }));
        let stored = self.decoder.stored().read_bytes.load(Ordering::Relaxed);
        if self.total > MAX_TOTAL_BYTES {
            return limit("bytes of an unpacked layer", MAX_TOTAL_BYTES);
        }
        if self.total > RATIO_FREE_BYTES.saturating_add(stored.saturating_mul(MAX_RATIO)) {
            return limit("bytes unpacked from one byte of a layer", MAX_RATIO);
        }
        Ok(())
    }

    /// At the end of the stream: reads what follows it in the blob, and compares the digests.
    fn finish(self, layer: &Layer) -> Result<()> {
        matches_digest("the unpacked layer", self.hasher, &layer.diff_id)?;
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
}

impl<'a> Decoder<'a> {
    fn stored(&self) -> &Stored<'a> {
        match self {
            Self::Plain(stored) => stored,
            Self::Gzip(decoder) => decoder.get_ref().get_ref(),
            Self::Zstd(decoder) => decoder.get_ref().get_ref(),
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
    read_bytes: &'a AtomicU64,
}

impl Read for Stored<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.slice.read(buffer)?;
        if let (Some(hasher), Some(bytes)) = (&mut self.hasher, buffer.get(..got)) {
            hasher.update(bytes);
        }
        self.read_bytes.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}

fn read(source: io::Error) -> Error {
    Error::Read { what: "the layer".to_owned(), source }
}
