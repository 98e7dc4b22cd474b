//! Every pair of devices in one machine, saved and put back: what belongs to one stays with it.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;

use mvm_devices::virtio::{NAMES, mem, net};

use super::*;
use crate::config::FdSlot;
use crate::pci_bus::saved::SavedFunction;

/// The MSI-X capability.
const MSIX: u8 = 0x11;
/// Message control: on.
const ENABLE: u16 = 0x8000;
/// Where the common configuration maps configuration changes to a vector.
const CONFIG_VECTOR: u64 = 0x10;

/// A new device of each kind.
pub(crate) fn device(kind: &str) -> Box<dyn VirtioDevice> {
    let file =
        |open: std::io::Result<std::fs::File>| HashMap::from([(FdSlot(3), OwnedFd::from(open.unwrap()))]);
    let (config, mut files) = match kind {
        "net" => {
            let config = net::Config { tap: FdSlot(3), mac: None, mtu: None, only_own_mac: false };
            return net::stand_in::card(&config).unwrap().0;
        }
        "block" => (r#"{"type":"block","disk":3}"#.to_owned(), file(tempfile::tempfile())),
        "console" => (r#"{"type":"console","output":3}"#.to_owned(), file(tempfile::tempfile())),
        "mem" => {
            let config = mem::Config { size_mib: 128, address: 1 << 32 };
            return config.build(&mut HashMap::new()).unwrap();
        }
        "vsock" => (r#"{"type":"vsock","guest_cid":3}"#.to_owned(), HashMap::new()),
        kind => (format!(r#"{{"type":"{kind}"}}"#), HashMap::new()),
    };
    serde_json::from_str::<DeviceSpec>(&config).unwrap().build(&mut files).unwrap()
}

/// Where one function's interrupts end.
#[derive(Default)]
struct Sink {
    routes: Mutex<BTreeMap<u16, Msi>>,
    signals: Mutex<BTreeMap<u16, u32>>,
}

impl MsiSink for Sink {
    fn route(&self, vector: u16, msi: Option<Msi>) {
        let mut routes = self.routes.lock().unwrap();
        match msi {
            Some(msi) => routes.insert(vector, msi),
            None => routes.remove(&vector),
        };
    }

    fn signal(&self, vector: u16) {
        *self.signals.lock().unwrap().entry(vector).or_default() += 1;
    }
}

/// A machine of two devices.
pub(crate) struct Machine {
    fixture: Fixture,
    sinks: Vec<Arc<Sink>>,
}

impl Machine {
    /// A machine without devices.
    pub(crate) fn empty() -> Self {
        let doorbells = Arc::new(Recorder::default());
        let bus = PciBus::new(Arc::clone(&doorbells) as _, Ecam::take_in_turn());
        bus.add_bridge(HostBridge::new()).unwrap();
        let memory = Arc::new(memory::create(MemSize::try_from(4).unwrap()).unwrap());
        let io_loop = IoLoop::spawn("test").unwrap();
        let fixture = Fixture { bus, doorbells, memory, io_loop };
        Self { fixture, sinks: Vec::new() }
    }

    fn build(&mut self, kind: &str) -> Plugged {
        let sink = Arc::new(Sink::default());
        self.sinks.push(Arc::clone(&sink));
        let Fixture { memory, io_loop, .. } = &self.fixture;
        let parts = Parts { memory: Arc::clone(memory), io_loop: io_loop.handle(), sink };
        let function = VirtioPci::new(device(kind), parts).unwrap();
        Plugged { function, _io_loop: None, serial: String::new() }
    }

    /// Whether a device of the right kind can be put back as `saved`. If it can, it goes on, is held, and is saved.
    pub(crate) fn takes(&mut self, saved: &SavedFunction) -> bool {
        let Some(kind) = NAMES.iter().find(|kind| **kind == saved.kind) else { return false };
        let virtio = self.build(kind);
        if self.fixture.bus.put_back(saved, virtio).is_err() {
            return false;
        }
        self.fixture.bus.resume().unwrap();
        self.save().iter().any(|function| function.place == saved.place)
    }

    /// Two devices whose drivers run, with a message of its own in each vector.
    pub(crate) fn running(kinds: [&str; 2]) -> Self {
        let mut machine = Self::empty();
        for (kind, number) in kinds.into_iter().zip(1..) {
            let virtio = machine.build(kind);
            machine.fixture.bus.add_virtio(virtio).unwrap();
            machine.program_vectors(number);
        }
        // One of them lies where the machine did not put it.
        let moved = u32::try_from(layout::BAR_WINDOW + 0x200_0000).unwrap();
        machine.fixture.write(2, BAR0, moved);
        machine
    }

    fn program_vectors(&self, number: u64) {
        let Fixture { bus, .. } = &self.fixture;
        let registers = self.fixture.start_driver(number);
        let msix = self.msix(number);
        let control = self.fixture.shown(number, msix) >> 16;
        let table = registers + u64::from(self.fixture.shown(number, msix + 4) & !7);
        assert!(
            bus.write(register(number, msix + 2), &(u16::try_from(control).unwrap() | ENABLE).to_le_bytes())
        );
        for vector in 0..=u64::from(control & 0x7ff) {
            let entry = table + vector * 16;
            assert!(bus.write(entry, &(0xfee0_0000 | number << 12).to_le_bytes()));
            assert!(bus.write(entry + 8, &u32::try_from(number << 8 | vector).unwrap().to_le_bytes()));
            assert!(bus.write(entry + 12, &u32::from(vector == 1).to_le_bytes()));
        }
        assert!(bus.write(registers + CONFIG_VECTOR, &0u16.to_le_bytes()));
    }

    /// Offset of the function's MSI-X capability.
    fn msix(&self, number: u64) -> u64 {
        let mut at = u64::from(self.fixture.shown(number, 0x34) & 0xff);
        while at != 0 {
            let [id, next, ..] = self.fixture.shown(number, at).to_le_bytes();
            if id == MSIX {
                return at;
            }
            at = next.into();
        }
        panic!("it has no MSI-X");
    }

    /// Holds its devices, and saves them.
    pub(crate) fn save(&self) -> Vec<SavedFunction> {
        self.fixture.bus.for_each_virtio(|_, virtio| virtio.function.pause().unwrap());
        let saved = self.fixture.bus.save().unwrap();
        postcard::from_bytes(&postcard::to_stdvec(&saved).unwrap()).unwrap()
    }

    /// What guest and host see of it.
    fn seen(&self) -> (Vec<u32>, Vec<u64>, Vec<BTreeMap<u16, Msi>>) {
        let words = |number| (0..256).step_by(4).map(move |at| self.fixture.shown(number, at));
        let routes = self.sinks.iter().map(|sink| sink.routes.lock().unwrap().clone());
        ((0..4).flat_map(words).collect(), self.fixture.watched(), routes.collect())
    }

    /// The machine that `saved` was, its devices put back in this order.
    fn restored(saved: &[SavedFunction], order: [usize; 2]) -> Self {
        let mut machine = Self::empty();
        for function in order.map(|index| &saved[index]) {
            let virtio = machine.build(&function.kind);
            machine.fixture.bus.put_back(function, virtio).unwrap();
        }
        if order[0] > order[1] {
            machine.sinks.reverse();
        }
        machine.fixture.bus.resume().unwrap();
        machine
    }

    /// Interrupts that each function raised when function `number` had its configuration change.
    fn interrupts(&self, number: usize) -> Vec<BTreeMap<u16, u32>> {
        self.sinks.iter().for_each(|sink| sink.signals.lock().unwrap().clear());
        self.fixture.bus.for_each_virtio(|device, virtio| {
            if device == number {
                virtio.function.notify_config_changed();
            }
        });
        self.sinks.iter().map(|sink| sink.signals.lock().unwrap().clone()).collect()
    }
}

#[test]
fn every_pair_of_devices_keeps_places_registers_and_messages_apart() {
    for (a, b) in NAMES.iter().flat_map(|a| NAMES.iter().map(move |b| (*a, *b))) {
        let machine = Machine::running([a, b]);
        let (saved, seen) = (machine.save(), machine.seen());
        drop(machine);
        for order in [[0, 1], [1, 0]] {
            let again = Machine::restored(&saved, order);
            assert_eq!(again.seen(), seen, "{a} and {b}");
            assert_eq!(again.save(), saved, "{a} and {b}");
            let one = BTreeMap::from([(0, 1)]);
            assert_eq!(again.interrupts(1), [one.clone(), BTreeMap::new()], "{a} beside {b}");
            assert_eq!(again.interrupts(2), [BTreeMap::new(), one], "{b} beside {a}");
        }
    }
}

#[test]
fn a_device_that_comes_or_goes_after_a_restore_leaves_the_others_where_they_are() {
    let saved = Machine::running(["rng", "net"]).save();
    let mut machine = Machine::restored(&saved, [0, 1]);
    let before = machine.fixture.watched();
    let third = machine.build("block");
    assert_eq!(machine.fixture.bus.add_virtio(third).unwrap(), 3);
    machine.fixture.enable(3);
    machine.fixture.kick_often(3);
    assert_eq!(machine.fixture.watched().len(), before.len() + 1, "its doorbell is no other's");
    assert!(machine.fixture.bus.remove_virtio(1, true).is_ok());
    assert_eq!(machine.interrupts(2)[1], BTreeMap::from([(0, 1)]));
    let first = machine.build("rng");
    assert_eq!(machine.fixture.bus.add_virtio(first).unwrap(), 1, "the place is free");
    assert_eq!(u64::from(machine.fixture.shown(1, BAR0)), saved[0].placed[0].1, "and so is its address");
}

#[test]
fn places_that_cannot_be_are_refused() {
    let saved = Machine::running(["rng", "rng"]).save();
    let (first, end) = (saved[0].clone(), layout::BAR_WINDOW + layout::BAR_WINDOW_SIZE);
    for (place, placed, why) in [
        (0, first.placed.clone(), "two devices are on one place of the bus"),
        (2, first.placed.clone(), "two devices are on one place of the bus"),
        (32, first.placed.clone(), "a device is on no place of the bus"),
        (255, first.placed.clone(), "a device is on no place of the bus"),
        (1, Vec::new(), "a device has more or fewer BARs than its kind"),
        (1, vec![first.placed[0], (1, 0)], "a device has more or fewer BARs than its kind"),
        (1, vec![(1, first.placed[0].1)], "a device's BAR is not in the window"),
        (1, vec![(0, layout::BAR_WINDOW - 1)], "a device's BAR is not in the window"),
        (1, vec![(0, end - 4096)], "a device's BAR is not in the window"),
        (1, vec![(0, u64::MAX)], "a device's BAR is not in the window"),
    ] {
        let mut machine = Machine::empty();
        let other = machine.build("rng");
        machine.fixture.bus.put_back(&saved[1], other).unwrap();
        let virtio = machine.build("rng");
        let error = machine.fixture.bus.put_back(&SavedFunction { place, placed, ..first.clone() }, virtio);
        let because = crate::error::causes(&error.unwrap_err()).join(": ");
        assert!(because.ends_with(why), "{place}: {because}");
    }
}
