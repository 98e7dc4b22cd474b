//! What a driver may ask of a disk, and whether it lies on the disk (VIRTIO 1.2 §5.2.6).
//!
//! Everything here works on copies of what the driver wrote, and checks a request as a whole before any
//! of it is carried out.

use std::ops::Range;

use crate::chain::Cursor;
use crate::throttle::What;

/// Bytes of a sector: the unit of the interface, whatever the disk's block size (§5.2.4).
pub(crate) const SECTOR: u64 = 512;
/// Most sectors of one discard segment: 2 GiB.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most segments of one discard request.
pub(crate) const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Most sectors of a write-zeroes request: 32 MiB, because a file system may leave us to write them.
pub(crate) const MAX_ZEROES_SECTORS: u32 = 1 << 16;
/// Most segments of a write-zeroes request.
pub(crate) const MAX_ZEROES_SEGMENTS: u32 = 1;

/// Bytes of a request header (§5.2.6).
const HEADER: usize = 16;
/// Bytes of a discard or write-zeroes segment (§5.2.6).
const SEGMENT: u32 = 16;
/// The one flag a segment may carry: storage may be given back (write zeroes only).
const UNMAP: u32 = 1;

/// How a request ended, as its last byte says (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request's type. Those the device does not know are not here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    Identify,
    Discard,
    WriteZeroes,
}

impl Operation {
    /// As what it is metered.
    pub(crate) fn what(self) -> What {
        match self {
            Self::Read | Self::Identify => What::DiskRead,
            Self::Write | Self::Flush | Self::Discard | Self::WriteZeroes => What::DiskWrite,
        }
    }
}

/// A request's header, copied out of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) operation: Operation,
    /// First sector of a read or write; without meaning for the others.
    pub(crate) sector: u64,
}

impl Header {
    /// Copies the header out, however the driver split it over buffers.
    pub(crate) fn read(input: &mut Cursor<'_>) -> Result<Self, Status> {
        let mut bytes = [0; HEADER];
        input.read(&mut bytes).map_err(|_| Status::IoError)?;
        let (kind, _priority, sector) = fields(bytes);
        let operation = match kind {
            0 => Operation::Read,
            1 => Operation::Write,
            4 => Operation::Flush,
            8 => Operation::Identify,
            11 => Operation::Discard,
            13 => Operation::WriteZeroes,
            _ => return Err(Status::Unsupported),
        };
        Ok(Self { operation, sector })
    }
}

/// Where `len` bytes from `sector` lie, in bytes, if they are whole sectors of a disk of `capacity` bytes.
pub(crate) fn extent(sector: u64, len: u64, capacity: u64) -> Option<Range<u64>> {
    if len.checked_rem(SECTOR) != Some(0) {
        return None;
    }
    let start = sector.checked_mul(SECTOR)?;
    let end = start.checked_add(len)?;
    (end <= capacity).then_some(start..end)
}

/// One range to discard or to zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) bytes: Range<u64>,
    /// Storage may be given back.
    pub(crate) unmap: bool,
}

/// The ranges of one request: copied, then checked, all before the first is carried out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Segments {
    list: [Segment; MAX_DISCARD_SEGMENTS as usize],
    count: u32,
}

impl Segments {
    /// Copies out what is left of `input` as the segments of `operation` on a disk of `capacity` bytes.
    pub(crate) fn read(input: &mut Cursor<'_>, operation: Operation, capacity: u64) -> Result<Self, Status> {
        let (max_segments, max_sectors, flags_allowed) = match operation {
            Operation::Discard => (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS, 0),
            _ => (MAX_ZEROES_SEGMENTS, MAX_ZEROES_SECTORS, UNMAP),
        };
        let count = input.remaining().checked_div(SEGMENT).unwrap_or(0);
        if count == 0 || count > max_segments || input.remaining().checked_rem(SEGMENT) != Some(0) {
            return Err(Status::IoError);
        }
        let mut segments = Self { count, ..Self::default() };
        for (place, _) in segments.list.iter_mut().zip(0..count) {
            let mut bytes = [0; HEADER];
            input.read(&mut bytes).map_err(|_| Status::IoError)?;
            let (sectors, flags, sector) = segment_fields(bytes);
            if flags & !flags_allowed != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Status::IoError);
            }
            let len = u64::from(sectors).checked_mul(SECTOR).ok_or(Status::IoError)?;
            let bytes = extent(sector, len, capacity).ok_or(Status::IoError)?;
            *place = Segment { bytes, unmap: flags & UNMAP != 0 };
        }
        Ok(segments)
    }

    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        let lens = self.iter().map(|segment| segment.bytes.end.saturating_sub(segment.bytes.start));
        lens.fold(0, u64::saturating_add)
    }

    /// The segments in the driver's order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.list.iter().zip(0..self.count).map(|(segment, _)| segment)
    }
}

/// le32, le32, le64: the header.
fn fields(bytes: [u8; HEADER]) -> (u32, u32, u64) {
    let value = u128::from_le_bytes(bytes);
    (low32(value), low32(value >> 32), low64(value >> 64))
}

/// le64, le32, le32: a segment, as (sectors, flags, first sector).
fn segment_fields(bytes: [u8; HEADER]) -> (u32, u32, u64) {
    let value = u128::from_le_bytes(bytes);
    (low32(value >> 64), low32(value >> 96), low64(value))
}

fn low32(value: u128) -> u32 {
    u32::try_from(value & u128::from(u32::MAX)).unwrap_or(0)
}

fn low64(value: u128) -> u64 {
    u64::try_from(value & u128::from(u64::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers around every edge that sector arithmetic has.
    fn edges(capacity: u64) -> Vec<u64> {
        let near = |n: u64| [n.wrapping_sub(1), n, n.wrapping_add(1)];
        let sectors = capacity / SECTOR;
        [0, 511, 512, 1023, capacity, sectors, 1 << 32, 1 << 55, 1 << 63, u64::MAX / 512, u64::MAX]
            .into_iter()
            .flat_map(near)
            .collect()
    }

    #[test]
    fn p06_an_extent_is_accepted_exactly_when_it_is_whole_sectors_inside_the_disk() {
        let mut accepted = 0;
        for capacity in [0, 512, 1024, 1 << 20, 1 << 32, (1 << 54) * 512, u64::MAX / 512 * 512] {
            for sector in edges(capacity) {
                for len in edges(capacity) {
                    let end = u128::from(sector) * 512 + u128::from(len);
                    let right = len % 512 == 0 && end <= u128::from(capacity);
                    let got = extent(sector, len, capacity);
                    assert_eq!(got.is_some(), right, "sector {sector} len {len} capacity {capacity}");
                    if let Some(range) = got {
                        assert_eq!(u128::from(range.start), u128::from(sector) * 512);
                        assert_eq!(u128::from(range.end), end);
                        accepted += 1;
                    }
                }
            }
        }
        assert!(accepted > 100, "the edges reach both sides");
    }

    #[test]
    fn fields_are_little_endian_and_in_the_order_of_the_specification() {
        let mut bytes = [0; 16];
        bytes[0] = 1;
        bytes[4] = 2;
        bytes[8] = 3;
        assert_eq!(fields(bytes), (1, 2, 3));
        assert_eq!(segment_fields(bytes), (3, 0, 1 | 2 << 32));
        bytes[12] = 4;
        assert_eq!(segment_fields(bytes), (3, 4, 1 | 2 << 32));
    }
}
