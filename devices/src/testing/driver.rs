//! The guest's side of one queue: posts chains as a driver does, or writes any nonsense.

use std::sync::Arc;

use super::{HIGH, NEXT, WRITE};
use crate::memory::{Bytes, GuestAddress, Memory};
use crate::ring::{Ring, RingCounters, RingOptions, RingState};

/// A chain that was posted: where its writable buffers lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Posted {
    /// Head descriptor.
    pub head: u16,
    /// Writable buffers: address and length.
    pub writable: Vec<(u64, u32)>,
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the following descriptor, if [`NEXT`].
    pub next: u16,
}

/// The guest's side of one queue.
#[derive(Debug)]
pub struct Driver {
    index: u16,
    size: u16,
    memory: Arc<Memory>,
    event_idx: bool,
    available: u16,
    used: u16,
    next_descriptor: u16,
    next_buffer: u64,
    piece: u32,
}

impl Driver {
    /// A queue of `size` entries; queue `index` has its own 128 KiB for rings and 1 MiB for buffers.
    pub fn new(index: u16, size: u16, memory: Arc<Memory>, event_idx: bool) -> Self {
        let next_buffer = Self::buffers(index);
        let (available, used, next_descriptor, piece) = (0, 0, 0, u32::MAX);
        Self { index, size, memory, event_idx, available, used, next_descriptor, next_buffer, piece }
    }

    /// The same driver, which from now on cuts its buffers: none is longer than `piece` bytes.
    #[must_use]
    pub fn in_pieces_of(self, piece: u32) -> Self {
        Self { piece, ..self }
    }

    /// Lets both rings begin at `position`, as if so many chains had gone through already.
    pub fn begin_at(&mut self, position: u16) -> RingState {
        self.used = position;
        self.memory.write_obj(position, GuestAddress(self.used_ring() + 2)).unwrap();
        self.set_available_index(position);
        RingState { next_available: position, next_used: position, ..self.registers() }
    }

    /// The same driver on a copy of its memory, as after a restore.
    #[must_use]
    pub fn moved_to(&self, memory: Arc<Memory>) -> Self {
        Self { memory, ..*self }
    }

    fn buffers(index: u16) -> u64 {
        HIGH + u64::from(index) * (1 << 20)
    }

    /// Entries of the queue.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Address of the mebibyte that its buffers lie in.
    pub fn buffers_at(&self) -> u64 {
        Self::buffers(self.index)
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Address of the descriptor table.
    pub fn table(&self) -> u64 {
        0x10_0000 + u64::from(self.index) * 0x2_0000
    }

    /// Address of the available ring.
    pub fn available_ring(&self) -> u64 {
        self.table() + 0x1_0000
    }

    /// Address of the used ring.
    pub fn used_ring(&self) -> u64 {
        self.table() + 0x1_8000
    }

    /// The registers a driver would program.
    pub fn registers(&self) -> RingState {
        RingState {
            size: self.size,
            descriptors: self.table(),
            available: self.available_ring(),
            used: self.used_ring(),
            next_available: 0,
            next_used: 0,
        }
    }

    /// The device's side of this queue.
    pub fn ring(&self) -> Ring {
        self.ring_with(RingCounters::default())
    }

    /// The device's side of this queue, which counts here.
    pub fn ring_with(&self, counters: RingCounters) -> Ring {
        let options =
            RingOptions { index: self.index, max_size: self.size, event_idx: self.event_idx, indirect: true };
        Ring::new(self.registers(), options, Arc::clone(&self.memory), counters).unwrap()
    }

    /// Posts a chain: `readable` buffers with their bytes, then `writable` buffers of these sizes.
    pub fn post(&mut self, readable: &[&[u8]], writable: &[u32]) -> Posted {
        let head = self.next_descriptor;
        let readable: Vec<_> = readable.iter().flat_map(|bytes| self.cut(bytes)).collect();
        let writable: Vec<_> = writable.iter().flat_map(|len| self.cut_len(*len)).collect();
        let total = readable.len() + writable.len();
        let mut posted = Posted { head, writable: Vec::new() };
        for i in 0..total {
            let (address, len, flags) = match readable.get(i) {
                Some(bytes) => {
                    let address = self.place(u32::try_from(bytes.len()).unwrap());
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (address, u32::try_from(bytes.len()).unwrap(), 0)
                }
                None => {
                    let len = writable[i - readable.len()];
                    let address = self.place(len);
                    posted.writable.push((address, len));
                    (address, len, WRITE)
                }
            };
            let this = self.next_descriptor;
            self.next_descriptor = (this + 1) % self.size;
            let more = if i + 1 < total { NEXT } else { 0 };
            self.describe(this, Descriptor { address, len, flags: flags | more, next: self.next_descriptor });
        }
        self.offer(head);
        posted
    }

    /// The pieces of a buffer; of an empty one it is itself.
    fn cut<'a>(&self, bytes: &'a [u8]) -> Vec<&'a [u8]> {
        if bytes.is_empty() { vec![bytes] } else { bytes.chunks(self.piece as usize).collect() }
    }

    fn cut_len(&self, len: u32) -> Vec<u32> {
        let whole = len / self.piece;
        let rest = len % self.piece;
        let rest = (rest > 0 || len == 0).then_some(rest);
        (0..whole).map(|_| self.piece).chain(rest).collect()
    }

    fn place(&mut self, len: u32) -> u64 {
        if self.next_buffer + u64::from(len) > Self::buffers(self.index) + (1 << 20) {
            self.next_buffer = Self::buffers(self.index);
        }
        let address = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(16);
        address
    }

    /// Writes one descriptor, sensible or not.
    pub fn describe(&self, index: u16, descriptor: Descriptor) {
        self.describe_at(self.table(), index, descriptor);
    }

    /// Writes one descriptor of a table elsewhere.
    pub fn describe_at(&self, table: u64, index: u16, descriptor: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        let at = table + u64::from(index) * 16;
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory.write_obj(index, GuestAddress(self.available_ring() + 2)).unwrap();
    }

    /// Moves the available index on by `entries`, with nothing offered.
    pub fn jump(&mut self, entries: u16) {
        self.set_available_index(self.available.wrapping_add(entries));
    }

    /// Sets `used_event`: notify me once the used index has passed `index`.
    pub fn set_used_event(&self, index: u16) {
        let at = self.available_ring() + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Sets the available ring's flags.
    pub fn set_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.available_ring())).unwrap();
    }

    /// The used index as the device published it.
    pub fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap()
    }

    /// Takes the next used entry: head and length.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let entry = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let id: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((u16::try_from(id).unwrap(), len))
    }

    /// The bytes of a posted chain's writable buffers as they are now.
    pub fn written(&self, posted: &Posted) -> Vec<u8> {
        let mut all = Vec::new();
        for (address, len) in &posted.writable {
            let mut bytes = vec![0; *len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(*address)).unwrap();
            all.extend(bytes);
        }
        all
    }

    /// Guest memory as it is now.
    pub fn posted_at(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}
