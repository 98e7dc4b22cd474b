//! PCI bus 0: configuration space by ECAM, BARs in one window, doorbells by ioeventfd.
//!
//! A slot is a fixed place of the bus, empty or with one function; functions come and go while the guest runs.
//!
//! Locks: a slot's mutex serialises the calls of its function and what comes into the slot or leaves it. vCPUs
//! wait for it; the main thread does so while the machine is built and afterwards for a moment only, because a
//! vCPU that resets a function holds it for as long as the host keeps the function's last request. The map is
//! taken under a slot's mutex when a BAR moves or a function leaves, and alone, briefly, to route an access or
//! to find a free place. No other order exists, and nobody holds two slots.
//!
//! An access that was routed just before its function left reaches an empty slot, or the next function in it:
//! a guest that races with itself gets one or the other.

pub(crate) mod saved;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use mvm_devices::io_loop::IoLoop;
use mvm_devices::pci::host_bridge::HostBridge;
use mvm_devices::pci::{Bar, CONFIG_SPACE_SIZE, ConfigChange, PciFunction};
use mvm_devices::transport::VirtioPci;

use crate::doorbell::{Bells, Doorbells};
use crate::ecam::Ecam;
use crate::error::{Error, Result};
use crate::layout;

/// Devices of a bus; each has function 0 only.
pub(crate) const MAX_DEVICES: usize = 32;
/// Bytes of configuration space of a device, all functions.
const DEVICE_STRIDE: u64 = 8 * layout::PAGE_SIZE;

/// How long the main thread waits for a slot that a vCPU uses.
const SLOT_TIME: Duration = Duration::from_millis(100);
/// How often it looks meanwhile.
const SLOT_INTERVAL: Duration = Duration::from_millis(1);

/// The bus and what is on it.
pub(crate) struct PciBus {
    doorbells: Arc<dyn Doorbells>,
    ecam: Ecam,
    slots: [Mutex<Option<Slot>>; MAX_DEVICES],
    map: RwLock<Map>,
}

/// What can be on the bus.
enum Function {
    Bridge(HostBridge),
    Virtio(Box<Plugged>),
}

/// A virtio function, and what lives as long as it.
pub(crate) struct Plugged {
    /// The function. Comes first: dropped, it takes its device out of the loop.
    pub function: VirtioPci,
    /// The loop of a device that has one of its own.
    pub _io_loop: Option<IoLoop>,
    /// A disk's serial number; empty for anything else.
    pub serial: String,
}

/// Why a function is not taken off the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stays {
    /// There is none, or it is not a virtio device.
    #[error("there is no such device")]
    Absent,
    /// The guest's driver has it running.
    #[error("the guest uses it: have the guest remove it first, or force it")]
    InUse,
    /// A vCPU waits in it.
    #[error("it is busy: the host has not completed its last request")]
    Busy,
}

impl Function {
    fn get(&mut self) -> &mut dyn PciFunction {
        match self {
            Function::Bridge(bridge) => bridge,
            Function::Virtio(virtio) => &mut virtio.function,
        }
    }
}

/// A function on the bus.
struct Slot {
    function: Function,
    bells: Bells,
}

/// Which places are taken: slots on the bus, and addresses in the window.
#[derive(Debug, Default)]
struct Map {
    /// By device number.
    taken: [bool; MAX_DEVICES],
    /// Where the machine put BARs first. The guest may have moved them.
    placed: Vec<Decoded>,
    /// BARs that answer now.
    decoded: Vec<Decoded>,
}

/// A BAR and whose it is.
#[derive(Clone, Copy, Debug)]
struct Decoded {
    device: usize,
    bar: Bar,
}

impl PciBus {
    /// An empty bus.
    pub(crate) fn new(doorbells: Arc<dyn Doorbells>, ecam: Ecam) -> Self {
        let slots = std::array::from_fn(|_| Mutex::new(None));
        Self { doorbells, ecam, slots, map: RwLock::default() }
    }

    /// The configuration space it shows.
    pub(crate) fn ecam(&self) -> &Ecam {
        &self.ecam
    }

    /// Puts a host bridge into the first free slot: device 0, where kernels look for it.
    pub(crate) fn add_bridge(&self, bridge: HostBridge) -> Result<usize> {
        self.add(Function::Bridge(bridge))
    }

    /// Puts a virtio device into the first free slot and assigns its BARs. Returns its number.
    pub(crate) fn add_virtio(&self, virtio: Plugged) -> Result<usize> {
        self.add(Function::Virtio(Box::new(virtio)))
    }

    /// Takes a virtio device off the bus: from now on its slot is empty. What it leaves is given to the caller,
    /// for whom dropping it may take long: its I/O loop first completes what it is doing.
    ///
    /// # Errors
    /// [`Stays`]; `force` takes a device that the guest uses.
    pub(crate) fn remove_virtio(&self, device: usize, force: bool) -> Result<Box<Plugged>, Stays> {
        let place = self.slots.get(device).ok_or(Stays::Absent)?;
        let mut place = lock_soon(place).ok_or(Stays::Busy)?;
        match place.as_ref().map(|slot| &slot.function) {
            Some(Function::Virtio(virtio)) if force || !virtio.function.driver_ready() => {}
            Some(Function::Virtio(_)) => return Err(Stays::InUse),
            Some(Function::Bridge(_)) | None => return Err(Stays::Absent),
        }
        let Some(Slot { function: Function::Virtio(virtio), bells }) = place.take() else {
            return Err(Stays::Absent);
        };
        self.ecam.show(device, 0, &[0xff; CONFIG_SPACE_SIZE]);
        bells.forget(&*self.doorbells);
        self.map.write().unwrap_or_else(PoisonError::into_inner).forget(device);
        Ok(virtio)
    }

    /// Calls `action` for every virtio device in order, with its number. vCPUs wait meanwhile if they access it.
    /// Returns how many were left out because a vCPU waits in them.
    pub(crate) fn for_each_virtio(&self, mut action: impl FnMut(usize, &mut Plugged)) -> usize {
        let mut busy = 0;
        for (device, place) in self.slots.iter().enumerate() {
            match lock_soon(place) {
                Some(mut place) => {
                    if let Some(Slot { function: Function::Virtio(virtio), .. }) = place.as_mut() {
                        action(device, virtio);
                    }
                }
                None => busy += 1,
            }
        }
        busy
    }

    fn add(&self, mut function: Function) -> Result<usize> {
        let sizes = function.get().bar_sizes();
        let (device, bars) = self.map.write().unwrap_or_else(PoisonError::into_inner).take_place(&sizes)?;
        for bar in bars {
            function.get().assign_bar(bar.index, bar.address);
        }
        let bells = Bells::new(function.get().doorbells());
        if let Some(place) = self.slots.get(device) {
            let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
            self.ecam.show(device, 0, function.get().config());
            *place = Some(Slot { function, bells });
        }
        Ok(device)
    }

    /// Reads `data` at guest address `address`; bytes nobody answers for stay as they are.
    /// Tells whether a function answered.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some(offset) = config_offset(address) {
            return self.ecam.read(offset, data);
        }
        let Some((decoded, offset)) = self.find(address, data.len()) else { return false };
        self.with_slot(decoded.device, |slot| slot.function.get().read_bar(decoded.bar.index, offset, data))
    }

    /// Writes `data` at guest address `address`. Tells whether a function answered.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> bool {
        if let Some(offset) = config_offset(address) {
            return self.write_config(offset, data);
        }
        let Some((decoded, offset)) = self.find(address, data.len()) else { return false };
        self.with_slot(decoded.device, |slot| {
            slot.function.get().write_bar(decoded.bar.index, offset, data);
            slot.bells.written(decoded.bar.index, offset, address, &*self.doorbells);
        })
    }

    /// A write of configuration space.
    fn write_config(&self, offset: u64, data: &[u8]) -> bool {
        let (device, register) = (offset / DEVICE_STRIDE, offset % DEVICE_STRIDE);
        let (Ok(device), Ok(register)) = (usize::try_from(device), usize::try_from(register)) else {
            return false;
        };
        let aligned = matches!(data.len(), 1 | 2 | 4) && register % data.len() == 0;
        if !aligned || register >= CONFIG_SPACE_SIZE {
            return false;
        }
        self.with_slot(device, |slot| {
            let change = slot.function.get().write_config(register, data);
            self.ecam.show(device, 0, slot.function.get().config());
            if change == ConfigChange::Decoding {
                self.decode_again(device, slot);
            }
        })
    }

    /// Replaces what the bus knows of a function's BARs and doorbells.
    fn decode_again(&self, device: usize, slot: &mut Slot) {
        let bars = slot.function.get().bars();
        {
            let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
            map.decoded.retain(|decoded| decoded.device != device);
            map.decoded.extend(bars.iter().map(|&bar| Decoded { device, bar }));
        }
        slot.bells.moved(&bars, &*self.doorbells);
    }

    /// The BAR that holds all `length` bytes at `address`, and the offset in it.
    fn find(&self, address: u64, length: usize) -> Option<(Decoded, u64)> {
        let end = address.checked_add(length as u64)?;
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.decoded.iter().find_map(|decoded| {
            let offset = address.checked_sub(decoded.bar.address)?;
            let inside = end <= decoded.bar.address.checked_add(decoded.bar.size)?;
            inside.then_some((*decoded, offset))
        })
    }

    /// Tells whether there is a function.
    fn with_slot(&self, device: usize, action: impl FnOnce(&mut Slot)) -> bool {
        let Some(place) = self.slots.get(device) else { return false };
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        place.as_mut().map(action).is_some()
    }
}

impl Map {
    /// Takes the first free slot, and a naturally aligned place in the window for each BAR of `sizes`.
    fn take_place(&mut self, sizes: &[(u8, u64)]) -> Result<(usize, Vec<Bar>)> {
        let device = self.taken.iter().position(|taken| !taken).ok_or(Error::BusFull(MAX_DEVICES))?;
        let before = self.placed.len();
        for &(index, size) in sizes {
            let Some(address) = self.hole(size) else {
                self.placed.truncate(before);
                return Err(Error::WindowFull(size));
            };
            self.placed.push(Decoded { device, bar: Bar { index, address, size } });
        }
        if let Some(taken) = self.taken.get_mut(device) {
            *taken = true;
        }
        Ok((device, self.placed.iter().skip(before).map(|placed| placed.bar).collect()))
    }

    /// The first address where `size` bytes meet no BAR, neither where the machine put it nor where it is now.
    fn hole(&self, size: u64) -> Option<u64> {
        let size = size.max(layout::PAGE_SIZE);
        let mut address = layout::BAR_WINDOW;
        loop {
            address = address.checked_next_multiple_of(size)?;
            let end = address.checked_add(size)?;
            if end > layout::BAR_WINDOW + layout::BAR_WINDOW_SIZE {
                return None;
            }
            let meets = self.placed.iter().chain(&self.decoded).map(|decoded| decoded.bar).find(|bar| {
                bar.address < end && bar.address.saturating_add(bar.size.max(layout::PAGE_SIZE)) > address
            });
            match meets {
                Some(bar) => address = bar.address.checked_add(bar.size.max(layout::PAGE_SIZE))?,
                None => return Some(address),
            }
        }
    }

    /// Frees what `device` had.
    fn forget(&mut self, device: usize) {
        self.placed.retain(|placed| placed.device != device);
        self.decoded.retain(|decoded| decoded.device != device);
        if let Some(taken) = self.taken.get_mut(device) {
            *taken = false;
        }
    }
}

/// The slot at `place`, if it comes free within [`SLOT_TIME`].
fn lock_soon(place: &Mutex<Option<Slot>>) -> Option<MutexGuard<'_, Option<Slot>>> {
    let end = Instant::now() + SLOT_TIME;
    loop {
        match place.try_lock() {
            Ok(slot) => return Some(slot),
            Err(TryLockError::Poisoned(slot)) => return Some(slot.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() < end => std::thread::sleep(SLOT_INTERVAL),
            Err(TryLockError::WouldBlock) => return None,
        }
    }
}

/// Offset of `address` in configuration space.
fn config_offset(address: u64) -> Option<u64> {
    address.checked_sub(layout::ECAM).filter(|&offset| offset < layout::ECAM_SIZE)
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciBus").field("map", &self.map).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
