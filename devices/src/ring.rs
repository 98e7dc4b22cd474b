//! One split virtqueue as a device uses it (VIRTIO 1.2 §2.7): the only code that touches ring memory.
//!
//! The ring owns the etiquette, decided once for every device. A chain that makes no sense is given back
//! with length 0 and counted. A ring that makes no sense is an error: the device asks for a reset. No
//! driver input can end, hang or grow the process: each turn handles at most one queue's worth of chains.

#[cfg(test)]
mod properties;
mod registers;
#[cfg(test)]
mod tests;

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};

use crate::chain::{Buffers, Chain, Table};
use crate::error::{ChainError, Error, RingError};
use crate::interrupt::Interrupt;
use crate::memory::{Address, Bytes, GuestAddress, Memory};
use registers::rings_overlap;

pub use registers::{RingCounters, RingOptions, RingState, crosses_event};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver asks not to be notified (a hint, without `EVENT_IDX`).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Offset of the index in both rings, and of the first entry.
const INDEX_OFFSET: u64 = 2;
const ENTRIES_OFFSET: u64 = 4;

/// Longest turn, and the chain that is being worked at when it is over. Whoever wants the device back waits for it.
const TURN_TIME: Duration = Duration::from_millis(10);
/// Chains between two looks at the clock where each is quick.
const QUICK_CHAINS: u16 = 16;

/// When [`Ring::serve`] tells the driver: after each chain (a slow back end) or once it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// After every chain: the driver goes on while the next is worked at.
    Each,
    /// Once, at the end of the batch.
    Batch,
}

/// Why [`Ring::serve`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Served {
    /// The driver has posted nothing more and will kick when it does.
    All,
    /// A full queue's worth was handled, or time is up: come back after the other devices had a turn.
    More,
    /// The device held a chain ([`Error::Held`]), which is the next one again. The driver does not kick for it.
    Held,
}

/// A live queue: validated, placed in guest memory, in use by one device on one thread.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    options: RingOptions,
    memory: Arc<Memory>,
    /// One flag per head: the device has it and has not given it back.
    in_flight: Vec<bool>,
    /// Used entries written but not yet shown to the driver.
    staged: Wrapping<u16>,
    /// Used index when the driver was last considered for a notification.
    considered: Wrapping<u16>,
    /// How often this turn may still be prolonged by a driver that posts what is of no use.
    patience: u16,
    /// The turn ended before the driver's posts did.
    unfinished: bool,
    buffers: Buffers,
    counters: RingCounters,
}

impl Ring {
    /// Takes a validated copy of the registers: what the driver writes to them later changes nothing here.
    ///
    /// # Errors
    /// [`RingError::Size`] and [`RingError::Placement`] when the rings cannot be used.
    pub fn new(
        state: RingState,
        options: RingOptions,
        memory: Arc<Memory>,
        counters: RingCounters,
    ) -> Result<Self, Error> {
        let fail = |cause| Error::Ring { ring: options.index, cause };
        let mut queue = Queue::new(options.max_size).map_err(|_| fail(RingError::Size))?;
        queue.try_set_size(state.size).map_err(|_| fail(RingError::Size))?;
        queue
            .try_set_desc_table_address(GuestAddress(state.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(state.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(state.used)))
            .map_err(|_| fail(RingError::Placement))?;
        queue.set_event_idx(options.event_idx);
        queue.set_next_avail(state.next_available);
        queue.set_next_used(state.next_used);
        queue.set_ready(true);
        if rings_overlap(&state) || !queue.is_valid(memory.as_ref()) {
            return Err(fail(RingError::Placement));
        }
        Ok(Self {
            in_flight: vec![false; state.size.into()],
            staged: Wrapping(0),
            considered: Wrapping(state.next_used),
            patience: state.size,
            unfinished: false,
            buffers: Buffers::default(),
            queue,
            options,
            memory,
            counters,
        })
    }

    /// Registers and positions, to build the same ring again. Nothing may be in flight.
    pub fn state(&self) -> RingState {
        RingState {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// The guest memory this ring lives in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Begins a turn: until the next one, at most one queue's worth of chains that make no sense is given
    /// back. A driver could post them as fast as they come back, and a device would never be done.
    pub fn begin_turn(&mut self) {
        self.patience = self.queue.size();
        self.unfinished = false;
    }

    /// Whether the ring claimed to be empty for the sake of others: come back after they had a turn.
    pub fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// The next chain the driver posted, checked as a whole. Chains that make no sense are given back on
    /// the way, as many as [the turn](Ring::begin_turn) allows.
    ///
    /// # Errors
    /// [`Error::Ring`] when the available ring itself is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, Error> {
        let index = self.available_index()?;
        while self.queue.next_avail() != index.0 {
            if self.patience == 0 {
                self.unfinished = true;
                return Ok(None);
            }
            let head = self.next_head()?;
            let table = Table {
                address: GuestAddress(self.queue.desc_table()),
                size: self.queue.size(),
                indirect: self.options.indirect,
                position: self.queue.next_avail(),
            };
            match Chain::walk(&self.memory, table, head, &mut self.buffers) {
                Ok(chain) => {
                    self.counters.chains.one();
                    return Ok(Some(chain));
                }
                Err(error) => {
                    self.refuse(error);
                    self.stage(head, 0)?;
                    self.publish()?;
                }
            }
        }
        Ok(None)
    }

    /// Puts the chain popped last back, as if it had not been looked at. Several are put back last first;
    /// one before a chain that made no sense is given back instead: time cannot be turned back past that.
    ///
    /// # Errors
    /// [`Error::Ring`] when the used ring cannot be written.
    pub fn undo(&mut self, chain: Chain) -> Result<(), Error> {
        if chain.position == self.queue.next_avail() {
            self.queue.set_next_avail(chain.position.wrapping_sub(1));
            self.release(chain);
            return Ok(());
        }
        self.complete(chain, 0)?;
        self.publish()
    }

    /// Writes a used entry for `chain` without showing it yet, so that several can appear at once.
    ///
    /// # Errors
    /// [`Error::Ring`] when the used ring cannot be written.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), Error> {
        self.stage(chain.head(), written)?;
        self.release(chain);
        Ok(())
    }

    /// Shows the driver all completed chains: one store of the used index.
    ///
    /// # Errors
    /// [`Error::Ring`] when the used ring cannot be written.
    pub fn publish(&mut self) -> Result<(), Error> {
        let next = Wrapping(self.queue.next_used()) + self.staged;
        self.staged = Wrapping(0);
        self.queue.set_next_used(next.0);
        let address = self.offset(self.queue.used_ring(), INDEX_OFFSET)?;
        self.memory
            .store(next.0.to_le(), address, Ordering::Release)
            .map_err(|_| self.broken(RingError::Placement))
    }

    /// Notifies the driver if it wants to know of what was published since the last call (§2.7.7.2).
    ///
    /// # Errors
    /// [`Error::Ring`] when the available ring cannot be read.
    pub fn notify(&mut self, interrupt: &dyn Interrupt) -> Result<(), Error> {
        let new = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.considered, new);
        if new == old {
            return Ok(());
        }
        // The used index must be visible before the driver's wish is read, or both sides could wait.
        fence(Ordering::SeqCst);
        let wanted = if self.options.event_idx {
            let event = self.load(self.queue.avail_ring(), self.entry_offset(self.queue.size(), 2))?;
            crosses_event(Wrapping(event), new, old)
        } else {
            self.load(self.queue.avail_ring(), 0)? & AVAIL_NO_INTERRUPT == 0
        };
        if wanted {
            self.counters.interrupts.one();
            interrupt.queue(self.options.index);
        }
        Ok(())
    }

    /// Asks the driver for a kick on its next post. `true` if it has posted something already: look again.
    /// Looking again counts as well, because an index that jumps to and fro promises chains that are not there.
    ///
    /// # Errors
    /// [`Error::Ring`] when ring memory cannot be accessed.
    pub fn enable_kicks(&mut self) -> Result<bool, Error> {
        if self.patience == 0 {
            self.unfinished = true;
            return Ok(false);
        }
        let posted = self.queue.enable_notification(self.memory.as_ref());
        let posted = posted.map_err(|_| self.broken(RingError::Placement))?;
        self.patience = self.patience.saturating_sub(posted.into());
        Ok(posted)
    }

    /// Tells the driver that kicks are not needed for now (a hint).
    ///
    /// # Errors
    /// [`Error::Ring`] when ring memory cannot be accessed.
    pub fn disable_kicks(&mut self) -> Result<(), Error> {
        self.queue.disable_notification(self.memory.as_ref()).map_err(|_| self.broken(RingError::Placement))
    }

    /// Hands every posted chain to `device`, gives each back with the length it returns, and notifies.
    ///
    /// [`Error::Chain`] from `device` refuses that one chain, [`Error::Held`] puts it back and ends the turn; any
    /// other error ends the turn and is returned, with its chain given back.
    ///
    /// # Errors
    /// [`Error::Ring`] for a broken ring, or what `device` returned.
    pub fn serve(
        &mut self,
        interrupt: &dyn Interrupt,
        notify: Notify,
        mut device: impl FnMut(&Chain) -> Result<u32, Error>,
    ) -> Result<Served, Error> {
        self.disable_kicks()?;
        let begun = Instant::now();
        let stride = if notify == Notify::Each { 1 } else { QUICK_CHAINS };
        for served in 1..=self.queue.size() {
            let Some(chain) = self.pop()? else {
                self.notify(interrupt)?;
                if self.enable_kicks()? {
                    continue;
                }
                return Ok(Served::All);
            };
            let answer = device(&chain);
            if let Err(Error::Held) = answer {
                self.undo(chain)?;
                self.notify(interrupt)?;
                return Ok(Served::Held);
            }
            let written = match &answer {
                Ok(written) => *written,
                Err(Error::Chain(error)) => {
                    self.refuse(*error);
                    0
                }
                Err(_) => 0,
            };
            self.complete(chain, written)?;
            self.publish()?;
            if notify == Notify::Each || matches!(answer, Err(Error::Ring { .. } | Error::Device { .. })) {
                self.notify(interrupt)?;
            }
            if let Err(error @ (Error::Ring { .. } | Error::Device { .. })) = answer {
                return Err(error);
            }
            if served.is_multiple_of(stride) && begun.elapsed() >= TURN_TIME {
                break;
            }
        }
        self.notify(interrupt)?;
        Ok(Served::More)
    }

    /// Counts and logs a chain that made no sense; the caller gives it back with length 0.
    pub fn refuse(&mut self, error: ChainError) {
        self.patience = self.patience.saturating_sub(1);
        self.counters.refused.one();
        log::warn!("queue {}: gave a chain back unused: {error}", self.options.index);
    }

    fn available_index(&self) -> Result<Wrapping<u16>, Error> {
        let index = self
            .queue
            .avail_idx(self.memory.as_ref(), Ordering::Acquire)
            .map_err(|_| self.broken(RingError::Placement))?;
        let posted = index - Wrapping(self.queue.next_avail());
        if posted.0 > self.queue.size() {
            return Err(self.broken(RingError::AvailIndex));
        }
        Ok(index)
    }

    /// Reads the next entry of the available ring and marks its head as in flight.
    fn next_head(&mut self) -> Result<u16, Error> {
        let slot = self.queue.next_avail().checked_rem(self.queue.size()).unwrap_or(0);
        let head = self.load(self.queue.avail_ring(), self.entry_offset(slot, 2))?;
        match self.in_flight.get_mut(usize::from(head)) {
            None => return Err(self.broken(RingError::Head(head))),
            Some(flag) if *flag => return Err(self.broken(RingError::InFlight(head))),
            Some(flag) => *flag = true,
        }
        self.queue.set_next_avail(self.queue.next_avail().wrapping_add(1));
        Ok(head)
    }

    /// Writes the used entry after those already staged and marks the head as given back.
    fn stage(&mut self, head: u16, written: u32) -> Result<(), Error> {
        let at = Wrapping(self.queue.next_used()) + self.staged;
        let slot = at.0.checked_rem(self.queue.size()).unwrap_or(0);
        let address = self.offset(self.queue.used_ring(), self.entry_offset(slot, 8))?;
        // Entry: le32 id, le32 len, as one 8-byte value.
        let entry = (u64::from(written) << 32) | u64::from(head);
        self.memory.write_obj(entry.to_le(), address).map_err(|_| self.broken(RingError::Placement))?;
        self.staged += 1;
        if let Some(flag) = self.in_flight.get_mut(usize::from(head)) {
            *flag = false;
        }
        Ok(())
    }

    fn release(&mut self, chain: Chain) {
        if let Some(flag) = self.in_flight.get_mut(usize::from(chain.head())) {
            *flag = false;
        }
        self.buffers.segments.push(chain.into_segments());
    }

    fn load(&self, ring: u64, offset: u64) -> Result<u16, Error> {
        let address = self.offset(ring, offset)?;
        let value: u16 =
            self.memory.load(address, Ordering::Acquire).map_err(|_| self.broken(RingError::Placement))?;
        Ok(u16::from_le(value))
    }

    fn entry_offset(&self, slot: u16, entry_size: u64) -> u64 {
        // At most 4 + 32768 * 8.
        ENTRIES_OFFSET.saturating_add(u64::from(slot).saturating_mul(entry_size))
    }

    fn offset(&self, ring: u64, offset: u64) -> Result<GuestAddress, Error> {
        GuestAddress(ring).checked_add(offset).ok_or_else(|| self.broken(RingError::Placement))
    }

    fn broken(&self, cause: RingError) -> Error {
        Error::Ring { ring: self.options.index, cause }
    }
}
