//! Ways in for the fuzz targets: a machine's bus as its CPUs see it, and what a machine was saved as.

use std::io;
use std::sync::{Arc, Mutex};

use mvm_devices::io_loop::IoLoop;
use mvm_devices::memory::{GuestAddress, Memory};
use mvm_devices::pci::host_bridge::HostBridge;
use mvm_devices::pci::{CONFIG_SPACE_SIZE, Msi, MsiSink};
use mvm_devices::serial::Serial;
use mvm_devices::transport::{Parts, VirtioPci};
use mvm_devices::virtio::{Spec, rng};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::doorbell::Doorbells;
use crate::ecam::Ecam;
use crate::fds::Slots;
use crate::metrics::Counters;
use crate::pci_bus::{PciBus, Plugged};
use crate::serial_port::SerialPort;
use crate::status::Stream;

pub use crate::snapshot::fuzzing as snapshot;

struct Deaf;

impl Doorbells for Deaf {
    fn watch(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn unwatch(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

impl MsiSink for Deaf {
    fn route(&self, _: u16, _: Option<Msi>) {}
    fn signal(&self, _: u16) {}
}

/// An access of a virtual CPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `IN`, of so many bytes.
    In(u16, usize),
    /// `OUT` of these bytes, the first so many.
    Out(u16, [u8; 8], usize),
    /// A read outside RAM.
    Read(u64, usize),
    /// A write outside RAM.
    Write(u64, [u8; 8], usize),
}

/// What accesses came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// Accesses that nobody answered.
    pub unclaimed: u64,
    /// Accesses to functions on the bus.
    pub claimed: u64,
    /// The machine's ends.
    pub exits: u64,
}

/// Has a machine with a serial port and one function take these accesses.
///
/// # Errors
/// There is such a machine in this process.
pub fn accesses(all: impl IntoIterator<Item = Access>) -> Result<Answered, Box<dyn std::error::Error>> {
    let ecam = Ecam::take()?;
    (0..32).for_each(|device| ecam.show(device, 0, &[0xff; CONFIG_SPACE_SIZE]));
    let pci = PciBus::new(Arc::new(Deaf), ecam);
    pci.add_bridge(HostBridge::new())?;
    let memory = Arc::new(Memory::anonymous(&[(GuestAddress(0), 1 << 20)])?);
    let io_loop = IoLoop::spawn("fuzz")?;
    let device = rng::Config {}.build(&mut Slots::default())?;
    let parts = Parts { memory, io_loop: io_loop.handle(), sink: Arc::new(Deaf) };
    let function = VirtioPci::new(device, parts)?;
    pci.add_virtio(Plugged { function, _io_loop: None, serial: String::new() })?;
    let serial = Serial::new(Box::new(io::sink()));
    let dropped = Arc::clone(serial.dropped());
    let serial = SerialPort { port: Mutex::new(serial), dropped };
    let bus = Bus::new(pci, Some(serial), Arc::new(Stream::new(None)), Arc::new(Counters::default()));
    let mut exits = 0;
    for access in all {
        let mut data = [0; 16];
        match access {
            Access::In(port, len) => bus.port_in(port, &mut data[..len.min(16)]),
            Access::Out(port, data, len) => {
                exits += u64::from(bus.port_out(port, &data[..len.min(8)]).is_some());
            }
            Access::Read(address, len) => bus.read(address, &mut data[..len.min(16)]),
            Access::Write(address, data, len) => bus.write(address, &data[..len.min(8)]),
        }
    }
    let counted = bus.counters.exits();
    let claimed = counted.mmio_reads + counted.mmio_writes - counted.unclaimed;
    Ok(Answered { unclaimed: counted.unclaimed, claimed, exits })
}
