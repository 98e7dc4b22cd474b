//! Tests of the bus with a real virtio function, and a recorder for doorbells.
pub(crate) mod pairs;
pub(crate) mod stuck;

use std::collections::BTreeSet;
use std::io;

use mvm_devices::device::VirtioDevice;
use mvm_devices::memory::Memory;
use mvm_devices::pci::{Msi, MsiSink};
use mvm_devices::transport::Parts;
use mvm_devices::virtio::{DeviceSpec, Spec};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::config::MemSize;
use crate::fds::Slots;
use crate::memory;

/// Command register: memory decoding on.
const MEMORY: u16 = 2;
const COMMAND: u64 = 4;
const BAR0: u64 = 0x10;
/// Device status, in the BAR.
const STATUS: u64 = 0x14;
/// The doorbell of the first queue, in the BAR.
const DOORBELL: u64 = 0x3000;

#[derive(Default)]
struct Recorder(Mutex<BTreeSet<u64>>);

impl Doorbells for Recorder {
    fn watch(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let added = self.0.lock().unwrap().insert(address);
        if added { Ok(()) } else { Err(io::ErrorKind::AlreadyExists.into()) }
    }

    fn unwatch(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let removed = self.0.lock().unwrap().remove(&address);
        if removed { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

struct Deaf;

impl MsiSink for Deaf {
    fn route(&self, _: u16, _: Option<Msi>) {}
    fn signal(&self, _: u16) {}
}

/// A bus with a host bridge and two devices of one queue each.
pub(crate) struct Fixture {
    pub(crate) bus: PciBus,
    doorbells: Arc<Recorder>,
    memory: Arc<Memory>,
    pub(crate) io_loop: IoLoop,
}

pub(crate) fn fixture() -> Fixture {
    let doorbells = Arc::new(Recorder::default());
    let sink: Arc<dyn Doorbells> = Arc::clone(&doorbells) as _;
    let bus = PciBus::new(sink, Ecam::take_in_turn());
    let io_loop = IoLoop::spawn("test").unwrap();
    let memory = Arc::new(memory::create(MemSize::try_from(4).unwrap()).unwrap());
    bus.add_bridge(HostBridge::new()).unwrap();
    for _ in 0..2 {
        bus.add_virtio(plugged(rng(), &memory, &io_loop)).unwrap();
    }
    Fixture { bus, doorbells, memory, io_loop }
}

/// A device of one queue.
fn rng() -> Box<dyn VirtioDevice> {
    let spec: DeviceSpec = serde_json::from_str(r#"{"type":"rng"}"#).unwrap();
    spec.build(&mut Slots::default()).unwrap()
}

fn plugged(device: Box<dyn VirtioDevice>, memory: &Arc<Memory>, io_loop: &IoLoop) -> Plugged {
    let parts = Parts { memory: Arc::clone(memory), io_loop: io_loop.handle(), sink: Arc::new(Deaf) };
    let function = VirtioPci::new(device, parts).unwrap();
    Plugged { function, _io_loop: None, serial: String::new() }
}

fn register(device: u64, offset: u64) -> u64 {
    layout::ECAM + device * DEVICE_STRIDE + offset
}

impl Fixture {
    fn shown(&self, device: u64, offset: u64) -> u32 {
        let mut value = [0; 4];
        assert!(self.bus.read(register(device, offset), &mut value));
        u32::from_le_bytes(value)
    }

    fn write(&self, device: u64, offset: u64, value: u32) {
        assert!(self.bus.write(register(device, offset), &value.to_le_bytes()));
    }

    /// Adds a device that runs in `io_loop`.
    pub(crate) fn add(&self, device: Box<dyn VirtioDevice>, io_loop: &IoLoop) -> usize {
        self.bus.add_virtio(plugged(device, &self.memory, io_loop)).unwrap()
    }

    /// Does what a driver does up to `DRIVER_OK`, without any queue. Returns the address of the registers.
    pub(crate) fn start_driver(&self, device: u64) -> u64 {
        self.enable(device);
        let registers = u64::from(self.shown(device, BAR0));
        let write = |offset: u64, data: &[u8]| assert!(self.bus.write(registers + offset, data));
        write(STATUS, &[1]);
        write(STATUS, &[3]);
        // The one feature a driver must accept: version 1, bit 32.
        write(0x08, &1u32.to_le_bytes());
        write(0x0c, &1u32.to_le_bytes());
        write(STATUS, &[11]);
        write(STATUS, &[15]);
        registers
    }

    /// Rings the doorbell of a device's first queue.
    pub(crate) fn kick(&self, device: u64) {
        let doorbell = u64::from(self.shown(device, BAR0)) + DOORBELL;
        assert!(self.bus.write(doorbell, &0u16.to_le_bytes()));
    }

    /// Rings it often enough for KVM to watch it.
    fn kick_often(&self, device: u64) {
        (0..16).for_each(|_| self.kick(device));
    }

    fn enable(&self, device: u64) {
        assert!(self.bus.write(register(device, COMMAND), &MEMORY.to_le_bytes()));
    }

    fn watched(&self) -> Vec<u64> {
        self.doorbells.0.lock().unwrap().iter().copied().collect()
    }
}

#[test]
fn functions_are_shown_and_absent_ones_read_all_ones() {
    let fixture = fixture();
    assert_eq!(fixture.shown(0, 0), 0x0008_1b36);
    assert_eq!(fixture.shown(1, 0), 0x1044_1af4);
    assert_eq!(fixture.shown(3, 0), u32::MAX);
    assert_eq!(register(1, 0) + 4096, register(1, 4096));
    assert_eq!(fixture.shown(1, 4096), u32::MAX, "function 1 of a device");
}

#[test]
fn bars_are_placed_apart_in_the_window_and_answer_only_when_decoded() {
    let fixture = fixture();
    let bars = [fixture.shown(1, BAR0), fixture.shown(2, BAR0)].map(u64::from);
    assert!(bars[0] >= layout::BAR_WINDOW && bars[0] != bars[1]);
    let mut byte = [0x55];
    assert!(!fixture.bus.read(bars[0], &mut byte));
    assert_eq!(byte, [0x55]);
    fixture.enable(1);
    assert!(fixture.bus.read(bars[0], &mut byte));
    assert!(!fixture.bus.read(bars[1], &mut byte));
}

#[test]
fn a_bar_is_sized_moved_and_switched_off_with_its_doorbells() {
    let fixture = fixture();
    let first = u64::from(fixture.shown(1, BAR0));
    fixture.enable(1);
    fixture.kick_often(1);
    assert_eq!(fixture.watched(), [first + DOORBELL]);

    fixture.write(1, BAR0, u32::MAX);
    let size = u64::from(!(fixture.shown(1, BAR0) & !0xf)) + 1;
    assert!(size.is_power_of_two());

    let moved = layout::BAR_WINDOW + 0x100_0000;
    fixture.write(1, BAR0, u32::try_from(moved).unwrap());
    assert!(fixture.watched().is_empty(), "until it is rung again");
    fixture.kick(1);
    assert_eq!(fixture.watched(), [moved + DOORBELL]);
    assert!(!fixture.bus.read(first, &mut [0]));
    assert!(fixture.bus.read(moved, &mut [0]));

    fixture.write(1, COMMAND, 0);
    assert!(fixture.watched().is_empty());
    assert!(!fixture.bus.read(moved, &mut [0]));
}

#[test]
fn two_bars_in_one_place_are_survived_and_told_apart_again() {
    let fixture = fixture();
    fixture.enable(1);
    fixture.enable(2);
    let (first, second) = (fixture.shown(1, BAR0), fixture.shown(2, BAR0));
    fixture.kick_often(1);
    fixture.kick_often(2);
    assert_eq!(fixture.watched().len(), 2);
    fixture.write(2, BAR0, first);
    fixture.kick_often(2);
    assert_eq!(fixture.watched().len(), 1, "KVM watches a place once");
    fixture.write(2, BAR0, second);
    fixture.kick(2);
    assert_eq!(fixture.watched().len(), 2);
}

#[test]
fn a_full_bus_refuses_another_function() {
    let fixture = fixture();
    for _ in 3..MAX_DEVICES {
        fixture.bus.add_bridge(HostBridge::new()).unwrap();
    }
    assert!(matches!(fixture.bus.add_bridge(HostBridge::new()), Err(Error::BusFull(32))));
}

#[test]
fn a_function_that_leaves_frees_its_slot_its_addresses_and_its_doorbells() {
    let fixture = fixture();
    fixture.enable(1);
    fixture.enable(2);
    fixture.kick_often(1);
    fixture.kick_often(2);
    let (first, watched) = (u64::from(fixture.shown(1, BAR0)), fixture.watched());
    assert!(fixture.bus.remove_virtio(1, false).is_ok());
    assert_eq!((fixture.shown(1, 0), fixture.watched().len()), (u32::MAX, watched.len() - 1));
    assert!(!fixture.bus.read(first, &mut [0]));
    assert!(!fixture.bus.write(register(1, COMMAND), &MEMORY.to_le_bytes()));
    assert_eq!(fixture.bus.remove_virtio(1, true).err(), Some(Stays::Absent));

    let next = fixture.add(rng(), &fixture.io_loop);
    assert_eq!((next, u64::from(fixture.shown(1, BAR0))), (1, first));
    assert_eq!(fixture.shown(1, COMMAND) & u32::from(MEMORY), 0, "decoding is off again");
    fixture.enable(1);
    fixture.kick_often(1);
    assert_eq!(fixture.watched(), watched);
}

#[test]
fn a_doorbell_costs_an_exit_until_it_was_rung_a_few_times() {
    let fixture = fixture();
    fixture.enable(1);
    for _ in 1..16 {
        fixture.kick(1);
    }
    let elsewhere = u64::from(fixture.shown(1, BAR0)) + STATUS;
    assert!((0..20).all(|_| fixture.bus.write(elsewhere, &[0])));
    assert!(fixture.watched().is_empty());
    fixture.kick(1);
    assert_eq!(fixture.watched().len(), 1);
}

#[test]
fn a_new_function_is_not_placed_where_another_was_moved_to() {
    let fixture = fixture();
    let first = fixture.shown(1, BAR0);
    fixture.enable(2);
    assert!(fixture.bus.remove_virtio(1, false).is_ok());
    fixture.write(2, BAR0, first);
    fixture.add(rng(), &fixture.io_loop);
    assert_ne!(fixture.shown(1, BAR0), first);
}

#[test]
fn a_function_whose_driver_runs_stays_unless_forced_and_the_bridge_stays() {
    let fixture = fixture();
    let status = fixture.start_driver(1) + STATUS;
    assert_eq!(fixture.bus.remove_virtio(1, false).err(), Some(Stays::InUse));
    assert!(fixture.bus.write(status, &[0]));
    assert!(fixture.bus.remove_virtio(1, false).is_ok());
    assert_eq!(fixture.bus.remove_virtio(0, true).err(), Some(Stays::Absent));
}

#[test]
fn a_slot_that_a_virtual_cpu_holds_is_left_out_not_waited_for() {
    let fixture = fixture();
    let held = fixture.bus.slots[1].lock().unwrap();
    let mut seen = Vec::new();
    assert_eq!(fixture.bus.for_each_virtio(|number, _| seen.push(number)), 1);
    assert_eq!(seen, [2]);
    assert_eq!(fixture.bus.remove_virtio(1, true).err(), Some(Stays::Busy));
    drop(held);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_access_is_answered_inside_one_bar_or_not_at_all(
        accesses in proptest::collection::vec((0usize..6, any::<u32>(), 1usize..=16, any::<bool>(), any::<u8>()), 1..60),
    ) {
        let fixture = fixture();
        fixture.enable(1);
        for (place, offset, length, write, value) in accesses {
            let base = [
                layout::BAR_WINDOW, register(1, 0), register(2, 0), u64::MAX - 8, layout::ECAM + layout::ECAM_SIZE - 4,
                fixture.shown(1, BAR0).into(),
            ][place];
            let address = base.wrapping_add(u64::from(offset % 0x9000));
            let mut data = vec![value; length];
            if write {
                fixture.bus.write(address, &data);
            } else {
                let answered = fixture.bus.read(address, &mut data);
                let inside = (layout::ECAM..layout::ECAM + layout::ECAM_SIZE).contains(&address);
                prop_assert!(answered || inside || data.iter().all(|byte| *byte == value));
            }
            prop_assert!(fixture.watched().len() <= 2);
        }
    }
}
