//! A hostile driver at a PCI function: registers of its BAR, configuration space, capabilities, interrupts.

use arbitrary::{Arbitrary, Unstructured};

use super::{MAX_OPS, Reach};
use crate::memory::{Bytes, GuestAddress};
use crate::pci::{CONFIG_SPACE_SIZE, PciFunction};
use crate::testing::load::{self, Load};
use crate::testing::pci::{BAR_ADDRESS, Capability, PciDriver};
use crate::testing::{Driver, REGION};

/// `DRIVER_OK`.
const READY: u8 = 4;
/// Registers of the common configuration, by offset and width.
const COMMON: [(u64, usize); 20] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x12, 2),
    (0x14, 1),
    (0x15, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x1e, 2),
    (0x20, 4),
    (0x24, 4),
    (0x28, 4),
    (0x2c, 4),
    (0x30, 4),
    (0x34, 4),
    (0x38, 2),
];

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A start as drivers do it, a request and its answer.
    Honest,
    /// A register of the common configuration is written, at its width.
    Register {
        /// Which of the registers in order.
        which: u8,
        /// Any.
        value: u32,
    },
    /// The BAR is read, anywhere.
    Read {
        /// Where.
        offset: u32,
        /// 1, 2, 4 or 8 bytes.
        width: u8,
    },
    /// The BAR is written, anywhere.
    Write {
        /// Where.
        offset: u32,
        /// 1, 2, 4 or 8 bytes.
        width: u8,
        /// Any.
        value: u32,
    },
    /// Configuration space is written.
    Config {
        /// Where.
        offset: u16,
        /// 1, 2 or 4 bytes.
        width: u8,
        /// Any.
        value: u32,
    },
    /// A field of the window to the BAR, or its data.
    Window {
        /// Which: BAR, offset, length, data.
        field: u8,
        /// Any.
        value: u32,
    },
    /// A vector's entry.
    Vector {
        /// Of 2048.
        vector: u16,
        /// Any address.
        address: u32,
        /// Whether it is masked.
        masked: bool,
    },
    /// A doorbell.
    Kick {
        /// Any queue.
        queue: u16,
    },
    /// The host changes the configuration.
    Change,
    /// The machine is held, saved into a new function, and goes on or not.
    Save,
}

impl<'a> Arbitrary<'a> for Access {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let [tag, part] = u.arbitrary()?;
        let (near, value): (u16, u32) = (u.arbitrary()?, u.arbitrary()?);
        Ok(match tag % 16 {
            0 => Self::Honest,
            1..=5 => Self::Register { which: part, value },
            6 => Self::Read { offset: near.into(), width: part },
            7 => Self::Write { offset: near.into(), width: part, value },
            8..=9 => Self::Config { offset: near, width: part, value },
            10..=11 => Self::Window { field: part, value },
            12 => Self::Vector { vector: near, address: value, masked: part & 1 != 0 },
            13 => Self::Kick { queue: near },
            14 => Self::Change,
            _ => Self::Save,
        })
    }
}

impl Access {
    /// Bytes that are read as this.
    pub fn encode(self) -> [u8; 8] {
        let (tag, part, near, value) = match self {
            Self::Honest => (0, 0, 0, 0),
            Self::Register { which, value } => (1, which, 0, value),
            Self::Read { offset, width } => (6, width, offset as u16, 0),
            Self::Write { offset, width, value } => (7, width, offset as u16, value),
            Self::Config { offset, width, value } => (8, width, offset, value),
            Self::Window { field, value } => (10, field, 0, value),
            Self::Vector { vector, address, masked } => (12, masked.into(), vector, address),
            Self::Kick { queue } => (13, 0, queue, 0),
            Self::Change => (14, 0, 0, 0),
            Self::Save => (15, 0, 0, 0),
        };
        let [a, b] = near.to_le_bytes();
        let [c, d, e, f] = value.to_le_bytes();
        [tag, part, a, b, c, d, e, f]
    }
}

/// A function and its driver.
struct Bench {
    vm: PciDriver,
    load: Box<dyn Load>,
    capabilities: Vec<Capability>,
    number: u16,
    reach: Reach,
}

/// Has a function of this kind live through accesses; what was reached.
///
/// # Panics
/// The function did what it must not.
pub fn live_through(kind: &str, bytes: &[u8]) -> Reach {
    let mut load = load::named(kind);
    let mut vm = PciDriver::new(load.device());
    let capabilities = vm.capabilities();
    vm.set_up_vectors();
    let mut bench = Bench { vm, load, capabilities, number: 500, reach: Reach::default() };
    let mut rest = Unstructured::new(bytes);
    for _ in 0..MAX_OPS {
        let (false, Ok(access)) = (rest.is_empty(), Access::arbitrary(&mut rest)) else { break };
        bench.act(access);
    }
    bench.finish()
}

impl Bench {
    fn act(&mut self, access: Access) {
        let frozen = (self.vm.status() & READY != 0).then(|| self.queues());
        match access {
            Access::Honest => self.honest(),
            Access::Register { which, value } => {
                let (at, width) = COMMON[usize::from(which) % COMMON.len()];
                self.vm.write(self.vm.common, at, &value.to_le_bytes()[..width]);
            }
            Access::Read { offset, width } => {
                let mut data = [0xaa; 8];
                self.vm.function.read_bar(0, offset.into(), &mut data[..1 << (width % 4)]);
            }
            Access::Write { offset, width, value } => {
                let data = [value.to_le_bytes(), value.to_le_bytes()].concat();
                self.vm.function.write_bar(width >> 4 & 1, offset.into(), &data[..1 << (width % 4)]);
            }
            Access::Config { offset, width, value } => self.config(offset, width, value),
            Access::Window { field, value } => self.window(field, value),
            Access::Vector { vector, address, masked } => {
                self.vm.program_vector(vector % 2048, address.into(), address, masked);
            }
            Access::Kick { queue } => self.vm.kick(queue),
            Access::Change => self.vm.function.notify_config_changed(),
            Access::Save => self.save(),
        }
        if let Some(before) = frozen
            && self.vm.status() & READY != 0
            && !matches!(access, Access::Honest)
        {
            assert_eq!(self.queues(), before, "queues are frozen while the driver is ready: {access:?}");
        }
    }

    /// What each queue's registers say, vectors left out: those may change.
    fn queues(&mut self) -> Vec<u32> {
        let selected = self.vm.get16(0x16);
        let mut seen = Vec::new();
        for queue in 0..self.vm.get16(0x12) {
            self.vm.set16(0x16, queue);
            seen.extend([0x18, 0x1c, 0x1e].map(|at| u32::from(self.vm.get16(at))));
            seen.extend([0x20, 0x24, 0x28, 0x2c, 0x30, 0x34].map(|at| self.vm.get32(at)));
        }
        self.vm.set16(0x16, selected);
        seen
    }

    fn config(&mut self, offset: u16, width: u8, value: u32) {
        let offset = usize::from(offset) % (CONFIG_SPACE_SIZE - 4);
        let _ = self.vm.function.write_config(offset, &value.to_le_bytes()[..1 << (width % 3)]);
        self.reach.add("config_writes", 1);
        self.look_at_bars();
    }

    /// Whatever is decoded is as large and as aligned as it was.
    fn look_at_bars(&self) {
        let sizes = self.vm.function.bar_sizes();
        for bar in self.vm.function.bars() {
            assert!(sizes.contains(&(bar.index, bar.size)), "{bar:?}");
            assert_eq!(bar.address % bar.size, 0, "{bar:?}");
        }
    }

    fn window(&mut self, field: u8, value: u32) {
        let (at, width) = [(4, 1), (8, 4), (12, 4), (16, 4)][usize::from(field % 4)];
        let _ = self.vm.function.write_config(self.vm.window + at, &value.to_le_bytes()[..width]);
        self.reach.add("window_writes", 1);
    }

    fn save(&mut self) {
        self.vm.function.pause().unwrap();
        if let Ok(state) = self.vm.function.save() {
            let mut again = PciDriver::in_memory(
                load::named(self.vm.function.kind().name).device(),
                self.vm.memory.clone(),
            );
            again.function.restore(&state).expect("what was saved can be restored");
            assert_eq!(again.function.save().unwrap(), state, "as it was saved");
            self.reach.add("saved", 1);
        }
        self.vm.function.resume().unwrap();
    }

    /// A driver that begins from nothing: reset, discovery as before, empty rings, a request.
    fn honest(&mut self) {
        self.vm.set_status(0);
        assert_eq!(self.vm.status(), 0, "a reset is over at once");
        self.reach.add("resets", 1);
        let found = self.vm.capabilities();
        let shape = |all: &[Capability]| all.iter().map(|one| (one.at, one.id)).collect::<Vec<_>>();
        assert_eq!(shape(&found), shape(&self.capabilities), "capabilities stay where they are");
        let _ = self.vm.function.write_config(4, &6u16.to_le_bytes());
        self.vm.function.assign_bar(0, BAR_ADDRESS);
        let sizes = self.vm.get16(0x12);
        for index in 0..sizes {
            let stale = Driver::new(index, 512, self.vm.memory.clone(), false);
            for ring in [stale.available_ring(), stale.used_ring()] {
                self.vm.memory.write_slice(&[0; 8 << 10], GuestAddress(ring)).unwrap();
            }
        }
        let mut queues = self.vm.start(false);
        let driver = &mut queues[usize::from(self.load.queue())];
        let posted = self.load.probe(driver, self.number);
        for _ in 0..100 {
            self.vm.kick(self.load.queue());
            self.vm.settle();
            if driver.used_index() != 0 {
                break;
            }
        }
        let (head, len) = driver.take().expect("an honest request is answered");
        assert_eq!(head, posted.head);
        self.load.check_probe(driver, self.number, &posted, len);
        self.number = 500 + (self.number - 500 + 1) % 300;
        self.reach.add("answered", 1);
    }

    fn finish(mut self) -> Reach {
        self.reach.add("needs_reset", self.vm.function.needs_reset().into());
        self.honest();
        self.load.intact();
        for counter in self.vm.function.counters() {
            if matches!(counter.name(), "kicks_ignored" | "refused") {
                self.reach.add(counter.name(), counter.get());
            }
        }
        debug_assert!(self.vm.sink.all_signals() < REGION, "a storm of interrupts");
        self.reach
    }
}
