//! A descriptor chain that has been checked as a whole before any device sees it (VIRTIO 1.2 §2.7).
//!
//! The walk reads each descriptor once, as a whole, and validates what it read: what the driver changes
//! afterwards is never looked at again. The buffers' *contents* stay shared, so a device copies a header
//! out before it decides by it.

mod cursor;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;

use crate::error::ChainError;
use crate::memory::{Address, GuestAddress, GuestMemoryBackend, Memory, VolatileMemory, VolatileSlice};
use crate::sys::segment::Segment;

pub use cursor::Cursor;
use cursor::Mapped;

/// Bytes of a descriptor (§2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;
const ENTRY: usize = DESCRIPTOR_SIZE as usize;

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
    // Apart from its caller, which has use for all registers itself: a third fewer instructions.
    #[inline(never)]
    pub(crate) fn walk(
        memory: &Arc<Memory>,
        table: Table,
        head: u16,
        buffers: &mut Buffers,
    ) -> Result<Self, ChainError> {
        let mut segments = buffers.segments.pop().unwrap_or_default();
        segments.clear();
        let mut walk = Walk { memory, segments, left: table.size, total: 0, readable: None, region: None };
        match walk.run(table, head) {
            Ok(()) => {
                let Walk { segments, total, readable, .. } = walk;
                let (readable, readable_bytes) = readable.unwrap_or((segments.len(), total));
                let writable_bytes = total.saturating_sub(readable_bytes);
                let (memory, position) = (Arc::clone(memory), table.position);
                Ok(Self { head, segments, readable, readable_bytes, writable_bytes, memory, position })
            }
            Err(error) => {
                buffers.segments.push(walk.segments);
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
    /// What the walk has found.
    segments: Vec<Segment>,
    /// Descriptors that may still come: a chain has at most as many as its queue, which also ends every loop.
    left: u16,
    total: u32,
    /// Count of readable segments and their bytes, fixed by the first writable descriptor.
    readable: Option<(usize, u32)>,
    /// The region the last buffer was in: the next one mostly is too.
    region: Option<Mapped<'a>>,
}

impl Walk<'_> {
    fn run(&mut self, table: Table, head: u16) -> Result<(), ChainError> {
        let mut entries = table_at(self.memory, table.address, table.size.into())?;
        let (mut index, mut may_be_table) = (head, table.indirect);
        loop {
            // Each descriptor is read once, as a whole, and what is read is what is checked.
            let Ok(entry) = entries.get_ref::<Descriptor>(usize::from(index).saturating_mul(ENTRY)) else {
                return Err(ChainError::Index(index));
            };
            let descriptor = entry.load();
            if descriptor.refers_to_indirect_table() {
                // Zero or more normal descriptors, then one table (§2.7.5.3); nothing after it, and none inside it.
                if !std::mem::take(&mut may_be_table) || descriptor.has_next() {
                    return Err(ChainError::Indirect);
                }
                entries = indirect_table(self.memory, descriptor, table.size)?;
                index = 0;
                continue;
            }
            self.left = self.left.checked_sub(1).ok_or(ChainError::TooLong)?;
            let (address, len) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                self.readable.get_or_insert((self.segments.len(), self.total));
            } else if self.readable.is_some() {
                return Err(ChainError::Order);
            }
            if len > 0 {
                self.total = self.total.checked_add(len).ok_or(ChainError::TooLarge)?;
                let mut slice = self.region.as_ref().and_then(|region| region.slice(address, len));
                if slice.is_none() {
                    // Regions are what can be mapped, and a hole lies between them: the buffer must lie in one.
                    self.region = Mapped::around(self.memory, address);
                    slice = self.region.as_ref().and_then(|region| region.slice(address, len));
                }
                let bad = ChainError::Address { address: address.raw_value(), len };
                self.segments.push(Segment::new(&slice.ok_or(bad)?));
            }
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }
}

/// The table an indirect descriptor of a queue of `size` entries refers to.
fn indirect_table(
    memory: &Memory,
    descriptor: Descriptor,
    size: u16,
) -> Result<VolatileSlice<'_>, ChainError> {
    let len = descriptor.len();
    if len == 0 || len.checked_rem(DESCRIPTOR_SIZE) != Some(0) {
        return Err(ChainError::Indirect);
    }
    let entries = len.checked_div(DESCRIPTOR_SIZE).unwrap_or(0);
    if entries > size.into() {
        return Err(ChainError::TooLong);
    }
    table_at(memory, descriptor.addr(), entries)
}

/// A descriptor table where it lies.
fn table_at(memory: &Memory, address: GuestAddress, entries: u32) -> Result<VolatileSlice<'_>, ChainError> {
    let len = entries.saturating_mul(DESCRIPTOR_SIZE);
    let bad = ChainError::Address { address: address.raw_value(), len };
    memory.get_slice(address, usize::try_from(len).map_err(|_| bad)?).map_err(|_| bad)
}
