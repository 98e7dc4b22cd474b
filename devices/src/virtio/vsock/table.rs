//! The connections: a bounded table of slots, and which of them the guest knows by which ports.

use std::collections::HashMap;
use std::ops::Range;

use super::connection::{Connection, Patience};
use super::deadlines::Deadline;
use super::packet::Key;
use crate::device::EventSet;

/// Host ports given to host processes' connections, as they have none of their own.
const LOCAL_PORTS: Range<u32> = 1 << 30..1 << 31;

/// A connection and how the device keeps it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) connection: Connection,
    /// What the loop watches its stream for.
    pub(super) watched: Option<EventSet>,
    /// When the guest's or the parent's time is up.
    pub(super) waiting: Option<(Patience, Deadline)>,
    /// It stands in the line of those with packets for the guest.
    pub(super) queued: bool,
    /// It stands in the list of those to look at before the turn ends.
    pub(super) touched: bool,
}

/// All connections of a device.
#[derive(Debug)]
pub(super) struct Table {
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    by_key: HashMap<Key, u16>,
    limit: u16,
    /// Where the search for a free local port begins.
    pub(super) next_port: u32,
}

impl Table {
    pub(super) fn new(limit: u16) -> Self {
        let by_key = HashMap::new();
        Self { slots: Vec::new(), free: Vec::new(), by_key, limit, next_port: LOCAL_PORTS.start }
    }

    pub(super) fn find(&self, key: Key) -> Option<u16> {
        self.by_key.get(&key).copied()
    }

    pub(super) fn get(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index)).and_then(Option::as_mut)
    }

    /// The slots in use.
    pub(super) fn indices(&self) -> Vec<u16> {
        let used = (0u16..).zip(&self.slots).filter(|(_, slot)| slot.is_some());
        used.map(|(index, _)| index).collect()
    }

    /// A slot for one more connection, not taken yet; `None` when the table is full.
    pub(super) fn vacancy(&mut self) -> Option<u16> {
        if let Some(index) = self.free.last() {
            return Some(*index);
        }
        let index = u16::try_from(self.slots.len()).ok().filter(|index| *index < self.limit)?;
        self.slots.push(None);
        self.free.push(index);
        Some(index)
    }

    /// Takes the slot [`Table::vacancy`] gave.
    pub(super) fn insert(&mut self, index: u16, connection: Connection) {
        self.free.retain(|free| *free != index);
        self.by_key.insert(connection.key, index);
        if let Some(place) = self.slots.get_mut(usize::from(index)) {
            let slot = Slot { connection, watched: None, waiting: None, queued: false, touched: false };
            *place = Some(slot);
        }
    }

    /// The guest no longer knows the connection in this slot: its ports are free.
    pub(super) fn forget_key(&mut self, index: u16, key: Key) {
        if self.by_key.get(&key) == Some(&index) {
            self.by_key.remove(&key);
        }
    }

    pub(super) fn remove(&mut self, index: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)).and_then(Option::take) {
            self.forget_key(index, slot.connection.key);
            self.free.push(index);
        }
    }

    /// A host port that no connection to the guest's port `peer` uses; not given again for long.
    pub(super) fn free_port(&mut self, peer: u32) -> u32 {
        // At most `limit` are in use, so this ends.
        loop {
            let local = self.next_port;
            let next = local.wrapping_add(1);
            self.next_port = if LOCAL_PORTS.contains(&next) { next } else { LOCAL_PORTS.start };
            if LOCAL_PORTS.contains(&local) && !self.by_key.contains_key(&Key { local, peer }) {
                return local;
            }
        }
    }

    /// Forgets all connections, closing their streams. None may be watched any more.
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.by_key.clear();
    }
}
