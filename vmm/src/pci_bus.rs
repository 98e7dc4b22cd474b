//! PCI bus 0: configuration space by ECAM, BARs in one window, doorbells by ioeventfd.
//!
//! Locks: a slot's mutex serialises the calls of its function and is taken by vCPUs only; the decode table is
//! taken under it when a BAR moves, and alone, briefly, to route an access. No other order exists.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use mvm_devices::pci::host_bridge::HostBridge;
use mvm_devices::pci::{Bar, ConfigChange, Doorbell, PciFunction};
use mvm_devices::transport::VirtioPci;

use crate::doorbell::Doorbells;
use crate::ecam::Ecam;
use crate::error::{Error, Result};
use crate::layout;

/// Devices of a bus; each has function 0 only.
pub(crate) const MAX_DEVICES: usize = 32;
/// Bytes of configuration space of a device, all functions.
const DEVICE_STRIDE: u64 = 8 * layout::PAGE_SIZE;

/// The bus and what is on it.
pub(crate) struct PciBus {
    doorbells: Arc<dyn Doorbells>,
    ecam: Ecam,
    slots: Vec<Mutex<Slot>>,
    decode: RwLock<Vec<Decoded>>,
    window_next: u64,
}

/// What can be on the bus.
enum Function {
    Bridge(HostBridge),
    Virtio(Box<VirtioPci>),
}

impl Function {
    fn get(&mut self) -> &mut dyn PciFunction {
        match self {
            Function::Bridge(bridge) => bridge,
            Function::Virtio(virtio) => virtio.as_mut(),
        }
    }
}

/// A function on the bus.
struct Slot {
    function: Function,
    doorbells: Vec<Doorbell>,
    /// Doorbells KVM watches now: (address, index in `doorbells`).
    watched: Vec<(u64, usize)>,
}

/// A BAR that answers now.
#[derive(Clone, Copy, Debug)]
struct Decoded {
    device: usize,
    bar: Bar,
}

impl PciBus {
    /// An empty bus.
    pub(crate) fn new(doorbells: Arc<dyn Doorbells>, ecam: Ecam) -> Self {
        Self {
            doorbells,
            ecam,
            slots: Vec::new(),
            decode: RwLock::new(Vec::new()),
            window_next: layout::BAR_WINDOW,
        }
    }

    /// The configuration space it shows.
    pub(crate) fn ecam(&self) -> &Ecam {
        &self.ecam
    }

    /// Puts a host bridge into the next free slot: the first, where kernels look for it.
    pub(crate) fn add_bridge(&mut self, bridge: HostBridge) -> Result<()> {
        self.add(Function::Bridge(bridge))
    }

    /// Puts a virtio device into the next free slot and assigns its BARs.
    pub(crate) fn add_virtio(&mut self, virtio: VirtioPci) -> Result<()> {
        self.add(Function::Virtio(Box::new(virtio)))
    }

    /// Calls `action` for every virtio device in order. vCPUs wait meanwhile if they access it.
    pub(crate) fn for_each_virtio(&self, mut action: impl FnMut(&mut VirtioPci)) {
        for slot in &self.slots {
            if let Function::Virtio(virtio) =
                &mut slot.lock().unwrap_or_else(PoisonError::into_inner).function
            {
                action(virtio);
            }
        }
    }

    fn add(&mut self, mut function: Function) -> Result<()> {
        let device = self.slots.len();
        if device >= MAX_DEVICES {
            return Err(Error::BusFull(MAX_DEVICES));
        }
        for (index, size) in function.get().bar_sizes() {
            let address = self.place(size).ok_or(Error::WindowFull(size))?;
            function.get().assign_bar(index, address);
        }
        self.ecam.show(device, 0, function.get().config());
        let doorbells = function.get().doorbells();
        self.slots.push(Mutex::new(Slot { function, doorbells, watched: Vec::new() }));
        Ok(())
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
        self.with_slot(decoded.device, |slot| slot.function.get().write_bar(decoded.bar.index, offset, data))
    }

    /// A write of configuration space.
    fn write_config(&self, offset: u64, data: &[u8]) -> bool {
        let (device, register) = (offset / DEVICE_STRIDE, offset % DEVICE_STRIDE);
        let (Ok(device), Ok(register)) = (usize::try_from(device), usize::try_from(register)) else {
            return false;
        };
        let aligned = matches!(data.len(), 1 | 2 | 4) && register % data.len() == 0;
        if !aligned || register >= mvm_devices::pci::CONFIG_SPACE_SIZE {
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
            let mut decode = self.decode.write().unwrap_or_else(PoisonError::into_inner);
            decode.retain(|decoded| decoded.device != device);
            decode.extend(bars.iter().map(|&bar| Decoded { device, bar }));
        }
        let wanted: Vec<_> = slot
            .doorbells
            .iter()
            .enumerate()
            .filter_map(|(index, doorbell)| {
                let bar = bars.iter().find(|bar| bar.index == doorbell.bar)?;
                Some((bar.address.checked_add(doorbell.offset)?, index))
            })
            .collect();
        for entry in slot.watched.iter().filter(|entry| !wanted.contains(entry)) {
            self.unwatch(*entry, &slot.doorbells);
        }
        slot.watched = wanted
            .into_iter()
            .filter(|entry| slot.watched.contains(entry) || self.watch(*entry, &slot.doorbells))
            .collect();
    }

    /// Lets KVM signal a doorbell. If it cannot, writes reach the function by an exit instead.
    fn watch(&self, (address, index): (u64, usize), doorbells: &[Doorbell]) -> bool {
        let Some(doorbell) = doorbells.get(index) else { return false };
        match self.doorbells.watch(address, &doorbell.event) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("the doorbell at {address:#x} costs an exit: {error}");
                false
            }
        }
    }

    fn unwatch(&self, (address, index): (u64, usize), doorbells: &[Doorbell]) {
        let Some(doorbell) = doorbells.get(index) else { return };
        if let Err(error) = self.doorbells.unwatch(address, &doorbell.event) {
            log::warn!("the doorbell at {address:#x} cannot be moved: {error}");
        }
    }

    /// The BAR that holds all `length` bytes at `address`, and the offset in it.
    fn find(&self, address: u64, length: usize) -> Option<(Decoded, u64)> {
        let end = address.checked_add(length as u64)?;
        let decode = self.decode.read().unwrap_or_else(PoisonError::into_inner);
        decode.iter().find_map(|decoded| {
            let offset = address.checked_sub(decoded.bar.address)?;
            let inside = end <= decoded.bar.address.checked_add(decoded.bar.size)?;
            inside.then_some((*decoded, offset))
        })
    }

    fn with_slot(&self, device: usize, action: impl FnOnce(&mut Slot)) -> bool {
        let Some(slot) = self.slots.get(device) else { return false };
        action(&mut slot.lock().unwrap_or_else(PoisonError::into_inner));
        true
    }

    /// The next naturally aligned place for a BAR.
    fn place(&mut self, size: u64) -> Option<u64> {
        let size = size.max(layout::PAGE_SIZE);
        let address = self.window_next.checked_next_multiple_of(size)?;
        let end = address.checked_add(size)?;
        if end > layout::BAR_WINDOW + layout::BAR_WINDOW_SIZE {
            return None;
        }
        self.window_next = end;
        Some(address)
    }
}

/// Offset of `address` in configuration space.
fn config_offset(address: u64) -> Option<u64> {
    address.checked_sub(layout::ECAM).filter(|&offset| offset < layout::ECAM_SIZE)
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciBus").field("functions", &self.slots.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
