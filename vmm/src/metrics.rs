//! What happened in a machine so far, as counters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::control::Exits;

/// Counters that vCPUs and I/O loops add to.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// `IN` instructions.
    pub port_reads: AtomicU64,
    /// `OUT` instructions.
    pub port_writes: AtomicU64,
    /// Reads outside RAM.
    pub mmio_reads: AtomicU64,
    /// Writes outside RAM.
    pub mmio_writes: AtomicU64,
    /// Accesses that nobody answered.
    pub unclaimed: AtomicU64,
    /// Returns from KVM_RUN for a signal.
    pub interrupted: AtomicU64,
    /// All other returns from KVM_RUN.
    pub other: AtomicU64,
}

impl Counters {
    /// Adds one.
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The values now.
    pub(crate) fn exits(&self) -> Exits {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            port_reads: read(&self.port_reads),
            port_writes: read(&self.port_writes),
            mmio_reads: read(&self.mmio_reads),
            mmio_writes: read(&self.mmio_writes),
            unclaimed: read(&self.unclaimed),
            interrupted: read(&self.interrupted),
            other: read(&self.other),
        }
    }
}
