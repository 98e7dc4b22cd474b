//! The virtio-pci modern transport: one PCI function that carries one virtio device (VIRTIO 1.2 §4.1).
//!
//! The transport owns the device and its queue registers until the driver sets `DRIVER_OK`. Then it builds
//! the rings from a validated copy of the registers and moves all of it, as a task, into an I/O loop; on
//! reset the task is moved back. What the two share meanwhile is [`interrupt::Events`]: atomics only.
//!
//! The `PCI_CFG` window (§4.1.4.9) is refreshed when one of its registers is written, because configuration
//! reads have no side effects here. A read through it therefore shows the BAR as it was at that write, and
//! does not clear the interrupt status.

mod function;
pub mod interrupt;
pub mod layout;
mod lifecycle;
pub mod registers;
mod state;
pub mod status;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{Kind, VirtioDevice};
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::io_loop::LoopHandle;
use crate::memory::Memory;
use crate::pci::MsiSink;
use crate::pci::config::{Header, HeaderError};
use crate::pci::msix::Msix;
use crate::ring::RingCounters;
use interrupt::Events;
use layout::MAX_QUEUES;
use lifecycle::Phase;
use registers::Registers;

pub use state::State;

/// What a transport works with besides its device.
pub struct Parts {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The loop the device runs in.
    pub io_loop: LoopHandle,
    /// Where its interrupts end.
    pub sink: Arc<dyn MsiSink>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    kind: Kind,
    header: Header,
    /// Offset of the MSI-X capability.
    msix_at: usize,
    /// Offset of the configuration access capability.
    window_at: usize,
    msix: Msix,
    registers: Registers,
    config: Option<Arc<ConfigSpace>>,
    events: Arc<Events>,
    kicks: Vec<Arc<EventFd>>,
    memory: Arc<Memory>,
    io_loop: LoopHandle,
    phase: Phase,
    counters: Counters,
}

/// What the transport counts, beside the device's own.
struct Counters {
    rings: RingCounters,
    kicks_ignored: Arc<Counter>,
    resets: Arc<Counter>,
    device: Vec<Arc<Counter>>,
}

/// What can go wrong on the host's side of a transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The device's queues or configuration do not fit a virtio-pci function.
    #[error("cannot put {device} behind virtio-pci: {what}")]
    Shape {
        /// Name of the device.
        device: &'static str,
        /// What is out of bounds.
        what: &'static str,
    },
    /// The capabilities do not fit.
    #[error("cannot lay out the configuration space")]
    Header(#[from] HeaderError),
    /// No event file descriptor for a queue.
    #[error("cannot create a queue's event")]
    Event(#[source] io::Error),
    /// The loop has ended.
    #[error("cannot hand a device to its I/O loop, or take it back")]
    Loop(#[source] io::Error),
    /// The device is running, or lost with its loop, where it must be at rest.
    #[error("{operation} needs a device at rest")]
    NotAtRest {
        /// What was tried.
        operation: &'static str,
    },
    /// A saved state does not belong to this device.
    #[error("saved state does not fit the device: {0}")]
    State(&'static str),
    /// A saved state's rings or device part cannot be used.
    #[error("cannot restore the device")]
    Restore(#[source] Error),
}

impl VirtioPci {
    /// A function for `device`, with decoding off and the driver not yet there.
    ///
    /// # Errors
    /// [`TransportError`]: the device's shape, or no file descriptors left.
    pub fn new(device: Box<dyn VirtioDevice>, parts: Parts) -> Result<Self, TransportError> {
        let kind = device.kind();
        let queues = device.queues();
        check_shape(kind, queues)?;
        let count = u16::try_from(queues.len()).unwrap_or(u16::MAX);
        let for_queues = if device.shares_vector() { count.min(1) } else { count };
        let msix = Msix::new(for_queues.saturating_add(1), parts.sink);
        let events = Arc::new(Events::new(queues.len(), Arc::clone(msix.vectors())));
        let config = device.config();
        let function = layout::function(&layout::Contents {
            id: kind.id,
            class: kind.class,
            queues: count.into(),
            config_len: config.as_ref().map_or(0, |config| config.len()).try_into().unwrap_or(0),
            msix: &msix,
        })?;
        let kicks =
            queues.iter().map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect::<io::Result<_>>();
        Ok(Self {
            kind,
            header: function.header,
            msix_at: function.msix,
            window_at: function.window,
            registers: Registers::new(queues, device.features(), Arc::clone(&events)),
            kicks: kicks.map_err(TransportError::Event)?,
            counters: Counters {
                rings: RingCounters::default(),
                kicks_ignored: Counter::new("kicks_ignored"),
                resets: Counter::new("resets"),
                device: device.counters(),
            },
            msix,
            config,
            events,
            memory: parts.memory,
            io_loop: parts.io_loop,
            phase: Phase::Negotiating { device },
        })
    }

    /// Who the device is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The device's configuration space, to look at.
    pub fn config_space(&self) -> Option<&Arc<ConfigSpace>> {
        self.config.as_ref()
    }

    /// A change of the configuration space by the host, of which the driver is told. `None` if there is none to change.
    pub fn change_config<T>(&self, change: impl FnOnce(&ConfigSpace) -> T) -> Option<T> {
        let changed = change(self.config.as_ref()?);
        self.notify_config_changed();
        Some(changed)
    }

    /// Tells the driver, if it is ready, to read the configuration again.
    pub fn notify_config_changed(&self) {
        self.events.config_changed();
    }

    /// Whether the driver has the device running.
    pub fn driver_ready(&self) -> bool {
        self.registers.values().status & status::DRIVER_OK != 0
    }

    /// Whether the device stopped and waits for the driver to reset it.
    pub fn needs_reset(&self) -> bool {
        self.events.reset_wanted()
    }

    /// All counts of the transport, its rings (summed over queues) and the device.
    pub fn counters(&self) -> Vec<Arc<Counter>> {
        let RingCounters { chains, refused, interrupts } = &self.counters.rings;
        let own = [chains, refused, interrupts, &self.counters.kicks_ignored, &self.counters.resets];
        own.into_iter().chain(&self.counters.device).cloned().collect()
    }
}

fn check_shape(kind: Kind, queues: &[u16]) -> Result<(), TransportError> {
    let refuse = |what| Err(TransportError::Shape { device: kind.name, what });
    if kind.id == 0 || kind.id >= 64 {
        return refuse("its id is not between 1 and 63");
    }
    if queues.len() > MAX_QUEUES {
        return refuse("it has more than 64 queues");
    }
    if !queues.iter().all(|size| size.is_power_of_two() && *size <= 1 << 15) {
        return refuse("a queue's size is not a power of two up to 32768");
    }
    Ok(())
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci")
            .field("kind", &self.kind)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}
