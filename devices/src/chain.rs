//! A descriptor chain that has been checked as a whole before any device sees it (VIRTIO 1.2 §2.7).
//!
//! The walk reads each descriptor once, into host memory, and validates the copy: what the driver changes
//! afterwards is never looked at again. The buffers' *contents* stay shared, so a device copies a header
//! out before it decides by it.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;

use crate::error::ChainError;
use crate::memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, Memory,
    VolatileSlice,
};

/// Bytes of a descriptor (§2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;

/// One buffer: bytes that lie wholly inside one region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub address: GuestAddress,
    /// Bytes, never 0.
    pub len: u32,
}

/// Where and how to walk: a descriptor table and the rules that hold for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) address: GuestAddress,
    pub(crate) size: u16,
    pub(crate) indirect: bool,
    /// Where its ring stands once the chain is taken.
    pub(crate) position: u16,
}

/// Memory that walks use over and over, so that the steady state allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// One list of segments for each chain that is not under way.
    pub(crate) segments: Vec<Vec<Segment>>,
    /// Copy of an indirect table.
    table: Vec<u8>,
}

/// A request as the driver posted it: readable buffers first, then writable ones.
///
/// Give it back to the ring it came from; dropping it would leak a slot of the driver's ring.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
    memory: Arc<Memory>,
    /// Where its ring stood once it was taken.
    pub(crate) position: u16,
}

impl Chain {
    /// Walks and checks the chain at `head`, using `buffers` (kept across requests).
    pub(crate) fn walk(
        memory: &Arc<Memory>,
        table: Table,
        head: u16,
        buffers: &mut Buffers,
    ) -> Result<Self, ChainError> {
        let mut segments = buffers.segments.pop().unwrap_or_default();
        segments.clear();
        buffers.table.clear();
        let copied = &mut buffers.table;
        let mut walk =
            Walk { memory, copied, limit: table.size, total: 0, steps: 0, readable: None, region: (0, 0) };
        match walk.run(table, head, &mut segments) {
            Ok(()) => {
                let (readable, readable_bytes) = walk.readable.unwrap_or((segments.len(), walk.total));
                let writable_bytes = walk.total.saturating_sub(readable_bytes);
                let (memory, position) = (Arc::clone(memory), table.position);
                Ok(Self { head, segments, readable, readable_bytes, writable_bytes, memory, position })
            }
            Err(error) => {
                buffers.segments.push(segments);
                Err(error)
            }
        }
    }

    /// Index of the first descriptor: the chain's name on the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// A cursor over the buffers the device may read.
    pub fn reader(&self) -> Cursor<'_> {
        let segments = self.segments.get(..self.readable).unwrap_or_default();
        Cursor::new(&self.memory, segments, self.readable_bytes)
    }

    /// A cursor over the buffers the device may write.
    pub fn writer(&self) -> Cursor<'_> {
        let segments = self.segments.get(self.readable..).unwrap_or_default();
        Cursor::new(&self.memory, segments, self.writable_bytes)
    }

    /// Gives the segment buffer back for reuse.
    pub(crate) fn into_segments(self) -> Vec<Segment> {
        self.segments
    }
}

struct Walk<'a> {
    memory: &'a Memory,
    /// The indirect table, once there is one: a copy, so that each entry is read once and all at once.
    copied: &'a mut Vec<u8>,
    /// Most descriptors of the whole chain: the queue's size.
    limit: u16,
    total: u32,
    steps: u16,
    /// Count of readable segments and their bytes, fixed by the first writable descriptor.
    readable: Option<(usize, u32)>,
    /// Bounds of the region the last buffer was in: the next one mostly is too.
    region: (u64, u64),
}

impl Walk<'_> {
    fn run(&mut self, table: Table, head: u16, segments: &mut Vec<Segment>) -> Result<(), ChainError> {
        let mut table = table;
        let mut index = head;
        loop {
            let descriptor = self.fetch(table, index)?;
            if descriptor.refers_to_indirect_table() {
                // Zero or more normal descriptors, then one table; nothing after it (§2.7.5.3).
                if !table.indirect || descriptor.has_next() {
                    return Err(ChainError::Indirect);
                }
                table = self.indirect_table(descriptor)?;
                index = 0;
                continue;
            }
            self.step()?;
            self.take(descriptor, segments)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn fetch(&self, table: Table, index: u16) -> Result<Descriptor, ChainError> {
        if index >= table.size {
            return Err(ChainError::Index(index));
        }
        if !self.copied.is_empty() {
            return self.copied_entry(index);
        }
        let bad = ChainError::Address { address: table.address.raw_value(), len: DESCRIPTOR_SIZE };
        let offset = u64::from(index).checked_mul(DESCRIPTOR_SIZE.into()).ok_or(bad)?;
        let address = table.address.checked_add(offset).ok_or(bad)?;
        self.memory.read_obj(address).map_err(|_| bad)
    }

    /// An entry of the indirect table, which was copied as a whole.
    fn copied_entry(&self, index: u16) -> Result<Descriptor, ChainError> {
        let wrong = ChainError::Index(index);
        let start = usize::from(index).checked_mul(16).ok_or(wrong)?;
        let bytes: [u8; 16] =
            self.copied.get(start..).and_then(|rest| rest.first_chunk()).copied().ok_or(wrong)?;
        let mut descriptor = Descriptor::default();
        descriptor.as_mut_slice().copy_from_slice(&bytes);
        Ok(descriptor)
    }

    fn indirect_table(&mut self, descriptor: Descriptor) -> Result<Table, ChainError> {
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 || len.checked_rem(DESCRIPTOR_SIZE) != Some(0) {
            return Err(ChainError::Indirect);
        }
        let entries = len.checked_div(DESCRIPTOR_SIZE).unwrap_or(0);
        let size = u16::try_from(entries).map_err(|_| ChainError::TooLong)?;
        if size > self.limit {
            return Err(ChainError::TooLong);
        }
        self.inside(address, len)?;
        // At most a queue's worth of descriptors, in one go.
        self.copied.resize(usize::try_from(len).map_err(|_| ChainError::TooLong)?, 0);
        let bad = ChainError::Address { address: address.raw_value(), len };
        self.memory.read_slice(self.copied, address).map_err(|_| bad)?;
        // A table inside a table is refused: `indirect` is off in there (§2.7.5.3.1).
        Ok(Table { address, size, indirect: false, position: 0 })
    }

    fn step(&mut self) -> Result<(), ChainError> {
        if self.steps >= self.limit {
            return Err(ChainError::TooLong);
        }
        self.steps = self.steps.saturating_add(1);
        Ok(())
    }

    fn take(&mut self, descriptor: Descriptor, segments: &mut Vec<Segment>) -> Result<(), ChainError> {
        let len = descriptor.len();
        if descriptor.is_write_only() {
            self.readable.get_or_insert((segments.len(), self.total));
        } else if self.readable.is_some() {
            return Err(ChainError::Order);
        }
        if len == 0 {
            return Ok(()); // says nothing, harms nothing; it still counted as a step
        }
        self.total = self.total.checked_add(len).ok_or(ChainError::TooLarge)?;
        self.inside(descriptor.addr(), len)?;
        segments.push(Segment { address: descriptor.addr(), len });
        Ok(())
    }

    /// The range must lie in one region: regions are what can be mapped, and a hole lies between them.
    fn inside(&mut self, address: GuestAddress, len: u32) -> Result<(), ChainError> {
        let bad = ChainError::Address { address: address.raw_value(), len };
        let end = address.raw_value().checked_add(len.into()).ok_or(bad)?;
        if address.raw_value() < self.region.0 || address.raw_value() >= self.region.1 {
            let region = self.memory.find_region(address).ok_or(bad)?;
            let start = region.start_addr().raw_value();
            self.region = (start, start.checked_add(region.len()).ok_or(bad)?);
        }
        if end > self.region.1 { Err(bad) } else { Ok(()) }
    }
}

/// Moves through a chain's readable or writable buffers as one run of bytes, whatever their layout.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    memory: &'a Memory,
    segments: &'a [Segment],
    /// Bytes of the first segment already passed.
    offset: u32,
    /// Bytes from here to the end.
    remaining: u32,
    /// Bytes passed so far.
    passed: u32,
}

impl<'a> Cursor<'a> {
    /// `remaining` is the sum of the segments' lengths.
    fn new(memory: &'a Memory, segments: &'a [Segment], remaining: u32) -> Self {
        Self { memory, segments, offset: 0, remaining, passed: 0 }
    }

    /// Bytes from here to the end.
    pub fn remaining(&self) -> u32 {
        self.remaining
    }

    /// Bytes passed since the beginning.
    pub fn passed(&self) -> u32 {
        self.passed
    }

    /// The buffers from here on, as host memory, up to `max` bytes. For scatter-gather I/O; follow with
    /// [`Cursor::skip`] of what was done.
    pub fn slices(&self, max: u32) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        let (memory, mut offset, mut left) = (self.memory, self.offset, max.min(self.remaining));
        // The region of the last buffer: the next one mostly lies there too.
        let mut region: Option<&GuestRegionMmap> = None;
        self.segments.iter().map_while(move |segment| {
            let len = segment.len.saturating_sub(offset).min(left);
            let at = segment.address.checked_add(offset.into())?;
            offset = 0;
            left = left.saturating_sub(len);
            if len == 0 {
                return None;
            }
            let here = match region.and_then(|last| last.to_region_addr(at).map(|place| (last, place))) {
                Some(here) => here,
                None => memory.to_region_addr(at)?,
            };
            region = Some(here.0);
            here.0.get_slice(here.1, usize::try_from(len).ok()?).ok()
        })
    }

    /// Passes over `n` bytes.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there are fewer; the cursor does not move then.
    pub fn skip(&mut self, n: u32) -> Result<(), ChainError> {
        self.remaining = self.remaining.checked_sub(n).ok_or(ChainError::Short)?;
        self.passed = self.passed.saturating_add(n);
        let mut n = n;
        while let Some((first, rest)) = self.segments.split_first() {
            let left = first.len.saturating_sub(self.offset);
            if n < left {
                self.offset = self.offset.saturating_add(n);
                break;
            }
            n = n.saturating_sub(left);
            self.segments = rest;
            self.offset = 0;
        }
        Ok(())
    }

    /// The next `n` bytes as a cursor of their own; this one moves past them.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there are fewer; nothing moves then.
    pub fn split_to(&mut self, n: u32) -> Result<Cursor<'a>, ChainError> {
        let mut front = self.clone();
        self.skip(n)?;
        front.remaining = n;
        front.passed = 0;
        Ok(front)
    }

    /// Copies the next bytes out, all of `data` or nothing.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there are fewer.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), ChainError> {
        let n = u32::try_from(data.len()).map_err(|_| ChainError::Short)?;
        let front = self.split_to(n)?;
        let mut rest = data;
        for slice in front.slices(n) {
            let (part, after) = rest.split_at_mut_checked(slice.len()).ok_or(ChainError::Short)?;
            slice.copy_to(part);
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(ChainError::Short) }
    }

    /// Copies a plain little-endian structure out, once: decide by this copy only.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there are fewer bytes than it has.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, ChainError> {
        let mut value = T::default();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }

    /// Copies `data` in, all of it or nothing.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there is less room.
    pub fn write(&mut self, data: &[u8]) -> Result<(), ChainError> {
        let n = u32::try_from(data.len()).map_err(|_| ChainError::Short)?;
        let front = self.split_to(n)?;
        let mut rest = data;
        for slice in front.slices(n) {
            let (part, after) = rest.split_at_checked(slice.len()).ok_or(ChainError::Short)?;
            slice.copy_from(part);
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(ChainError::Short) }
    }

    /// Copies a plain structure in.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there is less room.
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> Result<(), ChainError> {
        self.write(value.as_slice())
    }
}
