//! Who wrote what: a second memory has the guest's writes alone, so that what differs is the device's doing.

use std::sync::Arc;

use super::{TABLES, TABLES_BYTES};
use crate::memory::{Bytes, GuestAddress, Memory};
use crate::testing::{self, Driver, touched};

/// Where all rings lie, tables of indirect descriptors too.
const RINGS: std::ops::Range<u64> = 0x10_0000..TABLES + TABLES_BYTES;

/// What a device may write of a guest's memory, and the memory without the device's writes.
pub(super) struct Witness {
    memory: Arc<Memory>,
    pub(super) twin: Arc<Memory>,
    used_rings: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
    /// Somebody other than the guest may have described buffers.
    blind: bool,
    /// The device may have memory read as zeroes: pages are given to it.
    takes_pages: bool,
}

impl Witness {
    pub(super) fn new(memory: Arc<Memory>, drivers: &[Driver], takes_pages: bool) -> Self {
        let used_rings = drivers.iter().map(|driver| {
            let start = driver.used_ring();
            (start, start + 6 + 8 * u64::from(driver.size()))
        });
        let used_rings: Vec<_> = used_rings.collect();
        let writable = used_rings.clone();
        Self { memory, twin: testing::memory(), used_rings, writable, blind: false, takes_pages }
    }

    /// The guest described these bytes as writable.
    pub(super) fn may_write(&mut self, address: u64, len: u32) {
        let end = address.saturating_add(len.into());
        let harmless = self.used_rings.iter().any(|(from, to)| *from <= address && end <= *to);
        // A device that writes descriptors for the guest says itself what it may write.
        self.blind |= address < RINGS.end && end > RINGS.start && !harmless;
        self.writable.push((address, end));
    }

    /// The guest names descriptors that nobody keeps account of.
    pub(super) fn look_away(&mut self) {
        self.blind = true;
    }

    pub(super) fn is_blind(&self) -> bool {
        self.blind
    }

    /// Nothing else changed than what was described as writable.
    pub(super) fn check(&mut self, name: &str) {
        if self.blind {
            return;
        }
        self.merge();
        let mut pages = touched(&self.memory);
        pages.extend(touched(&self.twin));
        pages.sort_unstable();
        pages.dedup();
        let (mut now, mut then) = ([0; 4096], [0; 4096]);
        for page in pages {
            self.memory.read_slice(&mut now, GuestAddress(page)).unwrap();
            self.twin.read_slice(&mut then, GuestAddress(page)).unwrap();
            // Most of what differs is in buffers that are larger than a page.
            if now == then || self.allows_to(page) >= page + 4096 {
                continue;
            }
            for (at, (now, then)) in (page..).zip(now.into_iter().zip(then)) {
                let taken = self.takes_pages && now == 0;
                assert!(
                    now == then || taken || at < self.allows_to(at),
                    "{name} wrote {now:#x} to {at:#x}, which was {then:#x} and not its to write"
                );
            }
        }
    }

    /// Puts the ranges in order and apart.
    fn merge(&mut self) {
        self.writable.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in self.writable.drain(..) {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        self.writable = merged;
    }

    /// Where what may be written ends, of the range that begins at or before `at`.
    fn allows_to(&self, at: u64) -> u64 {
        let before = self.writable.partition_point(|(start, _)| *start <= at);
        before.checked_sub(1).and_then(|i| self.writable.get(i)).map_or(0, |(_, end)| *end)
    }
}
