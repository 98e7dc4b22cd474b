//! MSI-X: the vector table, the masks, and the way from an I/O thread to a message (PCI 3.0 §6.8.2).
//!
//! The table belongs to the vCPU side ([`Msix`]). An I/O thread holds only [`Vectors`]: one atomic byte per
//! vector, each operation one atomic step, so that an interrupt is either sent or seen pending by whoever
//! unmasks the vector, and is never lost between the two.
//!
//! A message stays routed while its vector is merely masked: an interrupt that was on its way when the mask
//! fell still arrives, as it does on hardware, and unmasking costs the host nothing. Only switching MSI-X
//! off takes the routes away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use super::{Msi, MsiSink};
use crate::bounded;

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Message control: MSI-X is on.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: every vector is masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Most vectors a table can have.
pub const MAX_VECTORS: u16 = 2048;
/// The same as a saved list counts.
const LIST: usize = MAX_VECTORS as usize;

/// Vector control: the entry is masked.
const ENTRY_MASKED: u32 = 1;

/// State bits of one vector.
const DELIVERABLE: u8 = 1;
const PENDING: u8 = 2;

/// The part of MSI-X that any thread may use.
pub struct Vectors {
    states: Box<[AtomicU8]>,
    enabled: AtomicBool,
    sink: Arc<dyn MsiSink>,
}

impl Vectors {
    /// Number of vectors.
    pub fn count(&self) -> usize {
        self.states.len()
    }

    /// Whether the driver switched MSI-X on.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Sends `vector`, or notes it as pending while it is masked. A vector that does not exist is ignored.
    pub fn trigger(&self, vector: u16) {
        let Some(state) = self.states.get(usize::from(vector)) else { return };
        if !self.enabled() {
            return;
        }
        let note = |now| Some(if now & DELIVERABLE != 0 { now } else { now | PENDING });
        let (Ok(before) | Err(before)) = state.fetch_update(Ordering::AcqRel, Ordering::Acquire, note);
        if before & DELIVERABLE != 0 {
            self.sink.signal(vector);
        }
    }

    /// Lets `vector` through from now on, and sends what was pending.
    fn allow(&self, vector: u16) {
        let Some(state) = self.states.get(usize::from(vector)) else { return };
        if state.swap(DELIVERABLE, Ordering::AcqRel) & PENDING != 0 {
            self.sink.signal(vector);
        }
    }

    /// Holds `vector` back from now on.
    fn hold(&self, vector: u16) {
        if let Some(state) = self.states.get(usize::from(vector)) {
            state.fetch_and(!DELIVERABLE, Ordering::AcqRel);
        }
    }

    /// Forgets what is pending.
    pub fn clear_pending(&self) {
        for state in &self.states {
            state.fetch_and(!PENDING, Ordering::AcqRel);
        }
    }

    fn pending(&self, vector: usize) -> bool {
        self.states.get(vector).is_some_and(|state| state.load(Ordering::Acquire) & PENDING != 0)
    }
}

impl std::fmt::Debug for Vectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vectors").field("count", &self.states.len()).finish_non_exhaustive()
    }
}

/// One table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The message as the guest wrote it.
    pub message: Msi,
    /// Whether the entry is masked.
    pub masked: bool,
}

/// A saved table. Whether MSI-X is on is in the capability's message control, which the header saves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// The table.
    #[serde(deserialize_with = "bounded::list::<_, _, LIST>")]
    pub entries: Vec<Entry>,
    /// Vectors that were pending.
    #[serde(deserialize_with = "bounded::list::<_, _, LIST>")]
    pub pending: Vec<u16>,
}

/// The vector table of a function.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    /// What the sink was told last, by vector.
    routed: Vec<Option<Msi>>,
    enabled: bool,
    mask_all: bool,
    vectors: Arc<Vectors>,
}

impl Msix {
    /// `count` vectors (at most [`MAX_VECTORS`]), all masked, MSI-X off.
    pub fn new(count: u16, sink: Arc<dyn MsiSink>) -> Self {
        let count = usize::from(count.min(MAX_VECTORS));
        let states = (0..count).map(|_| AtomicU8::new(0)).collect();
        Self {
            entries: vec![Entry { message: Msi::default(), masked: true }; count],
            routed: vec![None; count],
            enabled: false,
            mask_all: false,
            vectors: Arc::new(Vectors { states, enabled: AtomicBool::new(false), sink }),
        }
    }

    /// The part for I/O threads.
    pub fn vectors(&self) -> &Arc<Vectors> {
        &self.vectors
    }

    /// Body of the capability (after id and link): table and pending bits in BAR `bar`, and what of it the
    /// guest may write.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let last = u16::try_from(self.entries.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let [c0, c1] = last.to_le_bytes();
        let [t0, t1, t2, t3] = (table | u32::from(bar)).to_le_bytes();
        let [p0, p1, p2, p3] = (pending | u32::from(bar)).to_le_bytes();
        ([c0, c1, t0, t1, t2, t3, p0, p1, p2, p3], (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes())
    }

    /// The guest wrote message control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.mask_all = control & CONTROL_MASK_ALL != 0;
        self.vectors.enabled.store(self.enabled, Ordering::Release);
        for vector in 0..self.entries.len() {
            self.update(vector);
        }
        if !self.enabled {
            self.vectors.clear_pending();
        }
    }

    /// Reads the table; only aligned double and quad words are there (§6.8.2), all else reads as 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        for (at, part) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            part.copy_from_slice(&self.field(at).to_le_bytes());
        }
    }

    /// Writes the table; accesses that are not aligned double or quad words are ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        for (at, part) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            if let Ok(bytes) = part.try_into() {
                self.set_field(at, u32::from_le_bytes(bytes));
            }
        }
        // An aligned access never spans two entries.
        if let Ok(vector) = usize::try_from(offset.div_euclid(ENTRY_SIZE)) {
            self.update(vector);
        }
    }

    /// Reads the pending bits; widths as in the table. They are read-only.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let Ok(offset) = usize::try_from(offset) else { return };
        for (at, byte) in (offset..).zip(data) {
            let first = at.saturating_mul(8);
            let set = (0..8u8).filter(|bit| self.vectors.pending(first.saturating_add((*bit).into())));
            *byte = set.fold(0, |all, bit| all | 1u8.wrapping_shl(bit.into()));
        }
    }

    /// The table, for a snapshot.
    pub fn state(&self) -> MsixState {
        let pending = (0u16..).take(self.entries.len()).filter(|v| self.vectors.pending((*v).into()));
        MsixState { entries: self.entries.clone(), pending: pending.collect() }
    }

    /// Takes over a saved table; follow with [`Msix::set_control`], which routes and delivers. `false` if the
    /// table has another size.
    #[must_use]
    pub fn restore(&mut self, state: &MsixState) -> bool {
        if state.entries.len() != self.entries.len() {
            return false;
        }
        self.entries.clone_from(&state.entries);
        for vector in &state.pending {
            if let Some(state) = self.vectors.states.get(usize::from(*vector)) {
                state.fetch_or(PENDING, Ordering::AcqRel);
            }
        }
        true
    }

    fn field(&self, at: u64) -> u32 {
        let Some(entry) = usize::try_from(at.div_euclid(ENTRY_SIZE)).ok().and_then(|v| self.entries.get(v))
        else {
            return 0;
        };
        let [a, b, c, d, e, f, g, h] = entry.message.address.to_le_bytes();
        match at.rem_euclid(ENTRY_SIZE) {
            0 => u32::from_le_bytes([a, b, c, d]),
            4 => u32::from_le_bytes([e, f, g, h]),
            8 => entry.message.data,
            _ => u32::from(entry.masked),
        }
    }

    fn set_field(&mut self, at: u64, value: u32) {
        let vector = usize::try_from(at.div_euclid(ENTRY_SIZE)).ok();
        let Some(entry) = vector.and_then(|v| self.entries.get_mut(v)) else { return };
        let address = entry.message.address;
        match at.rem_euclid(ENTRY_SIZE) {
            0 => entry.message.address = (address & !u64::from(u32::MAX)) | u64::from(value),
            4 => entry.message.address = (address & u64::from(u32::MAX)) | (u64::from(value) << 32),
            8 => entry.message.data = value,
            _ => entry.masked = value & ENTRY_MASKED != 0,
        }
    }

    /// Brings the sink and the vector's state in line with the table.
    fn update(&mut self, vector: usize) {
        let (Some(entry), Some(routed)) = (self.entries.get(vector), self.routed.get_mut(vector)) else {
            return;
        };
        let Ok(number) = u16::try_from(vector) else { return };
        if self.enabled && !self.mask_all && !entry.masked {
            if *routed != Some(entry.message) {
                self.vectors.sink.route(number, Some(entry.message));
                *routed = Some(entry.message);
            }
            self.vectors.allow(number);
        } else {
            self.vectors.hold(number);
            if !self.enabled && routed.take().is_some() {
                self.vectors.sink.route(number, None);
            }
        }
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.trailing_zeros() >= len.trailing_zeros()
}
