//! Maps of sparse files in tar streams: the old GNU headers, and GNU's two uses of PAX headers.

use std::ops::Range;

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::error::{Error, Result};
use super::limits::{MAX_EXTENTS, MAX_PATH_BYTES};
use super::pax::parse_number;
use super::tarball::{RECORD, bad};

/// Which parts of a file are in the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) size: u64,
    pub(super) extents: Vec<Range<u64>>,
}

impl Map {
    fn new(size: u64) -> Self {
        Self { size, extents: Vec::new() }
    }

    /// Bytes of the file that are in the stream.
    pub(super) fn stored(&self) -> u64 {
        self.extents.iter().map(|extent| extent.end - extent.start).fold(0, u64::saturating_add)
    }

    fn push(&mut self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let previous = self.extents.last().map_or(0, |extent| extent.end);
        let end = end
            .filter(|_| offset >= previous)
            .ok_or_else(|| bad("the map of a sparse file is not in order"))?;
        if self.extents.len() == MAX_EXTENTS {
            return Err(Error::Limit { what: "pieces of a sparse file", limit: MAX_EXTENTS as u64 });
        }
        self.extents.push(offset..end);
        Ok(())
    }
}

/// The map of an old GNU sparse entry; `more` reads the records that continue its header.
pub(super) fn gnu_map(
    header: &Header,
    mut more: impl FnMut() -> Result<[u8; RECORD]>,
) -> Result<Option<Map>> {
    if header.entry_type() != EntryType::GNUSparse {
        return Ok(None);
    }
    let gnu = header.as_gnu().ok_or_else(|| bad("a sparse file without a GNU header"))?;
    let mut map = Map::new(gnu.real_size().map_err(|_| bad("a sparse file without a size"))?);
    push_all(&mut map, &gnu.sparse)?;
    let mut extended = gnu.is_extended();
    while extended {
        let mut next = GnuExtSparseHeader::new();
        next.as_mut_bytes().copy_from_slice(&more()?);
        push_all(&mut map, next.sparse())?;
        extended = next.is_extended();
        if next.sparse().iter().all(GnuSparseHeader::is_empty) && extended {
            return Err(bad("the map of a sparse file goes on without saying anything"));
        }
    }
    Ok(Some(map))
}

fn push_all(map: &mut Map, headers: &[GnuSparseHeader]) -> Result<()> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        let number = |number: std::io::Result<u64>| number.map_err(|_| bad("the map of a sparse file"));
        map.push(number(header.offset())?, number(header.length())?)?;
    }
    Ok(())
}

/// What PAX headers say about a sparse file.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    /// The file's name; the header then has a made-up one.
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    major: Option<u64>,
    /// The map of version 0.1.
    map: Option<Vec<u8>>,
}

impl PaxSparse {
    /// Takes in a keyword; those that are not about sparse files mean nothing to us.
    pub(super) fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let number = || parse_number(value).ok_or_else(|| bad("a number of a sparse file"));
        match key {
            b"GNU.sparse.name" if value.len() <= MAX_PATH_BYTES => self.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.size = Some(number()?),
            b"GNU.sparse.major" => self.major = Some(number()?),
            b"GNU.sparse.map" => self.map = Some(value.to_vec()),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                return Err(bad("a sparse file in the PAX format 0.0, which nobody writes any more"));
            }
            _ => {}
        }
        Ok(())
    }
}

/// The map of a PAX sparse entry: in its headers (0.1), or before its body (1.0), of which `record`
/// then reads the next 512 bytes.
pub(super) fn pax_map(
    pax: &PaxSparse,
    mut record: impl FnMut() -> Result<[u8; RECORD]>,
) -> Result<Option<Map>> {
    let size = || pax.size.ok_or_else(|| bad("a sparse file without a size"));
    if let Some(text) = &pax.map {
        let mut map = Map::new(size()?);
        let mut numbers = text.split(|byte| *byte == b',').map(parse_number);
        while let Some(offset) = numbers.next() {
            match (offset, numbers.next().flatten()) {
                (Some(offset), Some(len)) => map.push(offset, len)?,
                _ => return Err(bad("the map of a sparse file")),
            }
        }
        return Ok(Some(map));
    }
    if pax.major != Some(1) {
        return Ok(None);
    }
    let mut map = Map::new(size()?);
    let mut lines = Lines { text: Vec::new(), at: 0 };
    let count = lines.number(&mut record)?;
    for _ in 0..count {
        map.push(lines.number(&mut record)?, lines.number(&mut record)?)?;
    }
    Ok(Some(map))
}

/// Numbers, one a line, in 512-byte records.
struct Lines {
    text: Vec<u8>,
    at: usize,
}

impl Lines {
    fn number(&mut self, record: &mut impl FnMut() -> Result<[u8; RECORD]>) -> Result<u64> {
        // No 64-bit number has more digits than fit one more record.
        for _ in 0..2 {
            let rest = self.text.get(self.at..).unwrap_or_default();
            if let Some(len) = rest.iter().position(|byte| *byte == b'\n') {
                let number = parse_number(rest.get(..len).unwrap_or_default());
                self.at += len + 1;
                return number.ok_or_else(|| bad("the map of a sparse file"));
            }
            let mut text = rest.to_vec();
            text.extend_from_slice(&record()?);
            (self.text, self.at) = (text, 0);
        }
        Err(bad("the map of a sparse file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pax(pairs: &[(&str, &str)]) -> PaxSparse {
        let mut pax = PaxSparse::default();
        for (key, value) in pairs {
            pax.set(format!("GNU.sparse.{key}").as_bytes(), value.as_bytes()).unwrap();
        }
        pax
    }

    fn no_record() -> Result<[u8; RECORD]> {
        Err(bad("nothing more"))
    }

    #[test]
    fn a_map_in_the_headers_is_read() {
        let map = pax_map(&pax(&[("size", "100"), ("map", "0,10,50,5,100,0")]), no_record).unwrap().unwrap();
        assert_eq!(map, Map { size: 100, extents: vec![0..10, 50..55, 100..100] });
        assert_eq!(map.stored(), 15);
    }

    #[test]
    fn a_map_before_the_body_may_cross_records() {
        let mut text = "100\n".to_owned();
        for index in 0..100 {
            text += &format!("{}\n1\n", index * 1_000_000);
        }
        let mut records = text.as_bytes().chunks(RECORD).map(|chunk| {
            let mut record = [0; RECORD];
            record[..chunk.len()].copy_from_slice(chunk);
            Ok(record)
        });
        let pax = pax(&[("major", "1"), ("realsize", "1000000000")]);
        let map = pax_map(&pax, || records.next().unwrap()).unwrap().unwrap();
        assert_eq!(map.extents.len(), 100);
        assert_eq!(map.extents[99], 99_000_000..99_000_001);
    }

    #[test]
    fn maps_that_overlap_or_overflow_are_refused() {
        for text in ["0,10,5,1", "90,11", "1,18446744073709551615", "0", "a,b", "0,1,"] {
            assert!(pax_map(&pax(&[("size", "100"), ("map", text)]), no_record).is_err(), "{text}");
        }
    }

    #[test]
    fn a_map_without_an_end_is_refused() {
        let pax = pax(&[("major", "1"), ("realsize", "10")]);
        assert!(pax_map(&pax, || Ok([b'1'; RECORD])).is_err());
    }
}
