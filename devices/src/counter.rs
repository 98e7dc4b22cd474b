//! Counters a device keeps: incremented anywhere, read by the control socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One named, monotonic count.
#[derive(Debug)]
pub struct Counter {
    name: &'static str,
    value: AtomicU64,
}

impl Counter {
    /// A counter at 0. `name` is `snake_case` and unique within its device.
    pub fn new(name: &'static str) -> Arc<Self> {
        Arc::new(Self { name, value: AtomicU64::new(0) })
    }

    /// The name given at construction.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds `n`; wraps after 2^64.
    pub fn add(&self, n: u64) {
        self.value.fetch_add(n, Ordering::Relaxed);
    }

    /// The count now.
    pub fn get(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}
