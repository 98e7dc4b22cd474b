//! What a driver reads about a disk.

use super::request::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS};
use super::{SEG_MAX, SIZE_MAX};

/// The configuration space (§5.2.4), up to `unused1`.
pub(super) fn config_bytes(sectors: u64, queues: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(60);
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(SIZE_MAX.to_le_bytes());
    bytes.extend(SEG_MAX.to_le_bytes());
    bytes.extend([0; 4]); // geometry, not offered
    bytes.extend(512u32.to_le_bytes()); // blk_size
    bytes.extend([3, 0]); // physical blocks of 2^3 logical ones, the first one aligned
    bytes.extend(8u16.to_le_bytes()); // min_io_size, in logical blocks
    bytes.extend(0u32.to_le_bytes()); // opt_io_size
    bytes.extend([0, 0]); // writeback, not offered; unused0
    bytes.extend(queues.to_le_bytes());
    bytes.extend(MAX_DISCARD_SECTORS.to_le_bytes());
    bytes.extend(MAX_DISCARD_SEGMENTS.to_le_bytes());
    bytes.extend(8u32.to_le_bytes()); // discard_sector_alignment
    bytes.extend(MAX_ZEROES_SECTORS.to_le_bytes());
    bytes.extend(MAX_ZEROES_SEGMENTS.to_le_bytes());
    bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap, unused1
    bytes
}
