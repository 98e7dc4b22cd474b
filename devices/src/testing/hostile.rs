//! What a hostile driver does, as a language: any bytes are a sequence of [`Op`]s, and where they end an honest
//! conversation follows. A [`Stage`] has one kind of device live through it and looks at what is left.

mod echo;
pub mod function;
mod requests;
mod stage;
#[cfg(test)]
mod tests;
mod witness;

use std::collections::BTreeMap;

use arbitrary::{Arbitrary, Unstructured};

pub use echo::Echo;
pub use requests::{Request, request};
pub use stage::Stage;

use super::{Driver, HIGH, REGION};

/// Most operations of a sequence.
pub const MAX_OPS: usize = 64;
/// Bytes of an operation.
pub const OP_BYTES: usize = 18;
/// Where tables of indirect descriptors lie: behind all rings.
pub const TABLES: u64 = 0x30_0000;
/// Bytes of them.
pub const TABLES_BYTES: u64 = 0x1_0000;

/// One thing that a driver, or somebody on the host's side, does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A request as drivers of this kind make them, and a kick.
    Ask {
        /// Which of the kind's requests.
        variety: u8,
        /// What varies in it.
        value: u32,
    },
    /// A descriptor of a queue's table.
    Describe(Entry),
    /// A descriptor of a table elsewhere.
    Indirect(Entry),
    /// A head is made available.
    Offer {
        /// Of this queue.
        queue: u8,
        /// Any number.
        head: u16,
    },
    /// The available index moves on, with nothing offered.
    Jump {
        /// Of this queue.
        queue: u8,
        /// By so many.
        by: u16,
    },
    /// Flags of the available ring.
    Flags {
        /// Of this queue.
        queue: u8,
        /// Any.
        flags: u16,
    },
    /// When the driver wants to be told.
    UsedEvent {
        /// Of this queue.
        queue: u8,
        /// Any index.
        event: u16,
    },
    /// Eight bytes of memory.
    Bytes {
        /// Where.
        place: Place,
        /// What, twice.
        value: u32,
    },
    /// A kick.
    Kick {
        /// Of this queue.
        queue: u8,
    },
    /// The files that are ready are delivered.
    Poll,
    /// An event of a file that need not be ready.
    Deliver {
        /// The device's name for the file.
        token: u16,
        /// 1 to read, 2 to write.
        events: u8,
    },
    /// Something happens on the host's side.
    Host {
        /// What.
        what: u8,
        /// How much of it.
        much: u16,
    },
    /// An access to the configuration space.
    Config {
        /// Any offset.
        offset: u16,
        /// What is written; nothing, for a read.
        value: Option<u32>,
    },
    /// The machine is paused and goes on.
    Pause,
    /// The device is reset and started anew.
    Reset {
        /// With events for single entries.
        event_idx: bool,
        /// Without these of the features it offers.
        without: u32,
    },
}

/// A descriptor, sensible or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which descriptor of the table.
    pub index: u16,
    /// Where its buffer lies; in whose rings, too.
    pub place: Place,
    /// How long it is.
    pub length: Length,
    /// Its flags.
    pub flags: u8,
    /// The one after it.
    pub next: u16,
}

/// A place in memory, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which part of the address space: see [`Place::address`].
    pub part: u8,
    /// Of this queue, if it is one that queues have.
    pub queue: u8,
    /// How far into it.
    pub offset: u32,
}

impl Place {
    /// Parts that there are.
    pub const PARTS: u8 = 12;

    /// The guest's address of it, where `driver` is that of its queue.
    pub fn address(self, driver: &Driver) -> u64 {
        let offset = u64::from(self.offset);
        match self.part % Self::PARTS {
            0 => driver.buffers_at() + offset % (1 << 20),
            1 => 0x40_0000 + offset % 0x40_0000,
            2 => REGION + offset % (HIGH - REGION),
            3 => REGION - 1 - offset % 64,
            4 => HIGH + REGION - 1 - offset % 64,
            5 => driver.table() + offset % 0x1_0000,
            6 => driver.available_ring() + offset % 0x8000,
            7 => driver.used_ring() + offset % 0x8000,
            8 => TABLES + ((offset % TABLES_BYTES) & !15),
            9 => u64::MAX - offset % 64,
            10 => HIGH + REGION + offset,
            _ => offset,
        }
    }
}

/// A length, of which most are sensible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length(pub u32);

impl Length {
    /// Exactly so many bytes, below 64 KiB.
    pub fn of(bytes: u16) -> Self {
        Self(u32::from(bytes) << 3 | 5)
    }

    /// So many bytes less than 4 GiB.
    pub fn short_of_4_gib(by: u8) -> Self {
        Self(u32::from(by) << 3 | 7)
    }

    /// Bytes.
    pub fn bytes(self) -> u32 {
        let Self(code) = self;
        match code & 7 {
            0..=4 => code >> 3 & 0xfff,
            5 => code >> 3 & 0xffff,
            6 => 0,
            _ => u32::MAX - (code >> 3 & 0xff),
        }
    }
}

/// An operation as its bytes: which it is, and what it may be about.
#[derive(Clone, Copy, Default)]
struct Word {
    tag: u8,
    queue: u8,
    part: u8,
    flags: u8,
    a: u16,
    b: u16,
    c: u32,
    d: u32,
}

impl Word {
    fn entry(self) -> Entry {
        let place = Place { part: self.part, queue: self.queue, offset: self.d };
        Entry { index: self.a, place, length: Length(self.c), flags: self.flags, next: self.b }
    }

    fn of_entry(tag: u8, entry: Entry) -> Self {
        let Entry { index, place: Place { part, queue, offset }, length, flags, next } = entry;
        Self { tag, queue, part, flags, a: index, b: next, c: length.0, d: offset }
    }
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let [tag, queue, part, flags, _, _] = u.arbitrary()?;
        let (a, b, c, d) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
        let word = Word { tag, queue, part, flags, a, b, c, d };
        Ok(match tag % 20 {
            0..=4 => Self::Ask { variety: flags, value: c },
            5..=6 => Self::Describe(word.entry()),
            7 => Self::Indirect(word.entry()),
            8..=9 => Self::Offer { queue, head: a },
            10 => Self::Jump { queue, by: a },
            11 => Self::Flags { queue, flags: a },
            12 => Self::UsedEvent { queue, event: a },
            13 => Self::Bytes { place: word.entry().place, value: c },
            14 => Self::Kick { queue },
            15 => Self::Poll,
            16 => Self::Host { what: flags, much: a },
            17 => Self::Config { offset: a, value: (flags & 1 != 0).then_some(c) },
            18 if flags & 1 == 0 => Self::Pause,
            18 => Self::Deliver { token: a, events: flags >> 1 },
            _ => Self::Reset { event_idx: flags & 1 != 0, without: c },
        })
    }
}

impl Op {
    /// Bytes that are read as this.
    pub fn encode(self) -> [u8; OP_BYTES] {
        let none = Word::default();
        let word = match self {
            Self::Ask { variety, value } => Word { tag: 0, flags: variety, c: value, ..none },
            Self::Describe(entry) => Word::of_entry(5, entry),
            Self::Indirect(entry) => Word::of_entry(7, entry),
            Self::Offer { queue, head } => Word { tag: 8, queue, a: head, ..none },
            Self::Jump { queue, by } => Word { tag: 10, queue, a: by, ..none },
            Self::Flags { queue, flags } => Word { tag: 11, queue, a: flags, ..none },
            Self::UsedEvent { queue, event } => Word { tag: 12, queue, a: event, ..none },
            Self::Bytes { place: Place { part, queue, offset }, value } => {
                Word { tag: 13, queue, part, c: value, d: offset, ..none }
            }
            Self::Kick { queue } => Word { tag: 14, queue, ..none },
            Self::Poll => Word { tag: 15, ..none },
            Self::Host { what, much } => Word { tag: 16, flags: what, a: much, ..none },
            Self::Config { offset, value } => {
                Word { tag: 17, flags: value.is_some().into(), a: offset, c: value.unwrap_or(0), ..none }
            }
            Self::Pause => Word { tag: 18, ..none },
            Self::Deliver { token, events } => Word { tag: 18, flags: events << 1 | 1, a: token, ..none },
            Self::Reset { event_idx, without } => {
                Word { tag: 19, flags: event_idx.into(), c: without, ..none }
            }
        };
        let mut bytes = [0; OP_BYTES];
        bytes[..4].copy_from_slice(&[word.tag, word.queue, word.part, word.flags]);
        bytes[6..8].copy_from_slice(&word.a.to_le_bytes());
        bytes[8..10].copy_from_slice(&word.b.to_le_bytes());
        bytes[10..14].copy_from_slice(&word.c.to_le_bytes());
        bytes[14..18].copy_from_slice(&word.d.to_le_bytes());
        bytes
    }
}

/// The operations that bytes are.
pub fn decode(bytes: &[u8]) -> Vec<Op> {
    let mut rest = Unstructured::new(bytes);
    let mut ops = Vec::new();
    while !rest.is_empty()
        && ops.len() < MAX_OPS
        && let Ok(op) = Op::arbitrary(&mut rest)
    {
        ops.push(op);
    }
    ops
}

/// The bytes of operations.
pub fn encode(ops: &[Op]) -> Vec<u8> {
    ops.iter().flat_map(|op| op.encode()).collect()
}

/// What sequences reached, counted by name.
#[derive(Clone, Debug, Default)]
pub struct Reach(BTreeMap<&'static str, u64>);

impl Reach {
    /// Counts `n` more.
    pub fn add(&mut self, name: &'static str, n: u64) {
        *self.0.entry(name).or_default() += n;
    }

    /// How many so far.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds what others reached.
    pub fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(name, n)| self.add(name, *n));
    }

    /// All names and counts.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.0.iter().map(|(name, n)| (*name, *n))
    }
}

/// Has a new device of this kind live through `bytes`; what was reached.
///
/// # Panics
/// The device did what it must not.
pub fn live_through(kind: &str, bytes: &[u8]) -> Reach {
    let mut stage = Stage::of(kind);
    decode(bytes).into_iter().for_each(|op| stage.act(op));
    stage.finish()
}
