//! Functions taken from a bus as plain data, and put on another one.

use mvm_devices::bounded;
use mvm_devices::transport::{State, TransportError};
use serde::{Deserialize, Serialize};

use super::{Bar, Bells, Decoded, Function, Map, PciBus, Plugged, PoisonError, Slot, layout};
use crate::error::{Error, Result};
use crate::snapshot::Error as Saved;
use mvm_devices::pci::PciFunction;

/// Most BARs of a function.
const BARS: usize = 6;

/// A virtio function at rest, and its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedFunction {
    /// Its number on the bus.
    pub place: u8,
    /// What it is, by name.
    pub kind: String,
    /// Where the machine had put its BARs: index and address. The guest may have moved them since.
    #[serde(deserialize_with = "bounded::list::<_, _, BARS>")]
    pub placed: Vec<(u8, u64)>,
    /// All else.
    pub state: State,
}

impl PciBus {
    /// Every virtio function, by place. All must be held.
    ///
    /// # Errors
    /// One is not at rest, or busy.
    pub(crate) fn save(&self) -> Result<Vec<SavedFunction>, String> {
        let mut saved = Vec::new();
        let mut failed = None;
        let busy = self.for_each_virtio(|place, virtio| match virtio.function.save() {
            Ok(state) => saved.push(SavedFunction {
                place: u8::try_from(place).unwrap_or(u8::MAX),
                kind: virtio.function.kind().name.to_owned(),
                placed: self.map.read().unwrap_or_else(PoisonError::into_inner).placed_of(place),
                state,
            }),
            Err(error) => failed = Some((virtio.function.kind().name, error)),
        });
        match failed {
            Some((name, error)) => Err(format!("cannot save {name}: {error}")),
            None if busy > 0 => Err("a device is busy".to_owned()),
            None => Ok(saved),
        }
    }

    /// Puts `virtio` where `saved` was, in its state. It stays held: [`PciBus::resume`] lets it go on.
    ///
    /// # Errors
    /// It is of another kind, or the state is impossible.
    pub(crate) fn put_back(&self, saved: &SavedFunction, mut virtio: Plugged) -> Result<()> {
        let place = usize::from(saved.place);
        let kind = virtio.function.kind().name;
        if saved.kind != kind {
            let (place, saved) = (saved.place, saved.kind.clone());
            return Err(Saved::DeviceKind { place, saved, configured: kind }.into());
        }
        let restored = virtio.function.restore(&saved.state);
        restored.map_err(|source: TransportError| Saved::Device { place: saved.place, kind, source })?;
        let slot = self.slots.get(place).ok_or(Saved::Nonsense("a device is on no place of the bus"))?;
        {
            let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
            map.take_again(place, &saved.placed, &virtio.function.bar_sizes())?;
            let bars = virtio.function.bars();
            map.decoded.extend(bars.into_iter().map(|bar| Decoded { device: place, bar }));
        }
        let bells = Bells::new(virtio.function.doorbells());
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        self.ecam.show(place, 0, virtio.function.config());
        *slot = Some(Slot { function: Function::Virtio(Box::new(virtio)), bells });
        Ok(())
    }

    /// Lets every function go on that was put back. Guests may run already: until then their kicks wait.
    pub(crate) fn resume(&self) -> Result<()> {
        for place in &self.slots {
            let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Slot { function: Function::Virtio(virtio), .. }) = place.as_mut() {
                virtio.function.resume().map_err(|source| Error::Device(Box::new(source)))?;
            }
        }
        Ok(())
    }
}

impl Map {
    fn placed_of(&self, device: usize) -> Vec<(u8, u64)> {
        let own = self.placed.iter().filter(|placed| placed.device == device);
        own.map(|placed| (placed.bar.index, placed.bar.address)).collect()
    }

    /// Takes the place that a function of these BARs had.
    fn take_again(&mut self, device: usize, placed: &[(u8, u64)], sizes: &[(u8, u64)]) -> Result<(), Saved> {
        let taken =
            self.taken.get_mut(device).ok_or(Saved::Nonsense("a device is on no place of the bus"))?;
        if std::mem::replace(taken, true) {
            return Err(Saved::Nonsense("two devices are on one place of the bus"));
        }
        if placed.len() != sizes.len() {
            return Err(Saved::Nonsense("a device has more or fewer BARs than its kind"));
        }
        for (&(index, address), &(own, size)) in placed.iter().zip(sizes) {
            let window = layout::BAR_WINDOW..layout::BAR_WINDOW + layout::BAR_WINDOW_SIZE;
            let inside = window.contains(&address) && window.end - address >= size;
            if index != own || !inside {
                return Err(Saved::Nonsense("a device's BAR is not in the window"));
            }
            self.placed.push(Decoded { device, bar: Bar { index, address, size } });
        }
        Ok(())
    }
}
