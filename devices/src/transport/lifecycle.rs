//! Who has the device: the transport before `DRIVER_OK`, the I/O loop after it, the transport again on
//! reset and while the machine is paused.

use std::sync::Arc;

use super::registers::{EVENT_IDX, INDIRECT_DESC, QueueRegisters};
use super::status::{DRIVER_OK, FEATURES_OK};
use super::{TransportError, VirtioPci};
use crate::device::VirtioDevice;
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::io_loop::TaskId;
use crate::ring::{Ring, RingOptions, RingState};
use crate::task::{DeviceTask, TaskParts};

/// Where the device is.
pub(super) enum Phase {
    /// Here: the driver has not said that it is ready, or the device could not be started.
    Negotiating { device: Box<dyn VirtioDevice> },
    /// In its loop.
    Running { id: TaskId },
    /// Taken out of its loop for a while, rings and all.
    Paused { task: Box<DeviceTask> },
    /// Gone with a loop that ended. Registers still answer.
    Lost,
}

impl std::fmt::Debug for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Negotiating { .. } => "Negotiating",
            Self::Running { .. } => "Running",
            Self::Paused { .. } => "Paused",
            Self::Lost => "Lost",
        })
    }
}

impl VirtioPci {
    /// The driver set `FEATURES_OK`: the bit stays only if the device can work with what was accepted.
    pub(super) fn finish_negotiation(&mut self) {
        let accepted = self.registers.values().accepted;
        if let Phase::Negotiating { device } = &self.phase
            && self.registers.acceptable()
            && device.accepts(accepted)
        {
            self.registers.add_status(FEATURES_OK);
        }
    }

    /// The driver set `DRIVER_OK`: builds the rings and moves everything into the loop. Rings that cannot
    /// be used leave the device here, asking for a reset.
    pub(super) fn activate(&mut self) {
        self.registers.add_status(DRIVER_OK);
        self.events.driver_ready();
        let rings = self.rings(|_, queue| queue.ring);
        match (std::mem::replace(&mut self.phase, Phase::Lost), rings) {
            (Phase::Negotiating { device }, Ok(rings)) => {
                let task = self.task(device, rings);
                if let Err(error) = self.attach(task) {
                    log::error!("{}: {error}", self.kind.name);
                    self.events.needs_reset();
                }
            }
            (phase, rings) => {
                if let Err(error) = rings {
                    log::warn!("{} was not started: {error}", self.kind.name);
                }
                self.phase = phase;
                self.events.needs_reset();
            }
        }
    }

    /// The driver wrote 0 to the status: the device comes back, and nothing is raised or written any more.
    pub(super) fn reset(&mut self) {
        self.counters.resets.one();
        self.phase = match std::mem::replace(&mut self.phase, Phase::Lost) {
            Phase::Running { id } => match self.io_loop.detach(id) {
                Ok(task) => Phase::Negotiating { device: task.into_device() },
                Err(error) => {
                    log::error!("{} is lost with its I/O loop: {error}", self.kind.name);
                    Phase::Lost
                }
            },
            Phase::Paused { task } => Phase::Negotiating { device: task.into_device() },
            phase @ (Phase::Negotiating { .. } | Phase::Lost) => phase,
        };
        self.events.reset();
        self.registers.reset();
        for kick in &self.kicks {
            // A kick of the past must not reach the next driver; none waiting is no failure.
            let _ = kick.read();
        }
    }

    /// Takes a running device out of its loop: from here on it touches neither memory nor back end.
    /// A device that is not running stays as it is.
    ///
    /// # Errors
    /// [`TransportError::Loop`].
    pub fn pause(&mut self) -> Result<(), TransportError> {
        if let Phase::Running { id } = self.phase {
            // Lost, should the loop have ended.
            self.phase = Phase::Lost;
            let task = Box::new(self.io_loop.detach(id).map_err(TransportError::Loop)?);
            self.phase = Phase::Paused { task };
        }
        Ok(())
    }

    /// Puts a paused device back into its loop, where it looks at every queue once.
    ///
    /// # Errors
    /// [`TransportError::Loop`].
    pub fn resume(&mut self) -> Result<(), TransportError> {
        match std::mem::replace(&mut self.phase, Phase::Lost) {
            Phase::Paused { task } => self.attach(*task),
            phase => {
                self.phase = phase;
                Ok(())
            }
        }
    }

    /// A task from a device at rest.
    pub(super) fn task(&self, device: Box<dyn VirtioDevice>, rings: Vec<Option<Ring>>) -> DeviceTask {
        DeviceTask::new(TaskParts {
            device,
            features: self.registers.values().accepted,
            rings,
            kicks: self.kicks.clone(),
            interrupt: self.events.clone(),
            memory: Arc::clone(&self.memory),
        })
    }

    /// A ring for each enabled queue, placed where `place` says.
    pub(super) fn rings(
        &self,
        place: impl Fn(u16, &QueueRegisters) -> RingState,
    ) -> Result<Vec<Option<Ring>>, Error> {
        let values = self.registers.values();
        let queues = (0u16..).zip(&values.queues);
        queues
            .map(|(index, queue)| {
                let options = RingOptions {
                    index,
                    max_size: queue.max,
                    event_idx: values.accepted & EVENT_IDX != 0,
                    indirect: values.accepted & INDIRECT_DESC != 0,
                };
                let counters = self.counters.rings.clone();
                let ring = || Ring::new(place(index, queue), options, Arc::clone(&self.memory), counters);
                queue.enabled.then(ring).transpose()
            })
            .collect()
    }

    fn attach(&mut self, task: DeviceTask) -> Result<(), TransportError> {
        let id = self.io_loop.attach(task).map_err(TransportError::Loop)?;
        self.phase = Phase::Running { id };
        Ok(())
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        // The loop may go on for other devices; this one's files must not.
        if let Phase::Running { id } = self.phase {
            let _ = self.io_loop.detach(id);
        }
    }
}
