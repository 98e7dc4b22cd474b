//! Archives that were compressed as a whole, as in `docker save x | gzip`.

use std::io::{self, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::error::{Error, Result};
use super::limits::{MAX_RATIO, MAX_TOTAL_BYTES, RATIO_FREE_BYTES};
use super::slice::FileSlice;

/// What the first bytes of a file say about its compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    /// Looks at the magic number, which is surer than a media type or a file's name.
    pub(super) fn of(slice: &FileSlice) -> io::Result<Self> {
        let mut magic = Vec::new();
        slice.clone().take(4).read_to_end(&mut magic)?;
        Ok(match magic.as_slice() {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            _ => Self::None,
        })
    }
}

/// Where large temporary files belong; the usual place may be memory.
const LARGE_TEMPORARIES: &str = "/var/tmp";

/// The archive itself; a compressed one is unpacked to a file without a name, since members are
/// read in any order.
pub(super) fn unpack(slice: FileSlice, path: &Path) -> Result<FileSlice> {
    let read = |source| Error::Read { what: path.display().to_string(), source };
    let limit = RATIO_FREE_BYTES.saturating_add(slice.len().saturating_mul(MAX_RATIO)).min(MAX_TOTAL_BYTES);
    let mut unpacked: Box<dyn Read> = match Packing::of(&slice).map_err(read)? {
        Packing::None => return Ok(slice),
        Packing::Gzip => Box::new(MultiGzDecoder::new(BufReader::new(slice))),
        Packing::Zstd => Box::new(zstd::Decoder::new(slice).map_err(read)?),
    };
    let mut file = tempfile::tempfile_in(LARGE_TEMPORARIES)
        .map_err(|source| Error::Write { path: LARGE_TEMPORARIES.into(), source })?;
    let copied = io::copy(&mut unpacked.by_ref().take(limit + 1), &mut file).map_err(read)?;
    if copied > limit {
        return Err(Error::Limit { what: "bytes of an unpacked archive", limit });
    }
    FileSlice::new(file).map_err(read)
}
