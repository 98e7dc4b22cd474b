//! What the guest says of its memory (VIRTIO 1.2 §5.5.6.3): entries of le16 tag and le64 value, in any order.

use std::sync::Arc;

use crate::chain::Cursor;
use crate::counter::Counter;

/// Most entries looked at in one buffer.
const MAX_ENTRIES: u32 = 256;

/// Names of the tags, from 0 on. Memory is in bytes, the rest are counts.
const NAMES: [&str; 16] = [
    "guest_swap_in_bytes",
    "guest_swap_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_cache_bytes",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
    "guest_oom_kills",
    "guest_allocation_stalls",
    "guest_async_scans",
    "guest_direct_scans",
    "guest_async_reclaims",
    "guest_direct_reclaims",
];

/// The guest's figures as it gave them last: claims, good for information only.
#[derive(Debug)]
pub(super) struct Stats {
    values: [Arc<Counter>; NAMES.len()],
}

impl Stats {
    pub(super) fn new() -> Self {
        Self { values: NAMES.map(Counter::new) }
    }

    pub(super) fn counters(&self) -> impl Iterator<Item = Arc<Counter>> + '_ {
        self.values.iter().map(Arc::clone)
    }

    /// Takes a buffer's entries over. Tags without a meaning here are passed by, as is a last piece that
    /// is no entry.
    pub(super) fn read(&self, from: &mut Cursor<'_>) {
        for _ in 0..MAX_ENTRIES {
            let (mut tag, mut value) = ([0; 2], [0; 8]);
            if from.read(&mut tag).and_then(|()| from.read(&mut value)).is_err() {
                break;
            }
            if let Some(counter) = self.values.get(usize::from(u16::from_le_bytes(tag))) {
                // Counters add; adding the difference sets. Only this device's thread writes them.
                counter.add(u64::from_le_bytes(value).wrapping_sub(counter.get()));
            }
        }
    }
}
