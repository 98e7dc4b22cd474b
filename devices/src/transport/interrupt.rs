//! A running device's way to its driver: queue and configuration events to MSI-X vectors.
//!
//! Everything here is atomic, so an I/O thread raises an interrupt without a lock that a vCPU may hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::interrupt::Interrupt;
use crate::pci::msix::Vectors;

/// `VIRTIO_MSI_NO_VECTOR`: the event is mapped to no vector.
pub const NO_VECTOR: u16 = 0xffff;
/// Interrupt status: used buffers were published (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// Interrupt status: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// What the transport and a running task share.
#[derive(Debug)]
pub struct Events {
    vectors: Arc<Vectors>,
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
    /// Interrupt status; without INTx nothing but the driver looks at it.
    isr: AtomicU8,
    driver_ok: AtomicBool,
    needs_reset: AtomicBool,
}

impl Events {
    /// Nothing mapped, nothing raised.
    pub fn new(queues: usize, vectors: Arc<Vectors>) -> Self {
        Self {
            vectors,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            driver_ok: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
        }
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Acquire)
    }

    /// Maps configuration changes; a vector that does not exist maps to none (§4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::Release);
    }

    /// Vector of a queue; none for a queue that does not exist.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queues.get(usize::from(queue)).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Maps a queue's events, as [`Events::set_config_vector`].
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queues.get(usize::from(queue)) {
            place.store(self.existing(vector), Ordering::Release);
        }
    }

    /// Interrupt status now.
    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    /// Interrupt status, which becomes 0.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// Sets interrupt status bits (restore).
    pub fn set_isr(&self, bits: u8) {
        self.isr.store(bits & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
    }

    /// The driver set `DRIVER_OK`: notifications may be sent from now on.
    pub fn driver_ready(&self) {
        self.driver_ok.store(true, Ordering::Release);
    }

    /// Whether the device asked for a reset.
    pub fn reset_wanted(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Restores the request for a reset without telling the driver again.
    pub fn set_reset_wanted(&self) {
        self.needs_reset.store(true, Ordering::Release);
    }

    /// Back to the beginning; the task is out of its loop, so nothing is raised meanwhile.
    pub fn reset(&self) {
        self.driver_ok.store(false, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.config.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.vectors.clear_pending();
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.count() { vector } else { NO_VECTOR }
    }
}

impl Interrupt for Events {
    fn queue(&self, index: u16) {
        if !self.driver_ok.load(Ordering::Acquire) {
            return;
        }
        if self.vectors.enabled() {
            // `NO_VECTOR` is no vector of any table, so it is ignored there.
            self.vectors.trigger(self.queue_vector(index));
        } else {
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
    }

    fn config_changed(&self) {
        if self.driver_ok.load(Ordering::Acquire) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.vectors.trigger(self.config_vector());
        }
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }
}
