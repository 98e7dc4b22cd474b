//! A sparse file as a stream of what is in it: whoever copies or hashes the stream knows nothing of holes.
//!
//! ```text
//! "mvmpack1", the file's length                 8 bytes each, numbers little-endian
//! offset, length of a part, the part's bytes    8 bytes, 8 bytes, at most 1 MiB; again and again to the stream's end
//! ```
//!
//! Parts are in order and do not overlap; what is in none of them is zero.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use sha2::{Digest, Sha256};

use crate::hex::hex;

const MAGIC: [u8; 8] = *b"mvmpack1";
/// Longest part, in bytes.
const PART: usize = 1 << 20;
/// What is left out if it is zero, in bytes.
const BLOCK: usize = 4096;
/// Shortest part, in bytes, but for a file's last: no file system has smaller blocks.
const MIN_PART: u64 = 512;

/// A stream that is digested on its way.
pub(super) struct Digested<S> {
    stream: S,
    digest: Sha256,
}

impl<S> Digested<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, digest: Sha256::new() }
    }

    /// The stream, and the SHA-256 of what went through, in hex.
    pub(super) fn finish(self) -> (S, String) {
        (self.stream, hex(&self.digest.finalize()))
    }
}

impl<W: Write> Write for Digested<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.stream.write(bytes)?;
        self.digest.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<R: Read> Read for Digested<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(bytes)?;
        self.digest.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Writes what is in `file` to `stream`; the file's length in bytes.
pub(super) fn pack(file: &File, stream: &mut impl Write) -> io::Result<u64> {
    let length = file.metadata()?.len();
    stream.write_all(&MAGIC)?;
    stream.write_all(&length.to_le_bytes())?;
    let mut buffer = vec![0; PART];
    let mut end = 0;
    while let Some(start) = data_from(file, end)? {
        end = lseek(file, start, Whence::SeekHole)?;
        let (mut at, end) = (start.cast_unsigned(), end.cast_unsigned());
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(PART).min(PART);
            let chunk = buffer.get_mut(..count).unwrap_or_default();
            file.read_exact_at(chunk, at)?;
            pack_chunk(chunk, at, stream)?;
            at += count as u64;
        }
    }
    Ok(length)
}

/// Where data begins at or behind `at`.
fn data_from(file: &File, at: i64) -> io::Result<Option<i64>> {
    match lseek(file, at, Whence::SeekData) {
        Ok(start) => Ok(Some(start)),
        // None from there on.
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Writes the blocks of `chunk` that are not zero, neighbours as one part. It lies at `at` in its file.
fn pack_chunk(chunk: &[u8], at: u64, stream: &mut impl Write) -> io::Result<()> {
    let mut rest = (at, chunk);
    while !rest.1.is_empty() {
        let (offset, bytes) = rest;
        let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let first = bytes.chunks(BLOCK).next().is_some_and(zero);
        let alike = bytes.chunks(BLOCK).take_while(|block| zero(block) == first);
        let (run, left) = bytes.split_at(alike.map(<[u8]>::len).sum());
        if !first {
            stream.write_all(&offset.to_le_bytes())?;
            stream.write_all(&(run.len() as u64).to_le_bytes())?;
            stream.write_all(run)?;
        }
        rest = (offset + run.len() as u64, left);
    }
    Ok(())
}

/// Makes of `file`, which is empty, what was packed into `stream`: a file of `length` bytes.
///
/// # Errors
/// The stream is none of ours, of a file of another length, or of none that can be; or the host's reason.
pub(super) fn unpack(stream: &mut impl Read, file: &File, length: u64) -> io::Result<()> {
    let wrong = |what: &str| io::Error::new(ErrorKind::InvalidData, format!("it makes no sense: {what}"));
    let mut magic = [0; 8];
    stream.read_exact(&mut magic)?;
    if magic != MAGIC || number(stream)? != Some(length) {
        return Err(wrong("what is packed is another file"));
    }
    file.set_len(length)?;
    let mut buffer = vec![0; PART];
    let mut end = 0;
    while let Some(offset) = number(stream)? {
        let count = number(stream)?.ok_or(ErrorKind::UnexpectedEof)?;
        let part = usize::try_from(count).ok().and_then(|count| buffer.get_mut(..count));
        let part =
            part.filter(|part| !part.is_empty()).ok_or_else(|| wrong("a part of impossible length"))?;
        let behind = offset.checked_add(count).filter(|behind| offset >= end && *behind <= length);
        end = behind.ok_or_else(|| wrong("a part in an impossible place"))?;
        if count < MIN_PART && end < length {
            return Err(wrong("a part smaller than there are"));
        }
        stream.read_exact(part)?;
        write_data(file, part, offset)?;
    }
    Ok(())
}

/// Writes what is not zero of `part` at `offset` of a file that is empty there: whoever packed zeroes gets none of the
/// host's disk for them.
fn write_data(file: &File, part: &[u8], offset: u64) -> io::Result<()> {
    let zero = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
    if !part.chunks(BLOCK).any(|block| zero(&block)) {
        return file.write_all_at(part, offset);
    }
    let places = (offset..).step_by(BLOCK);
    let mut blocks = places.zip(part.chunks(BLOCK)).filter(|(_, block)| !zero(block));
    blocks.try_for_each(|(place, block)| file.write_all_at(block, place))
}

/// The next number; `None` at the stream's end.
fn number(stream: &mut impl Read) -> io::Result<Option<u64>> {
    let mut bytes = Vec::with_capacity(8);
    stream.take(8).read_to_end(&mut bytes)?;
    match <[u8; 8]>::try_from(bytes) {
        Ok(bytes) => Ok(Some(u64::from_le_bytes(bytes))),
        Err(bytes) if bytes.is_empty() => Ok(None),
        Err(_) => Err(ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(length: u64, parts: &[(u64, u64, &[u8])]) -> Vec<u8> {
        let mut stream = [MAGIC, length.to_le_bytes()].concat();
        for (offset, count, bytes) in parts {
            stream.extend([offset.to_le_bytes(), count.to_le_bytes()].concat());
            stream.extend_from_slice(bytes);
        }
        stream
    }

    fn unpacked(mut stream: &[u8], length: u64) -> io::Result<Vec<u8>> {
        let mut file = tempfile::tempfile()?;
        unpack(&mut stream, &file, length)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn what_is_packed_is_unpacked_with_its_holes_and_zeroes_take_no_room() {
        let [from, to] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let length = (64 << 20) + 7;
        from.set_len(length).unwrap();
        // Zeroes that were written, more at once than a part has, and an end that is no whole block.
        from.write_all_at(&[0; 1 << 16], 4 << 20).unwrap();
        from.write_all_at(&vec![1; PART + BLOCK], BLOCK as u64).unwrap();
        from.write_all_at(b"last", length - 4).unwrap();
        let mut packed = Vec::new();
        assert_eq!(pack(&from, &mut packed).unwrap(), length);
        assert_eq!(packed.len(), 16 + 3 * 16 + PART + BLOCK + 7);
        unpack(&mut packed.as_slice(), &to, length).unwrap();
        let bytes = [&from, &to].map(|file| {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(file.metadata().unwrap().len(), length);
            bytes
        });
        assert!(bytes[0] == bytes[1]);
        use std::os::unix::fs::MetadataExt;
        assert!(to.metadata().unwrap().blocks() * 512 < 2 << 20);
    }

    #[test]
    fn a_stream_that_leads_elsewhere_overlaps_or_breaks_off_is_an_error() {
        let good = stream(600, &[(0, 512, &[b'a'; 512]), (598, 2, b"yz")]);
        assert_eq!(unpacked(&good, 600).unwrap(), [&[b'a'; 512][..], &[0; 86], b"yz"].concat());
        let small = stream(600, &[(0, 511, &[b'a'; 511]), (598, 2, b"yz")]);
        assert!(unpacked(&small, 600).unwrap_err().to_string().contains("smaller than there are"));
        let nonsense = [
            stream(9, &[]),
            stream(8, &[(7, 2, b"ab")]),
            stream(8, &[(u64::MAX, 2, b"ab")]),
            stream(8, &[(0, 8, b"abcdefgh"), (7, 1, b"i")]),
            stream(8, &[(0, 0, b"")]),
            stream(8, &[(0, u64::MAX, b"ab")]),
            stream(8, &[(0, 4, b"ab")]),
            stream(8, &[])[..12].to_vec(),
            [stream(8, &[]), vec![1; 3]].concat(),
            b"tarfile.".repeat(2),
        ];
        for bad in nonsense {
            assert!(unpacked(&bad, 8).is_err(), "{bad:?}");
        }
        let long = stream(8 << 20, &[(0, (PART + 1) as u64, &vec![1; PART + 1])]);
        assert!(unpacked(&long, 8 << 20).is_err(), "a part is longer than any");
    }

    #[test]
    fn zeroes_that_somebody_packed_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        let mut part = vec![0; PART];
        part[PART - 1] = 7;
        let packed = stream(2 << 20, &[(0, PART as u64, &vec![0; PART]), (PART as u64, PART as u64, &part)]);
        unpack(&mut packed.as_slice(), &file, 2 << 20).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
        let mut last = [0; 2];
        file.read_exact_at(&mut last, (2 << 20) - 2).unwrap();
        assert_eq!(last, [0, 7]);
    }
}
