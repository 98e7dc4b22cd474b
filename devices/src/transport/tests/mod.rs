//! The transport driven through configuration space and BAR, as a guest does it.
//!
//! Test names begin with the identifiers of the project's catalogue: `c_` conformance to VIRTIO 1.2, `t_` a
//! hostile driver at the registers, `p_` a property over random sequences.

mod discovery;
mod hostile;
mod kinds;
mod matrix;
mod model;
mod negotiation;
mod queues;
mod snapshot;
mod threads;
mod vectors;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::chain::Chain;
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{Io, Kind, VirtioDevice};
use crate::error::Error;
use crate::ring::Notify;
use crate::testing::pci::PciDriver;
use crate::virtio::{DeviceState, rng};

/// Queue sizes of the test device.
const SIZES: [u16; 3] = [8, 16, 8];
/// A feature of the test device; `NEEDS_BASE` is refused without it.
const BASE: u64 = 1;
const NEEDS_BASE: u64 = 2;

/// What the test sees of its device while the transport or the loop has it.
#[derive(Debug, Default)]
struct Log {
    starts: AtomicU64,
    stops: AtomicU64,
    served: AtomicU64,
    fail: AtomicBool,
}

impl Log {
    fn starts(&self) -> u64 {
        self.starts.load(Ordering::SeqCst)
    }

    fn stops(&self) -> u64 {
        self.stops.load(Ordering::SeqCst)
    }

    fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }
}

/// Copies the readable part of each chain into its writable part.
struct Echo {
    log: Arc<Log>,
    config: Arc<ConfigSpace>,
    served: Arc<Counter>,
}

impl VirtioDevice for Echo {
    fn kind(&self) -> Kind {
        Kind { id: 42, name: "echo", class: [0xff, 1, 2], guest_config: "CONFIG_NONE" }
    }

    fn queues(&self) -> &[u16] {
        &SIZES
    }

    fn features(&self) -> u64 {
        BASE | NEEDS_BASE
    }

    fn accepts(&self, features: u64) -> bool {
        features & NEEDS_BASE == 0 || features & BASE != 0
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        vec![Arc::clone(&self.served)]
    }

    fn start(&mut self, _features: u64, _io: &mut Io<'_>) -> Result<(), Error> {
        self.log.starts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        if self.log.fail.load(Ordering::SeqCst) {
            return Err(Error::device("echo")(std::io::ErrorKind::BrokenPipe.into()));
        }
        let (log, served) = (Arc::clone(&self.log), Arc::clone(&self.served));
        io.serve(index, Notify::Batch, move |chain| {
            log.served.fetch_add(1, Ordering::SeqCst);
            served.one();
            echo(chain)
        })
    }

    fn stop(&mut self) {
        self.log.stops.fetch_add(1, Ordering::SeqCst);
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(rng::State {})
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), Error> {
        Ok(())
    }
}

fn echo(chain: &Chain) -> Result<u32, Error> {
    let (mut from, mut to) = (chain.reader(), chain.writer());
    let mut bytes = vec![0; usize::try_from(from.remaining().min(to.remaining()).min(4096)).unwrap()];
    from.read(&mut bytes)?;
    to.write(&bytes)?;
    Ok(to.passed())
}

/// A new test device: twelve bytes of configuration, of which the driver may write 4 to 7.
fn device() -> (Box<dyn VirtioDevice>, Arc<Log>) {
    let log = Arc::new(Log::default());
    let config = ConfigSpace::new((1..=12).collect(), 4..8);
    (Box::new(Echo { log: Arc::clone(&log), config, served: Counter::new("echoes") }), log)
}

/// A driver that has discovered a new test device.
fn machine() -> (PciDriver, Arc<Log>) {
    let (device, log) = device();
    (PciDriver::new(device), log)
}

/// Value of one of the function's counters.
fn count(vm: &PciDriver, name: &str) -> u64 {
    vm.function.counters().iter().find(|counter| counter.name() == name).unwrap().get()
}

/// Everything the driver can see of the common configuration, with each queue's registers.
fn registers(vm: &mut PciDriver) -> Vec<u8> {
    let selected = vm.get16(0x16);
    let mut seen = Vec::new();
    for queue in 0..4u16 {
        vm.set16(0x16, queue);
        for at in [0x18, 0x1a, 0x1c, 0x1e] {
            seen.extend(vm.get16(at).to_le_bytes());
        }
        for at in (0x20..0x38).step_by(4) {
            seen.extend(vm.get32(at).to_le_bytes());
        }
    }
    vm.set16(0x16, selected);
    seen
}
