//! A driver of a PCI function, for tests of the transport: it knows only what the capabilities tell it.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::{Driver, memory};
use crate::device::VirtioDevice;
use crate::io_loop::IoLoop;
use crate::memory::Memory;
use crate::pci::{ConfigChange, Msi, MsiSink, PciFunction};
use crate::transport::{Parts, VirtioPci};

/// Longest that a test waits for an interrupt that must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the test machine places BAR 0.
pub const BAR_ADDRESS: u64 = 0xe000_0000;

/// Records interrupts, and lets a test wait for them.
#[derive(Debug, Default)]
pub struct Sink {
    seen: Mutex<Seen>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Seen {
    routes: BTreeMap<u16, Msi>,
    route_calls: u64,
    signals: BTreeMap<u16, u64>,
}

impl MsiSink for Sink {
    fn route(&self, vector: u16, msi: Option<Msi>) {
        let mut seen = self.seen.lock().unwrap();
        seen.route_calls += 1;
        match msi {
            Some(msi) => seen.routes.insert(vector, msi),
            None => seen.routes.remove(&vector),
        };
    }

    fn signal(&self, vector: u16) {
        *self.seen.lock().unwrap().signals.entry(vector).or_default() += 1;
        self.arrived.notify_all();
    }
}

impl Sink {
    /// Message of `vector` as it is routed now.
    pub fn routed(&self, vector: u16) -> Option<Msi> {
        self.seen.lock().unwrap().routes.get(&vector).copied()
    }

    /// How often a route was changed.
    pub fn route_calls(&self) -> u64 {
        self.seen.lock().unwrap().route_calls
    }

    /// Interrupts of `vector` so far.
    pub fn signals(&self, vector: u16) -> u64 {
        self.seen.lock().unwrap().signals.get(&vector).copied().unwrap_or(0)
    }

    /// Interrupts so far.
    pub fn all_signals(&self) -> u64 {
        self.seen.lock().unwrap().signals.values().sum()
    }

    /// Returns once `vector` was signalled `count` times in all; panics when that takes too long.
    pub fn wait(&self, vector: u16, count: u64) {
        let seen = self.seen.lock().unwrap();
        let missing = |seen: &mut Seen| seen.signals.get(&vector).copied().unwrap_or(0) < count;
        let timeout = self.arrived.wait_timeout_while(seen, PATIENCE, missing).unwrap().1;
        assert!(!timeout.timed_out(), "vector {vector} was not signalled {count} times");
    }
}

/// One capability found by walking the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Offset in configuration space.
    pub at: usize,
    /// Capability id.
    pub id: u8,
    /// Everything from the id on, up to the next capability's start or 32 bytes.
    pub bytes: Vec<u8>,
}

/// A register block a virtio capability describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// BAR register.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A function with its driver, a loop it runs in, and guest memory.
pub struct PciDriver {
    /// The function.
    pub function: VirtioPci,
    /// Where its interrupts end.
    pub sink: Arc<Sink>,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// Common configuration.
    pub common: Block,
    /// Doorbells.
    pub notify: Block,
    /// Interrupt status.
    pub isr: Block,
    /// Device configuration, if the function has it.
    pub device: Option<Block>,
    /// Bytes between doorbells.
    pub multiplier: u32,
    /// Offset of the MSI-X capability.
    pub msix: usize,
    /// Offset of the configuration access capability.
    pub window: usize,
    /// Keeps the loop running.
    pub io_loop: IoLoop,
}

impl PciDriver {
    /// Puts `device` behind a function, discovers it and switches memory decoding on.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::in_memory(device, memory())
    }

    /// As [`PciDriver::new`], in memory that is there already.
    pub fn in_memory(device: Box<dyn VirtioDevice>, memory: Arc<Memory>) -> Self {
        let io_loop = IoLoop::spawn("test-io").unwrap();
        let sink = Arc::new(Sink::default());
        let parts =
            Parts { memory: Arc::clone(&memory), io_loop: io_loop.handle(), sink: Arc::clone(&sink) as _ };
        let mut function = VirtioPci::new(device, parts).unwrap();
        function.assign_bar(0, BAR_ADDRESS);
        let mut driver = Self {
            function,
            sink,
            memory,
            common: Block::default(),
            notify: Block::default(),
            isr: Block::default(),
            device: None,
            multiplier: 0,
            msix: 0,
            window: 0,
            io_loop,
        };
        driver.discover();
        assert_eq!(driver.function.write_config(4, &6u16.to_le_bytes()), ConfigChange::Decoding);
        driver
    }

    /// Walks the capability list, as far as 48 links: more cannot fit.
    pub fn capabilities(&self) -> Vec<Capability> {
        let config = self.function.config();
        let mut found = Vec::new();
        let mut at = usize::from(config[0x34]);
        while at != 0 {
            assert!(found.len() < 48, "the capability list has no end");
            found.push(Capability { at, id: config[at], bytes: config[at..at + 32].to_vec() });
            at = usize::from(config[at + 1]);
        }
        found
    }

    fn discover(&mut self) {
        for capability in self.capabilities() {
            let bytes = &capability.bytes;
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let block = Block { bar: bytes[4], offset: word(8).into(), len: word(12).into() };
            match (capability.id, bytes[3]) {
                (9, 1) => self.common = block,
                (9, 2) => (self.notify, self.multiplier) = (block, word(16)),
                (9, 3) => self.isr = block,
                (9, 4) => self.device = Some(block),
                (9, 5) => self.window = capability.at,
                (0x11, _) => self.msix = capability.at,
                _ => panic!("unknown capability {capability:?}"),
            }
        }
    }

    /// Reads `N` bytes of a block.
    pub fn read<const N: usize>(&mut self, block: Block, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        self.function.read_bar(block.bar, block.offset + offset, &mut data);
        data
    }

    /// Writes bytes of a block.
    pub fn write(&mut self, block: Block, offset: u64, data: &[u8]) {
        self.function.write_bar(block.bar, block.offset + offset, data);
    }

    /// Reads a 32-bit common configuration register.
    pub fn get32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(self.common, offset))
    }

    /// Reads a 16-bit common configuration register.
    pub fn get16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(self.common, offset))
    }

    /// Writes a 32-bit common configuration register.
    pub fn set32(&mut self, offset: u64, value: u32) {
        self.write(self.common, offset, &value.to_le_bytes());
    }

    /// Writes a 16-bit common configuration register.
    pub fn set16(&mut self, offset: u64, value: u16) {
        self.write(self.common, offset, &value.to_le_bytes());
    }

    /// Device status.
    pub fn status(&mut self) -> u8 {
        let [status] = self.read(self.common, 0x14);
        status
    }

    /// Writes device status.
    pub fn set_status(&mut self, status: u8) {
        self.write(self.common, 0x14, &[status]);
    }

    /// Features offered.
    pub fn offered(&mut self) -> u64 {
        self.set32(0, 0);
        let low = self.get32(4);
        self.set32(0, 1);
        u64::from(low) | (u64::from(self.get32(4)) << 32)
    }

    /// Goes from reset to `FEATURES_OK` with these features; whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.set_status(1);
        self.set_status(3);
        self.set32(8, 0);
        self.set32(0xc, u32::try_from(features & 0xffff_ffff).unwrap());
        self.set32(8, 1);
        self.set32(0xc, u32::try_from(features >> 32).unwrap());
        self.set_status(11);
        self.status() & 8 != 0
    }

    /// Programs and enables queue `index` with its largest size, events on vector `index + 1`, or on the
    /// last there is.
    pub fn set_up_queue(&mut self, index: u16, event_idx: bool) -> Driver {
        self.set16(0x16, index);
        let size = self.get16(0x18);
        let driver = Driver::new(index, size, Arc::clone(&self.memory), event_idx);
        let registers = driver.registers();
        let last = self.msix_control() & 0x7ff;
        self.set16(0x1a, (index + 1).min(last));
        for (at, address) in
            [(0x20, registers.descriptors), (0x28, registers.available), (0x30, registers.used)]
        {
            self.set32(at, u32::try_from(address & 0xffff_ffff).unwrap());
            self.set32(at + 4, u32::try_from(address >> 32).unwrap());
        }
        self.set16(0x1c, 1);
        driver
    }

    /// Switches MSI-X on with a message for each vector, none masked; vector 0 is for configuration changes.
    pub fn set_up_vectors(&mut self) {
        let control = self.msix_control();
        self.set_msix_control(control | 0x8000);
        for vector in 0..=control & 0x7ff {
            self.program_vector(vector, 0xfee0_0000, u32::from(vector) + 0x20, false);
        }
        self.set16(0x10, 0);
    }

    /// MSI-X message control.
    pub fn msix_control(&self) -> u16 {
        u16::from_le_bytes(self.function.config()[self.msix + 2..][..2].try_into().unwrap())
    }

    /// Writes MSI-X message control.
    pub fn set_msix_control(&mut self, control: u16) {
        let _ = self.function.write_config(self.msix + 2, &control.to_le_bytes());
    }

    /// The MSI-X table.
    pub fn table(&self) -> Block {
        self.msix_block(4)
    }

    /// The MSI-X pending bits.
    pub fn pending(&self) -> Block {
        self.msix_block(8)
    }

    fn msix_block(&self, field: usize) -> Block {
        let config = self.function.config();
        let word = u32::from_le_bytes(config[self.msix + field..][..4].try_into().unwrap());
        let len = u64::from(self.msix_control() & 0x7ff) * 16 + 16;
        Block { bar: u8::try_from(word & 7).unwrap(), offset: u64::from(word & !7), len }
    }

    /// Programs one vector.
    pub fn program_vector(&mut self, vector: u16, address: u64, data: u32, masked: bool) {
        let (table, at) = (self.table(), u64::from(vector) * 16);
        self.write(table, at, &u32::try_from(address & 0xffff_ffff).unwrap().to_le_bytes());
        self.write(table, at + 4, &u32::try_from(address >> 32).unwrap().to_le_bytes());
        self.write(table, at + 8, &data.to_le_bytes());
        self.mask_vector(vector, masked);
    }

    /// Masks or unmasks one vector.
    pub fn mask_vector(&mut self, vector: u16, masked: bool) {
        self.write(self.table(), u64::from(vector) * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    /// The whole of a driver's start: everything offered is accepted but `EVENT_IDX` unless asked for.
    /// Returns the driver's side of each queue.
    pub fn start(&mut self, event_idx: bool) -> Vec<Driver> {
        let offered = self.offered();
        let features = if event_idx { offered } else { offered & !(1 << 29) };
        assert!(self.negotiate(features));
        self.set_up_vectors();
        let queues = self.get16(0x12);
        let drivers = (0..queues).map(|index| self.set_up_queue(index, event_idx)).collect();
        self.set_status(15);
        drivers
    }

    /// Writes the doorbell of queue `index`.
    pub fn kick(&mut self, index: u16) {
        let at = u64::from(index) * u64::from(self.multiplier);
        self.write(self.notify, at, &index.to_le_bytes());
    }

    /// Has `work` done while the device rests. A device that runs may look at its queues without a kick: it does
    /// when it starts and when it goes on.
    pub fn at_rest<T>(&mut self, work: impl FnOnce(&Self) -> T) -> T {
        self.function.pause().unwrap();
        let result = work(self);
        self.function.resume().unwrap();
        result
    }

    /// Returns once the device has seen everything posted so far and did what it could.
    pub fn settle(&mut self) {
        self.function.pause().unwrap();
        self.function.resume().unwrap();
    }
}
