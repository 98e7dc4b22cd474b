//! Virtio devices: built, given an I/O loop, put on the bus, and taken off it.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use mvm_devices::fd::FdSource;
use mvm_devices::io_loop::{IoLoop, LoopHandle};
use mvm_devices::throttle::Meters;
use mvm_devices::transport::{Parts, VirtioPci};
use mvm_devices::virtio::{DeviceSpec, Spec};

use crate::error::{Error, Result};
use crate::jail::{self, Thread};
use crate::kvm::Vm;
use crate::msi::KvmMsi;
use crate::pci_bus::{PciBus, Plugged};

/// How long a device that was taken off the bus may take to complete its last request.
const LEAVE_TIME: Duration = Duration::from_secs(1);

/// Attaches devices to a machine, when it is built and while it runs.
#[derive(Debug)]
pub(crate) struct Attacher {
    vm: Arc<Vm>,
    /// Serves every device that is quick, and starts the loops that others have of their own: the main thread would have
    /// to be allowed what they are.
    shared: Option<IoLoop>,
    /// What disks and cards are charged at.
    meters: Meters,
}

/// The loop that an [`Attacher`] needs. Better early: the thread gets its filter while the main thread makes a machine.
pub(crate) fn shared_loop() -> Result<IoLoop> {
    IoLoop::spawn_with("io", || jail::confine(Thread::Io)).map_err(Error::system("start the I/O loop"))
}

impl Attacher {
    /// Attaches to `vm`.
    pub(crate) fn new(vm: Arc<Vm>, shared: Option<IoLoop>, meters: Meters) -> Self {
        Self { vm, shared, meters }
    }

    /// The shared loop. To be called once before the main thread is confined, which may not be what it is.
    pub(crate) fn shared(&mut self) -> Result<LoopHandle> {
        let io_loop = match self.shared.take() {
            Some(io_loop) => io_loop,
            None => shared_loop()?,
        };
        Ok(self.shared.insert(io_loop).handle())
    }

    /// Builds the device that `spec` describes and puts it on `bus`. Returns its number there.
    pub(crate) fn attach(
        &mut self,
        spec: &DeviceSpec,
        files: &mut dyn FdSource,
        bus: &PciBus,
    ) -> Result<usize> {
        bus.add_virtio(self.build(spec, files)?)
    }

    /// Builds the device that `spec` describes.
    pub(crate) fn build(&mut self, spec: &DeviceSpec, files: &mut dyn FdSource) -> Result<Plugged> {
        let mut device = spec.build(files).map_err(|source| Error::Device(Box::new(source)))?;
        device.charge_at(self.meters.clone());
        let shared = self.shared()?;
        let (io_loop, handle) = if device.wants_own_loop() {
            let own = shared.spawn(&format!("io-{}", device.kind().name));
            let own = own.map_err(Error::system("start an I/O loop"))?;
            let handle = own.handle();
            (Some(own), handle)
        } else {
            (None, shared)
        };
        // One vector per queue and one for configuration changes.
        let vectors = u16::try_from(device.queues().len()).unwrap_or(u16::MAX).saturating_add(1);
        let parts = Parts {
            memory: Arc::clone(self.vm.memory()),
            io_loop: handle,
            sink: Arc::new(KvmMsi::new(Arc::clone(self.vm.fd()), vectors)),
        };
        let function = VirtioPci::new(device, parts).map_err(|source| Error::Device(Box::new(source)))?;
        Ok(Plugged { function, _io_loop: io_loop, serial: serial(spec).to_owned() })
    }
}

/// Ends `device`, which is off the bus: its I/O stops and its files are closed. False if it is not through with its
/// last request within [`LEAVE_TIME`]; it then ends as soon as it is.
pub(crate) fn end(device: Box<Plugged>) -> bool {
    let (done, ended) = mpsc::channel::<()>();
    let ending = std::thread::Builder::new().name("detach".to_owned()).spawn(move || {
        drop(device);
        drop(done);
    });
    // Without a thread the closure is gone already, and the device with it.
    ending.is_err() || ended.recv_timeout(LEAVE_TIME) == Err(RecvTimeoutError::Disconnected)
}

/// By which the guest finds a disk; empty for anything else.
pub(crate) fn serial(spec: &DeviceSpec) -> &str {
    match spec {
        DeviceSpec::Block(config) => &config.serial,
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;

    use super::*;
    use crate::pci_bus::tests::fixture;
    use crate::pci_bus::tests::stuck::{PATIENCE, stuck};

    #[test]
    fn a_device_in_a_request_leaves_the_bus_at_once_and_ends_after_the_request() {
        let fixture = fixture();
        let own = IoLoop::spawn("stuck").unwrap();
        let (device, inside, go) = stuck();
        let number = fixture.add(device, &own);
        fixture.start_driver(3);
        fixture.kick(3);
        inside.recv_timeout(PATIENCE).unwrap();

        let mut device = fixture.bus.remove_virtio(number, true).unwrap();
        device._io_loop = Some(own);
        assert!(!end(device), "its last request is not through");
        go.send(()).unwrap();
        // The device is dropped, and with it its end of the channel.
        assert_eq!(inside.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn an_idle_device_ends_at_once() {
        let fixture = fixture();
        fixture.start_driver(1);
        assert!(end(fixture.bus.remove_virtio(1, true).unwrap()));
    }
}
