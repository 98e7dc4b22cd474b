//! The common configuration structure (VIRTIO 1.2 §4.1.4.3): what the driver programs before it is ready.
//!
//! A register answers to its own width at its own offset; a 64-bit one also to its two halves. Every other
//! access reads as 0 and writes nothing. Features are frozen by `FEATURES_OK`; a queue is configured
//! between `FEATURES_OK` and `DRIVER_OK`, and each frozen by its `queue_enable`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::interrupt::Events;
use super::layout::MAX_QUEUES;
use super::status::{self, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, Step};
use crate::bounded;
use crate::ring::RingState;

/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// Offsets of the registers.
mod at {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    /// End of the last field this transport has (`queue_device`).
    pub(super) const END: u64 = 0x38;
}

/// One queue's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Largest size offered.
    pub max: u16,
    /// The driver enabled it.
    pub enabled: bool,
    /// Size and addresses; the positions stay 0.
    pub ring: RingState,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, enabled: false, ring: RingState { size: max, ..RingState::default() } }
    }
}

/// The register values a driver can set, without the vectors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Values {
    /// Word of the offered features that is read.
    pub device_feature_select: u32,
    /// Word of the accepted features that is written.
    pub driver_feature_select: u32,
    /// Features accepted so far.
    pub accepted: u64,
    /// The driver's status bits.
    pub status: u8,
    /// The queue that the queue registers belong to.
    pub queue_select: u16,
    /// Queues.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_QUEUES>")]
    pub queues: Vec<QueueRegisters>,
}

/// The register file.
#[derive(Debug)]
pub struct Registers {
    values: Values,
    offered: u64,
    events: Arc<Events>,
    generation: Generation,
}

/// The configuration generation as the driver sees it: one step per read that follows any number of host
/// changes, so that no number of changes looks like none (§4.1.4.3.1).
#[derive(Debug, Default)]
struct Generation {
    shown: u8,
    changes: u64,
}

impl Registers {
    /// Registers of a device with queues of these largest sizes, offering `features` and what the
    /// transport itself adds.
    pub fn new(queues: &[u16], features: u64, events: Arc<Events>) -> Self {
        let values = Values {
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: 0,
            status: 0,
            queue_select: 0,
            queues: queues.iter().map(|max| QueueRegisters::new(*max)).collect(),
        };
        let offered = features | VERSION_1 | EVENT_IDX | INDIRECT_DESC;
        Self { values, offered, events, generation: Generation::default() }
    }

    /// The values now.
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// The configuration generation that the driver read last.
    pub fn generation(&self) -> u8 {
        self.generation.shown
    }

    /// Takes over saved values, and the generation read last: the next one read is another, because what is behind
    /// the device may be. `false` if the values do not fit this device.
    #[must_use]
    pub fn restore(&mut self, values: &Values, generation: u8) -> bool {
        let (own, theirs) = (&self.values.queues, &values.queues);
        let same = own.len() == theirs.len()
            && own
                .iter()
                .zip(theirs)
                .all(|(own, theirs)| own.max == theirs.max && accepts_size(own.max, theirs.ring.size));
        if !same || !status::is_reachable(values.status) {
            return false;
        }
        if values.status & FEATURES_OK != 0 && !acceptable(values.accepted, self.offered) {
            return false;
        }
        self.values.clone_from(values);
        // The transport then puts the saved bytes into the configuration space, which counts as a change.
        self.generation = Generation { shown: generation, changes: 0 };
        true
    }

    /// Whether the accepted features are a subset of what is offered, with `VERSION_1`.
    pub fn acceptable(&self) -> bool {
        acceptable(self.values.accepted, self.offered)
    }

    /// Sets a status bit that the transport decided on.
    pub fn add_status(&mut self, bit: u8) {
        self.values.status |= bit;
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.values.device_feature_select = 0;
        self.values.driver_feature_select = 0;
        self.values.accepted = 0;
        self.values.status = 0;
        self.values.queue_select = 0;
        for queue in &mut self.values.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    /// A read. `changes` counts the host's changes of the device configuration.
    pub fn read(&mut self, offset: u64, changes: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match (offset, data.len()) {
            (at::CONFIG_GENERATION, 1) => self.generation.show(changes).into(),
            (at::QUEUE_DESC..at::END, 4 | 8) => self.read_address(offset, data.len()),
            (offset, len) => self.register(offset, len),
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn register(&self, offset: u64, len: usize) -> u64 {
        let values = &self.values;
        let queue = self.selected();
        match (offset, len) {
            (at::DEVICE_FEATURE_SELECT, 4) => values.device_feature_select.into(),
            (at::DEVICE_FEATURE, 4) => word(self.offered, values.device_feature_select).into(),
            (at::DRIVER_FEATURE_SELECT, 4) => values.driver_feature_select.into(),
            (at::DRIVER_FEATURE, 4) => word(values.accepted, values.driver_feature_select).into(),
            (at::CONFIG_VECTOR, 2) => self.events.config_vector().into(),
            (at::NUM_QUEUES, 2) => u16::try_from(values.queues.len()).unwrap_or(u16::MAX).into(),
            (at::DEVICE_STATUS, 1) => self.status().into(),
            (at::QUEUE_SELECT, 2) => values.queue_select.into(),
            (at::QUEUE_SIZE, 2) => queue.map_or(0, |queue| queue.ring.size).into(),
            (at::QUEUE_VECTOR, 2) => self.events.queue_vector(values.queue_select).into(),
            (at::QUEUE_ENABLE, 2) => queue.is_some_and(|queue| queue.enabled).into(),
            (at::QUEUE_NOTIFY_OFF, 2) => queue.map_or(0, |_| values.queue_select).into(),
            _ => 0,
        }
    }

    /// Status as the driver reads it.
    fn status(&self) -> u8 {
        let wanted = if self.events.reset_wanted() { NEEDS_RESET } else { 0 };
        self.values.status | wanted
    }

    /// A write. What it means for the device, if anything, is left to the caller.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Step {
        let value = number(data);
        let narrow = u16::try_from(value);
        match (offset, data.len(), narrow) {
            (at::DEVICE_STATUS, 1, _) => return self.write_status(value),
            (at::DEVICE_FEATURE_SELECT, 4, _) => self.values.device_feature_select = low(value),
            (at::DRIVER_FEATURE_SELECT, 4, _) => self.values.driver_feature_select = low(value),
            (at::DRIVER_FEATURE, 4, _) => self.write_features(low(value)),
            (at::CONFIG_VECTOR, 2, Ok(vector)) => self.events.set_config_vector(vector),
            (at::QUEUE_SELECT, 2, Ok(queue)) => self.values.queue_select = queue,
            (at::QUEUE_VECTOR, 2, Ok(vector)) => {
                self.events.set_queue_vector(self.values.queue_select, vector);
            }
            (at::QUEUE_SIZE, 2, Ok(size)) => {
                if let Some(queue) = self.configurable()
                    && accepts_size(queue.max, size)
                {
                    queue.ring.size = size;
                }
            }
            (at::QUEUE_ENABLE, 2, Ok(1)) => {
                if let Some(queue) = self.configurable() {
                    queue.enabled = true;
                }
            }
            (at::QUEUE_DESC..at::END, len @ (4 | 8), _) => self.write_address(offset, len, value),
            _ => {}
        }
        Step::Ignore
    }

    fn write_status(&mut self, value: u64) -> Step {
        let step = status::step(self.values.status, u8::try_from(value).unwrap_or(0));
        if let Step::Set(bits) = step {
            self.values.status = bits;
        }
        step
    }

    fn write_features(&mut self, value: u32) {
        if self.values.status & (FEATURES_OK | FAILED) != 0 {
            return;
        }
        let low = u64::from(u32::MAX);
        match self.values.driver_feature_select {
            0 => self.values.accepted = (self.values.accepted & !low) | u64::from(value),
            1 => self.values.accepted = (self.values.accepted & low) | (u64::from(value) << 32),
            _ => {} // no feature above 63 is offered: it reads back as not accepted
        }
    }

    fn read_address(&self, offset: u64, len: usize) -> u64 {
        let Some(queue) = self.selected() else { return 0 };
        let (value, low_half) = match offset {
            at::QUEUE_DESC => (queue.ring.descriptors, true),
            at::QUEUE_DRIVER => (queue.ring.available, true),
            at::QUEUE_DEVICE => (queue.ring.used, true),
            HIGH_DESC => (queue.ring.descriptors, false),
            HIGH_DRIVER => (queue.ring.available, false),
            HIGH_DEVICE => (queue.ring.used, false),
            _ => return 0,
        };
        match (low_half, len) {
            (true, _) => value, // the caller takes as many bytes as it wants
            (false, 4) => value >> 32,
            (false, _) => 0,
        }
    }

    fn write_address(&mut self, offset: u64, len: usize, value: u64) {
        let Some(queue) = self.configurable() else { return };
        let ring = &mut queue.ring;
        let (register, low_half) = match offset {
            at::QUEUE_DESC => (&mut ring.descriptors, true),
            at::QUEUE_DRIVER => (&mut ring.available, true),
            at::QUEUE_DEVICE => (&mut ring.used, true),
            HIGH_DESC => (&mut ring.descriptors, false),
            HIGH_DRIVER => (&mut ring.available, false),
            HIGH_DEVICE => (&mut ring.used, false),
            _ => return,
        };
        let low = u64::from(u32::MAX);
        match (low_half, len) {
            (true, 8) => *register = value,
            (true, _) => *register = (*register & !low) | value,
            (false, 4) => *register = (*register & low) | (value << 32),
            (false, _) => {}
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.values.queues.get(usize::from(self.values.queue_select))
    }

    /// The selected queue, if the driver may still configure it.
    fn configurable(&mut self) -> Option<&mut QueueRegisters> {
        if self.values.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return None;
        }
        self.values.queues.get_mut(usize::from(self.values.queue_select)).filter(|queue| !queue.enabled)
    }
}

const HIGH_DESC: u64 = at::QUEUE_DESC + 4;
const HIGH_DRIVER: u64 = at::QUEUE_DRIVER + 4;
const HIGH_DEVICE: u64 = at::QUEUE_DEVICE + 4;

impl Generation {
    fn show(&mut self, changes: u64) -> u8 {
        if changes != self.changes {
            self.changes = changes;
            self.shown = self.shown.wrapping_add(1);
        }
        self.shown
    }
}

fn acceptable(accepted: u64, offered: u64) -> bool {
    accepted & !offered == 0 && accepted & VERSION_1 != 0
}

fn accepts_size(max: u16, size: u16) -> bool {
    size.is_power_of_two() && size <= max
}

/// Word `select` of a feature set; words past the second are empty.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => low(features),
        1 => low(features >> 32),
        _ => 0,
    }
}

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Up to eight little-endian bytes.
fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    for (byte, value) in bytes.iter_mut().zip(data) {
        *byte = *value;
    }
    u64::from_le_bytes(bytes)
}
