//! Guest memory as every device sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::mmap::FromRangesError;
pub use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    VolatileArrayRef, VolatileMemory, VolatileSlice,
};
use vm_memory::{GuestMemoryError, GuestMemoryRegionBytes, MemoryRegionAddress};

/// The guest's RAM: one or more mapped regions. Cheap to clone (the regions are shared).
#[derive(Clone, Debug)]
pub struct Memory {
    /// In order of address.
    regions: Vec<Arc<Region>>,
}

/// There is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum NoMemory {
    /// The host has none, or none there.
    #[error("the host refuses to map it")]
    Region(#[from] FromRangesError),
    /// Regions are none, out of order, or overlap.
    #[error("regions of memory are in no order")]
    Order,
}

impl Memory {
    /// Memory of these regions, in order of address.
    ///
    /// # Errors
    /// [`NoMemory::Order`].
    pub fn new(regions: Vec<Region>) -> Result<Self, NoMemory> {
        let ends = |region: &Region| region.start_addr().0.saturating_add(region.mapped());
        let ordered = regions.is_sorted_by(|one, next| ends(one) <= next.start_addr().0);
        if !ordered || regions.is_empty() {
            return Err(NoMemory::Order);
        }
        Ok(Self { regions: regions.into_iter().map(Arc::new).collect() })
    }

    /// Anonymous memory of zeroes, as `(address, bytes)` of each region, in order of address.
    ///
    /// # Errors
    /// The host's reason, or [`NoMemory::Order`].
    pub fn anonymous(ranges: &[(GuestAddress, usize)]) -> Result<Self, NoMemory> {
        let regions = ranges.iter().map(|(start, len)| GuestRegionMmap::from_range(*start, *len, None));
        Self::new(regions.map(|mapped| mapped.map(Region::from)).collect::<Result<_, _>>()?)
    }
}

impl GuestMemoryBackend for Memory {
    type R = Region;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    #[inline]
    fn find_region(&self, address: GuestAddress) -> Option<&Region> {
        // There are three at most. Callers rely on an address that was found to be in the region.
        self.regions.iter().map(AsRef::as_ref).find(|region| region.holds(address))
    }

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().map(AsRef::as_ref)
    }
}

/// A region: all of it is mapped, and the guest has as much of it, from its beginning on, as the host has shown it.
///
/// What is not shown is no memory to any device. More can be shown while the guest runs, and nothing is hidden
/// again: whoever was told of memory may go on using it.
#[derive(Debug)]
pub struct Region {
    mapped: GuestRegionMmap,
    shown: AtomicU64,
}

impl From<GuestRegionMmap> for Region {
    /// A region that is shown as a whole.
    fn from(mapped: GuestRegionMmap) -> Self {
        let shown = AtomicU64::new(mapped.len());
        Self { mapped, shown }
    }
}

impl Region {
    /// A region of which nothing is shown yet.
    pub fn hidden(mapped: GuestRegionMmap) -> Self {
        Self { mapped, shown: AtomicU64::new(0) }
    }

    /// Shows the guest the first `bytes`, as far as they are mapped, if that is more than before. They must be
    /// accessible by then: devices read and write what is shown.
    pub fn show(&self, bytes: u64) {
        self.shown.fetch_max(bytes.min(self.mapped.len()), Ordering::Release);
    }

    /// Whether the guest has memory at `address` here.
    #[inline]
    fn holds(&self, address: GuestAddress) -> bool {
        // Addresses below it come out larger than any region.
        address.0.wrapping_sub(self.mapped.start_addr().0) < self.shown.load(Ordering::Acquire)
    }

    /// Bytes that are mapped, shown or not.
    pub fn mapped(&self) -> u64 {
        self.mapped.len()
    }

    /// Where it is mapped.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapped.as_ptr()
    }

    /// Flags it is mapped with (`MAP_*`).
    pub fn flags(&self) -> i32 {
        self.mapped.flags()
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    #[inline]
    fn len(&self) -> u64 {
        self.shown.load(Ordering::Acquire)
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn last_addr(&self) -> GuestAddress {
        // One of which nothing is shown ends before it begins; none of these begins at 0.
        GuestAddress(self.start_addr().0.saturating_add(self.len()).saturating_sub(1))
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let address = self.check_address(address).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.mapped.get_host_address(address)
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        if offset.0.saturating_add(count as u64) > self.len() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        GuestMemoryRegion::get_slice(&self.mapped, offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

#[cfg(test)]
mod tests {
    use super::*;

    const START: GuestAddress = GuestAddress(0x10_0000);

    fn memory() -> Memory {
        let region = |start, len| GuestRegionMmap::from_range(start, len, None).unwrap();
        let regions = vec![region(GuestAddress(0), 4096).into(), Region::hidden(region(START, 3 * 4096))];
        Memory::new(regions).unwrap()
    }

    #[test]
    fn what_is_not_shown_is_no_memory() {
        let memory = memory();
        assert!(memory.get_slice(START, 1).is_err());
        assert!(memory.write_obj(1u8, START).is_err());
        assert!(memory.read_obj::<u64>(GuestAddress(START.0 + 8)).is_err());
        assert!(memory.get_slice(GuestAddress(0), 4096).is_ok());
    }

    #[test]
    fn more_is_shown_to_those_who_hold_it_and_nothing_is_hidden_again() {
        let memory = memory();
        let other = memory.clone();
        let region = memory.iter().last().unwrap();
        region.show(2 * 4096);
        other.write_obj(7u64, GuestAddress(START.0 + 8184)).unwrap();
        for (at, count) in [(4097, 4096), (8191, 2), (8192, 1), (4096, usize::MAX)] {
            assert!(other.get_slice(GuestAddress(START.0 + at), count).is_err(), "{at}+{count}");
        }
        region.show(4096);
        assert_eq!(other.read_obj::<u64>(GuestAddress(START.0 + 8184)).unwrap(), 7);
        region.show(u64::MAX);
        assert_eq!((region.len(), region.mapped()), (3 * 4096, 3 * 4096));
    }

    #[test]
    fn regions_that_overlap_are_refused() {
        let page = |start| (GuestAddress(start), 4096);
        assert!(Memory::anonymous(&[(GuestAddress(0), 8192), page(4096)]).is_err());
        assert!(Memory::anonymous(&[page(8192), page(0)]).is_err());
        assert!(Memory::anonymous(&[]).is_err());
        assert!(Memory::anonymous(&[page(0), page(4096)]).is_ok());
        let hidden = |start| Region::hidden(GuestRegionMmap::from_range(start, 8192, None).unwrap());
        assert!(Memory::new(vec![hidden(START), hidden(GuestAddress(START.0 + 4096))]).is_err());
    }
}
