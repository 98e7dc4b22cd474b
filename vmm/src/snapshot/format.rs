//! The file a machine's state is kept in: a header, then one value in `postcard`.
//!
//! ```text
//! 0   8  "mvm-snap"
//! 8   4  format, little endian
//! 12  4  CRC-32 of everything else
//! 16  8  bytes that follow, little endian
//! 24  …  the value
//! ```
//!
//! The file may come from anywhere: nothing of it is believed before it is bounded, and its checksum only says that
//! it was not damaged by accident.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Error;

/// The format that is written, and the only one that is read. It changes with everything that is saved.
const FORMAT: u32 = 3;
const MAGIC: [u8; 8] = *b"mvm-snap";
const HEADER: usize = 24;
/// Most bytes of a state: several times what 32 CPUs and 31 devices need.
pub(super) const MAX_BYTES: u64 = 2 << 20;

/// Replaces what is in `file` by `value`. Returns how many bytes it has.
pub(super) fn write(file: &File, value: &impl Serialize) -> Result<u64, Error> {
    let bytes = encode(value)?;
    let mut to = file;
    file.set_len(0)
        .and_then(|()| io::Seek::rewind(&mut to))
        .and_then(|_| to.write_all(&bytes))
        .map_err(|source| Error::File { operation: "write the state", source })?;
    Ok(bytes.len() as u64)
}

/// The value in `file`.
pub(super) fn read<T: DeserializeOwned>(file: &File) -> Result<T, Error> {
    let failed = |source| Error::File { operation: "read the state", source };
    let length = file.metadata().map_err(failed)?.len();
    if length > MAX_BYTES {
        return Err(Error::Damaged("it is longer than any state"));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    decode(&bytes)
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    let bytes = postcard::to_extend(value, vec![0; HEADER]).map_err(Error::Encode)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::TooLarge(bytes.len()));
    }
    Ok(seal(bytes))
}

/// Fills in the header of a value, for which `bytes` has room at its beginning.
pub(super) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let length = bytes.len().saturating_sub(HEADER) as u64;
    let header = [&MAGIC[..], &FORMAT.to_le_bytes(), &[0; 4], &length.to_le_bytes()].concat();
    bytes.iter_mut().zip(header).for_each(|(byte, value)| *byte = value);
    let sum = checksum(&bytes).to_le_bytes();
    bytes.iter_mut().skip(12).zip(sum).for_each(|(byte, value)| *byte = value);
    bytes
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let (header, body) = bytes.split_first_chunk::<HEADER>().ok_or(Error::NotASnapshot)?;
    let [magic @ .., v0, v1, v2, v3, c0, c1, c2, c3, l0, l1, l2, l3, l4, l5, l6, l7] = *header;
    if magic != MAGIC {
        return Err(Error::NotASnapshot);
    }
    let found = u32::from_le_bytes([v0, v1, v2, v3]);
    if found != FORMAT {
        return Err(Error::Format { found, known: FORMAT });
    }
    if u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]) != body.len() as u64 {
        return Err(Error::Damaged("it does not have the length it claims"));
    }
    if u32::from_le_bytes([c0, c1, c2, c3]) != checksum(bytes) {
        return Err(Error::Damaged("its checksum is another"));
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(Error::Damaged("it goes on after its end")),
        Err(error) => Err(Error::Decode(error)),
    }
}

/// CRC-32 of all but the checksum's own place.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes.get(..12).unwrap_or_default());
    hasher.update(bytes.get(16..).unwrap_or_default());
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Value = (String, Vec<u64>, Option<u8>);

    fn value() -> Value {
        ("a machine".to_owned(), (0..100).collect(), Some(7))
    }

    #[test]
    fn what_is_written_is_read_and_replaces_what_was_there() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 10_000], 0).unwrap();
        let written = write(&file, &value()).unwrap();
        assert_eq!(file.metadata().unwrap().len(), written);
        assert_eq!(read::<Value>(&file).unwrap(), value());
    }

    #[test]
    fn every_changed_byte_is_an_error() {
        let bytes = encode(&value()).unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                decode::<Value>(&changed).unwrap_err();
            }
        }
    }

    #[test]
    fn every_truncation_and_every_addition_is_an_error() {
        let bytes = encode(&value()).unwrap();
        for length in 0..bytes.len() {
            decode::<Value>(&bytes[..length]).unwrap_err();
        }
        decode::<Value>(&[&bytes[..], &[0]].concat()).unwrap_err();
    }

    #[test]
    fn another_format_is_named_before_anything_else_is_looked_at() {
        let mut bytes = encode(&value()).unwrap();
        bytes[8] = 9;
        let error = decode::<Value>(&bytes).unwrap_err();
        assert!(matches!(error, Error::Format { found: 9, known: FORMAT }), "{error}");
    }

    #[test]
    fn a_file_of_any_length_is_not_read_into_memory() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        assert!(matches!(read::<Value>(&file), Err(Error::Damaged(_))));
    }

    proptest! {
        #[test]
        fn no_body_with_a_right_checksum_is_more_than_an_error(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = encode(&()).unwrap();
            bytes.extend(&body);
            bytes[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
            let sum = checksum(&bytes).to_le_bytes();
            bytes[12..16].copy_from_slice(&sum);
            let _ = decode::<super::super::MachineState>(&bytes);
        }
    }
}
