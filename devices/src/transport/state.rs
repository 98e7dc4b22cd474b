//! Saving and restoring a function, the same way for every device.

use serde::{Deserialize, Serialize};

use super::interrupt::NO_VECTOR;
use super::layout::MAX_QUEUES;
use super::lifecycle::Phase;
use super::registers::{QueueRegisters, Values};
use super::status::{DRIVER_OK, FEATURES_OK};
use super::{TransportError, VirtioPci};
use crate::bounded;
use crate::pci::config::HeaderState;
use crate::pci::msix::MsixState;
use crate::ring::{Ring, RingState};
use crate::virtio::DeviceState;

/// A function at rest: everything that its device, its driver and the machine cannot tell again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    header: HeaderState,
    msix: MsixState,
    registers: Values,
    /// The configuration generation that the driver read last.
    generation: u8,
    config_vector: u16,
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_QUEUES>")]
    queue_vectors: Vec<u16>,
    isr: u8,
    needs_reset: bool,
    /// Bytes of the device's configuration space.
    config: Vec<u8>,
    /// Where each ring stood, if the device ran and can go on: `None` for queues left disabled.
    #[serde(deserialize_with = "bounded::optional_list::<_, _, MAX_QUEUES>")]
    rings: Option<Vec<Option<RingState>>>,
    device: DeviceState,
}

impl State {
    /// What its device said of itself.
    pub fn device(&self) -> &DeviceState {
        &self.device
    }
}

impl VirtioPci {
    /// The function as it is now. It must be paused, or not yet started.
    ///
    /// # Errors
    /// [`TransportError::NotAtRest`].
    pub fn save(&self) -> Result<State, TransportError> {
        let (rings, device) = match &self.phase {
            Phase::Negotiating { device } => (None, device.state()),
            Phase::Paused { task } => {
                let rings = (!self.needs_reset()).then(|| task.ring_states());
                (rings, task.device().state())
            }
            Phase::Running { .. } | Phase::Lost => {
                return Err(TransportError::NotAtRest { operation: "saving" });
            }
        };
        let queues = 0u16..u16::try_from(self.kicks.len()).unwrap_or(u16::MAX);
        let mut config = vec![0; self.config.as_ref().map_or(0, |config| config.len())];
        if let Some(space) = &self.config {
            space.read(0, &mut config);
        }
        Ok(State {
            header: self.header.state(),
            msix: self.msix.state(),
            registers: self.registers.values().clone(),
            generation: self.registers.generation(),
            config_vector: self.events.config_vector(),
            queue_vectors: queues.map(|queue| self.events.queue_vector(queue)).collect(),
            isr: self.events.isr(),
            needs_reset: self.events.reset_wanted(),
            config,
            rings,
            device,
        })
    }

    /// Takes over `state` on a function whose driver has not started. It is then paused if it had been
    /// running, and [`VirtioPci::resume`] lets it go on. The machine places the BARs as
    /// [`bars`](crate::pci::PciFunction::bars) then says.
    ///
    /// The device's configuration space holds the saved bytes when its own
    /// [`VirtioDevice::restore`](crate::device::VirtioDevice::restore) is called.
    ///
    /// # Errors
    /// [`TransportError`]: the state is not of such a device or says something impossible. The function is
    /// of no use then.
    pub fn restore(&mut self, state: &State) -> Result<(), TransportError> {
        let Phase::Negotiating { mut device } = std::mem::replace(&mut self.phase, Phase::Lost) else {
            return Err(TransportError::NotAtRest { operation: "restoring" });
        };
        self.restore_registers(state)?;
        let Values { status, accepted, .. } = state.registers;
        if status & FEATURES_OK != 0 && !device.accepts(accepted) {
            return Err(TransportError::State("features"));
        }
        device.restore(&state.device).map_err(TransportError::Restore)?;
        self.phase = match &state.rings {
            // One that waited for a reset goes on waiting.
            _ if state.needs_reset => Phase::Negotiating { device },
            Some(places) => {
                let rings = self.restored_rings(places)?;
                Phase::Paused { task: Box::new(self.task(device, rings)) }
            }
            None if self.driver_ready() => return Err(TransportError::State("rings")),
            None => Phase::Negotiating { device },
        };
        Ok(())
    }

    fn restore_registers(&mut self, state: &State) -> Result<(), TransportError> {
        let refuse = |what| Err(TransportError::State(what));
        if !self.registers.restore(&state.registers, state.generation) {
            return refuse("registers");
        }
        if !self.msix.restore(&state.msix) || state.queue_vectors.len() != self.kicks.len() {
            return refuse("number of vectors");
        }
        match &self.config {
            Some(space) if space.len() == state.config.len() => space.update(|bytes| {
                for (byte, value) in bytes.iter_mut().zip(&state.config) {
                    *byte = *value;
                }
            }),
            None if state.config.is_empty() => {}
            _ => return refuse("size of the configuration space"),
        }
        self.events.set_config_vector(state.config_vector);
        for queue in 0u16..u16::try_from(self.kicks.len()).unwrap_or(u16::MAX) {
            let vector = state.queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR);
            self.events.set_queue_vector(queue, vector);
        }
        self.events.set_isr(state.isr);
        if state.needs_reset {
            self.events.set_reset_wanted();
        }
        if state.registers.status & DRIVER_OK != 0 {
            self.events.driver_ready();
        }
        self.header.restore(&state.header);
        self.msix.set_control(self.message_control());
        Ok(())
    }

    fn restored_rings(&self, places: &[Option<RingState>]) -> Result<Vec<Option<Ring>>, TransportError> {
        let queues = &self.registers.values().queues;
        let fits = places.len() == queues.len()
            && places.iter().zip(queues).all(|(place, queue)| place.is_some() == queue.enabled);
        if !fits || !self.driver_ready() {
            return Err(TransportError::State("rings"));
        }
        let place = |index: u16, queue: &QueueRegisters| {
            let stood = places.get(usize::from(index)).copied().flatten().unwrap_or_default();
            RingState { next_available: stood.next_available, next_used: stood.next_used, ..queue.ring }
        };
        self.rings(place).map_err(TransportError::Restore)
    }
}
