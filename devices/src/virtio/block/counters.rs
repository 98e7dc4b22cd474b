//! What a disk counts.

use std::sync::Arc;

use crate::counter::Counter;

/// Counts of one disk.
#[derive(Debug)]
pub(super) struct Counters {
    pub(super) reads: Arc<Counter>,
    pub(super) read_bytes: Arc<Counter>,
    pub(super) writes: Arc<Counter>,
    pub(super) written_bytes: Arc<Counter>,
    pub(super) flushes: Arc<Counter>,
    pub(super) discards: Arc<Counter>,
    pub(super) errors: Arc<Counter>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            reads: Counter::new("reads"),
            read_bytes: Counter::new("read_bytes"),
            writes: Counter::new("writes"),
            written_bytes: Counter::new("written_bytes"),
            flushes: Counter::new("flushes"),
            discards: Counter::new("discards"),
            errors: Counter::new("errors"),
        }
    }
}

impl Counters {
    /// All of them, to be reported.
    pub(super) fn all(&self) -> Vec<Arc<Counter>> {
        let Self { reads, read_bytes, writes, written_bytes, flushes, discards, errors } = self;
        [reads, read_bytes, writes, written_bytes, flushes, discards, errors].map(Arc::clone).into()
    }
}
