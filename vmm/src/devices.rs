//! The configured virtio devices: built, given an I/O loop, put on the bus.

use std::sync::Arc;

use mvm_devices::io_loop::{IoLoop, LoopHandle};
use mvm_devices::transport::{Parts, VirtioPci};
use mvm_devices::virtio::{DeviceSpec, Spec};

use crate::error::{Error, Result};
use crate::fds::Slots;
use crate::kvm::Vm;
use crate::msi::KvmMsi;
use crate::pci_bus::PciBus;

/// The threads that serve devices.
#[derive(Debug, Default)]
pub(crate) struct IoLoops {
    /// Serves every device that is quick; exists once there is one.
    shared: Option<IoLoop>,
    /// One for each device that may be slow.
    own: Vec<IoLoop>,
}

impl IoLoops {
    fn shared(&mut self) -> Result<LoopHandle> {
        let io_loop = match self.shared.take() {
            Some(io_loop) => io_loop,
            None => IoLoop::spawn("io").map_err(Error::system("start the I/O loop"))?,
        };
        Ok(self.shared.insert(io_loop).handle())
    }

    fn own(&mut self, name: &str) -> Result<LoopHandle> {
        let io_loop = IoLoop::spawn(name).map_err(Error::system("start an I/O loop"))?;
        let handle = io_loop.handle();
        self.own.push(io_loop);
        Ok(handle)
    }
}

/// Builds each device of `specs` and puts it on `bus`, in order.
pub(crate) fn attach(specs: &[DeviceSpec], slots: &mut Slots, vm: &Vm, bus: &mut PciBus) -> Result<IoLoops> {
    let mut loops = IoLoops::default();
    for (index, spec) in specs.iter().enumerate() {
        let device = spec.build(slots).map_err(|source| Error::Device { index, source: Box::new(source) })?;
        let name = device.kind().name;
        let io_loop = if device.wants_own_loop() {
            loops.own(&format!("io-{name}{index}"))?
        } else {
            loops.shared()?
        };
        // One vector per queue and one for configuration changes.
        let vectors = u16::try_from(device.queues().len()).unwrap_or(u16::MAX).saturating_add(1);
        let parts = Parts {
            memory: Arc::clone(vm.memory()),
            io_loop,
            sink: Arc::new(KvmMsi::new(Arc::clone(vm.fd()), vectors)),
        };
        let function = VirtioPci::new(device, parts)
            .map_err(|source| Error::Device { index, source: Box::new(source) })?;
        bus.add_virtio(function)?;
    }
    Ok(loops)
}
