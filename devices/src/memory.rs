//! Guest memory as every device sees it.

pub use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionCollection, GuestRegionMmap, VolatileArrayRef, VolatileMemory, VolatileSlice,
};

/// The guest's RAM: one or more mapped regions. Cheap to clone (the regions are shared).
pub type Memory = vm_memory::GuestMemoryMmap<()>;
