//! Moves through the buffers of a checked chain.

#[cfg(test)]
mod tests;

use crate::error::ChainError;
use crate::memory::{
    Address, ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, Memory, Region, VolatileSlice,
};
use crate::sys::segment::Segment;

/// A region of guest memory: where the guest sees it, and where it is mapped.
pub(super) struct Mapped<'a> {
    start: u64,
    bytes: VolatileSlice<'a>,
}

impl<'a> Mapped<'a> {
    fn new(region: &'a Region) -> Option<Self> {
        Some(Self { start: region.start_addr().raw_value(), bytes: region.as_volatile_slice().ok()? })
    }

    /// The region that the guest's `address` lies in.
    #[cold]
    pub(super) fn around(memory: &'a Memory, address: GuestAddress) -> Option<Self> {
        memory.find_region(address).and_then(Self::new)
    }

    /// `len` bytes from the guest's `address`, if they lie in this region.
    pub(super) fn slice(&self, address: GuestAddress, len: u32) -> Option<VolatileSlice<'a>> {
        let offset = address.raw_value().checked_sub(self.start)?;
        self.bytes.subslice(usize::try_from(offset).ok()?, usize::try_from(len).ok()?).ok()
    }

    /// `len` bytes from this process's `address`, if they lie in this region.
    fn slice_here(&self, address: usize, len: u32) -> Option<VolatileSlice<'a>> {
        let offset = address.checked_sub(self.bytes.ptr_guard().as_ptr().addr())?;
        self.bytes.subslice(offset, usize::try_from(len).ok()?).ok()
    }
}

/// Moves through a chain's readable or writable buffers as one run of bytes, whatever their layout.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    memory: &'a Memory,
    segments: &'a [Segment],
    /// Bytes of the first segment already passed.
    offset: u32,
    /// Bytes of the last segment beyond the end.
    beyond: u32,
    /// Bytes from here to the end.
    remaining: u32,
    /// Bytes passed so far.
    passed: u32,
}

impl<'a> Cursor<'a> {
    /// `remaining` is the sum of the segments' lengths.
    pub(super) fn new(memory: &'a Memory, segments: &'a [Segment], remaining: u32) -> Self {
        Self { memory, segments, offset: 0, beyond: 0, remaining, passed: 0 }
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
        let mut region: Option<Mapped<'a>> = None;
        self.segments.iter().map_while(move |segment| {
            let len = segment.len().saturating_sub(offset).min(left);
            let address = segment.address().checked_add(usize::try_from(offset).ok()?)?;
            offset = 0;
            left = left.saturating_sub(len);
            if len == 0 {
                return None;
            }
            let same = region.as_ref().and_then(|region| region.slice_here(address, len));
            same.or_else(|| {
                region = memory
                    .iter()
                    .filter_map(Mapped::new)
                    .find(|region| region.slice_here(address, len).is_some());
                region.as_ref()?.slice_here(address, len)
            })
        })
    }

    /// The buffers from here on as they lie in the chain, if those are all that is left, wholly and within `max` bytes.
    pub(crate) fn segments(&self, max: u32) -> Option<&'a [Segment]> {
        (self.offset == 0 && self.beyond == 0 && self.remaining <= max).then_some(self.segments)
    }

    /// Passes over `n` bytes.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there are fewer; the cursor does not move then.
    pub fn skip(&mut self, n: u32) -> Result<(), ChainError> {
        self.remaining = self.remaining.checked_sub(n).ok_or(ChainError::Short)?;
        self.passed = self.passed.saturating_add(n);
        // Long requests are passed over as a whole, or all but the last bytes: from the end that is near.
        if self.remaining < n {
            self.seek_from_end()
        } else {
            self.seek_forward(n)
        }
        Ok(())
    }

    fn seek_forward(&mut self, n: u32) {
        let mut n = n;
        while let Some((first, rest)) = self.segments.split_first() {
            let left = first.len().saturating_sub(self.offset);
            if n < left {
                self.offset = self.offset.saturating_add(n);
                break;
            }
            n = n.saturating_sub(left);
            self.segments = rest;
            self.offset = 0;
        }
    }

    /// Goes where [`Cursor::remaining`] bytes are left.
    fn seek_from_end(&mut self) {
        if self.remaining == 0 {
            (self.segments, self.offset, self.beyond) = (&[], 0, 0);
            return;
        }
        let mut left = self.remaining.saturating_add(self.beyond);
        for (index, segment) in self.segments.iter().enumerate().rev() {
            if left <= segment.len() {
                self.segments = self.segments.get(index..).unwrap_or_default();
                self.offset = segment.len().saturating_sub(left);
                return;
            }
            left = left.saturating_sub(segment.len());
        }
    }

    /// The next `n` bytes as a cursor of their own; this one moves past them.
    ///
    /// # Errors
    /// [`ChainError::Short`] if there are fewer; nothing moves then.
    pub fn split_to(&mut self, n: u32) -> Result<Cursor<'a>, ChainError> {
        let mut front = self.clone();
        self.skip(n)?;
        (front.remaining, front.passed) = (n, 0);
        if let (Some(next), true) = (self.segments.first(), self.remaining > 0) {
            // The segment that is cut belongs to both.
            let cut = self.offset > 0;
            let count = front.segments.len().saturating_sub(self.segments.len()).saturating_add(cut.into());
            front.segments = front.segments.get(..count).unwrap_or_default();
            front.beyond = if cut { next.len().saturating_sub(self.offset) } else { 0 };
        }
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
