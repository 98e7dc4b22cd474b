//! What a ring is made from: the registers the driver programmed, and what it agreed to.

use std::num::Wrapping;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::counter::Counter;

/// A queue's registers as the driver programmed them, and where the rings stood when they were saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Entries, a power of two.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Next available entry the device reads.
    pub next_available: u16,
    /// Next used entry the device writes.
    pub next_used: u16,
}

/// What the driver agreed to that changes how rings work, and the queue's name in errors.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingOptions {
    /// Queue number within its device.
    pub index: u16,
    /// Largest size that was offered.
    pub max_size: u16,
    /// `VIRTIO_F_RING_EVENT_IDX` was accepted.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was accepted.
    pub indirect: bool,
}

/// Counts a ring keeps; shared, so that they outlive resets.
#[derive(Clone, Debug)]
pub struct RingCounters {
    /// Chains handed to the device.
    pub chains: Arc<Counter>,
    /// Chains given back because they made no sense.
    pub refused: Arc<Counter>,
    /// Notifications sent to the driver.
    pub interrupts: Arc<Counter>,
}

impl Default for RingCounters {
    fn default() -> Self {
        Self {
            chains: Counter::new("chains"),
            refused: Counter::new("chains_refused"),
            interrupts: Counter::new("interrupts"),
        }
    }
}

/// The three areas of a queue must not share a byte: the device writes one of them.
pub(super) fn rings_overlap(state: &RingState) -> bool {
    let size = u64::from(state.size);
    let area = |start: u64, per_entry: u64, extra: u64| {
        (start, start.saturating_add(size.saturating_mul(per_entry)).saturating_add(extra))
    };
    let table = area(state.descriptors, 16, 0);
    let available = area(state.available, 2, 6);
    let used = area(state.used, 8, 6);
    let overlap = |a: (u64, u64), b: (u64, u64)| a.0 < b.1 && b.0 < a.1;
    overlap(table, available) || overlap(table, used) || overlap(available, used)
}

/// Whether moving the used index from `old` to `new` passes the entry the driver waits for (§2.7.7.2).
pub fn crosses_event(event: Wrapping<u16>, new: Wrapping<u16>, old: Wrapping<u16>) -> bool {
    new - event - Wrapping(1) < new - old
}
