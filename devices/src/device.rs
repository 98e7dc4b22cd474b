//! What a virtio device is: the trait a device author writes, and what the device is given to work with.

use std::os::fd::RawFd;
use std::sync::Arc;

pub use vmm_sys_util::epoll::EventSet;

use crate::chain::Chain;
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::memory::Memory;
use crate::ring::{Notify, Ring, Served};
use crate::throttle::Meters;
use crate::virtio::DeviceState;

/// Who a device is, to the driver and to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Virtio device id (VIRTIO 1.2 §5), below 64.
    pub id: u16,
    /// Name in configuration, logs and counters.
    pub name: &'static str,
    /// PCI class code: base class, subclass, programming interface.
    pub class: [u8; 3],
    /// The guest kernel symbol that drives it, for a message when nothing does.
    pub guest_config: &'static str,
}

/// A virtio device: turns chains into bytes and bytes into chains.
///
/// The transport owns it until the driver is ready, then it moves into an I/O loop together with its
/// rings, and back on reset. So every method has the device to itself; there is nothing to lock.
pub trait VirtioDevice: Send {
    /// Who the device is.
    fn kind(&self) -> Kind;

    /// Largest size of each queue, a power of two; the length is the number of queues.
    fn queues(&self) -> &[u16];

    /// Device-specific feature bits offered (0 to 23 and 50 to 127 are the device's; the transport adds
    /// `VERSION_1`, `EVENT_IDX` and `INDIRECT_DESC`).
    fn features(&self) -> u64 {
        0
    }

    /// Whether the device can work with the accepted subset; `false` refuses `FEATURES_OK`.
    fn accepts(&self, _features: u64) -> bool {
        true
    }

    /// The configuration space, shared with the transport. `None` if the device has none.
    fn config(&self) -> Option<Arc<ConfigSpace>> {
        None
    }

    /// Counts to report beside those every ring keeps.
    fn counters(&self) -> Vec<Arc<Counter>> {
        Vec::new()
    }

    /// Whether a slow request of this device would hold up others: it then gets an I/O loop of its own.
    fn wants_own_loop(&self) -> bool {
        false
    }

    /// Whether one interrupt announces all queues. Each vector costs the guest about fifteen accesses that
    /// leave it while it starts (Linux 6.12), which a device of little traffic never earns back.
    fn shares_vector(&self) -> bool {
        false
    }

    /// The driver is ready, with these features, or a paused machine goes on. Watch back-end files here;
    /// forget nothing here.
    ///
    /// # Errors
    /// Any error leaves the device stopped and asking for a reset.
    fn start(&mut self, _features: u64, _io: &mut Io<'_>) -> Result<(), Error> {
        Ok(())
    }

    /// The driver kicked queue `index` (or may have: spurious calls happen, §2.7.10.2).
    ///
    /// # Errors
    /// As [`VirtioDevice::start`]. Refuse single chains by [`Error::Chain`] inside [`Io::serve`].
    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error>;

    /// A watched file became ready. `token` is what [`Io::watch`] was given. Error and hang-up conditions
    /// arrive unasked: unwatch the file then, or they arrive for ever.
    ///
    /// # Errors
    /// As [`VirtioDevice::start`].
    fn on_event(&mut self, _token: u32, _events: EventSet, _io: &mut Io<'_>) -> Result<(), Error> {
        Ok(())
    }

    /// The driver reset the device: forget everything it said. Watched files are unwatched already.
    fn stop(&mut self) {}

    /// Where what the device carries is charged from now on. One that carries nothing worth it need not care.
    fn charge_at(&mut self, _meters: Meters) {}

    /// What a restored device needs beyond its configuration. Rings are saved by the transport.
    fn state(&self) -> DeviceState;

    /// Takes over a saved state before the device starts again.
    ///
    /// # Errors
    /// The state is not this device's, or says something impossible.
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error>;
}

/// Adds files to a loop on behalf of one device. The loop implements it; tests record.
pub trait Watch {
    /// Starts watching `fd` for `events` under `token`.
    ///
    /// # Errors
    /// The host's reason, or that the file is watched already.
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()>;

    /// Changes what a watched `fd` is watched for.
    ///
    /// # Errors
    /// The host's reason.
    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()>;

    /// Stops watching `fd`. Do this before closing it.
    ///
    /// # Errors
    /// The host's reason, or that the file is not watched.
    fn remove(&mut self, fd: RawFd) -> std::io::Result<()>;

    /// Stops watching every file of this device.
    fn clear(&mut self);
}

/// What a running device works with: its rings, its interrupt and the loop it lives in.
pub struct Io<'a> {
    /// One per queue; `None` where the driver left the queue disabled.
    pub(crate) rings: &'a mut [Option<Ring>],
    pub(crate) interrupt: &'a dyn Interrupt,
    pub(crate) watch: &'a mut dyn Watch,
    pub(crate) memory: &'a Arc<Memory>,
    /// Queues to serve again once other devices had their turn.
    pub(crate) again: &'a mut Vec<u16>,
}

impl Io<'_> {
    /// The ring of queue `index`; `None` if the driver did not enable it.
    pub fn ring(&mut self, index: u16) -> Option<&mut Ring> {
        self.rings.get_mut(usize::from(index)).and_then(Option::as_mut)
    }

    /// The interrupt, to publish and notify by hand with a ring from [`Io::ring_and_interrupt`].
    pub fn interrupt(&self) -> &dyn Interrupt {
        self.interrupt
    }

    /// A ring together with the interrupt that announces its used buffers.
    pub fn ring_and_interrupt(&mut self, index: u16) -> Option<(&mut Ring, &dyn Interrupt)> {
        let ring = self.rings.get_mut(usize::from(index)).and_then(Option::as_mut)?;
        Some((ring, self.interrupt))
    }

    /// Guest memory outside of any chain: only for a device whose requests name pages (balloon).
    pub fn memory(&self) -> &Arc<Memory> {
        self.memory
    }

    /// Serves queue `index` as [`Ring::serve`] does, and comes back by itself for what one turn left.
    ///
    /// # Errors
    /// As [`Ring::serve`].
    pub fn serve(
        &mut self,
        index: u16,
        notify: Notify,
        device: impl FnMut(&Chain) -> Result<u32, Error>,
    ) -> Result<(), Error> {
        self.serve_until_held(index, notify, device).map(drop)
    }

    /// As [`Io::serve`], for a device that may hold a chain: then it has to come back by itself.
    ///
    /// # Errors
    /// As [`Ring::serve`].
    pub fn serve_until_held(
        &mut self,
        index: u16,
        notify: Notify,
        device: impl FnMut(&Chain) -> Result<u32, Error>,
    ) -> Result<Served, Error> {
        let interrupt = self.interrupt;
        let Some(ring) = self.ring(index) else { return Ok(Served::All) };
        let served = ring.serve(interrupt, notify, device)?;
        if served == Served::More {
            self.serve_again(index);
        }
        Ok(served)
    }

    /// Has [`VirtioDevice::on_queue`] called for `index` again after other devices had a turn.
    pub fn serve_again(&mut self, index: u16) {
        if !self.again.contains(&index) {
            self.again.push(index);
        }
    }

    /// Watches a back-end file; readiness arrives at [`VirtioDevice::on_event`] with `token` (below 2^16).
    ///
    /// # Errors
    /// [`Error::Device`] with the host's reason.
    pub fn watch(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), Error> {
        self.watch.add(fd, token, events).map_err(Error::device("watch a back-end file"))
    }

    /// Changes what a watched file is watched for.
    ///
    /// # Errors
    /// [`Error::Device`] with the host's reason.
    pub fn rewatch(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), Error> {
        self.watch.modify(fd, token, events).map_err(Error::device("change the watch of a back-end file"))
    }

    /// Stops watching a file. Do this before closing it.
    ///
    /// # Errors
    /// [`Error::Device`] with the host's reason.
    pub fn unwatch(&mut self, fd: RawFd) -> Result<(), Error> {
        self.watch.remove(fd).map_err(Error::device("stop watching a back-end file"))
    }
}
