//! A driver and a guest made of plain memory, for tests of devices without a machine.
//!
//! [`Harness`] runs one device on the test's own thread, step by step: nothing happens between calls.
//! [`Driver`] is the guest's side of one queue; its raw methods can also build nonsense.

pub mod pci;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{EventSet, VirtioDevice, Watch};
use crate::interrupt::Interrupt;
use crate::memory::{Bytes, GuestAddress, Memory};
use crate::ring::{Ring, RingCounters, RingOptions, RingState};
use crate::task::{DeviceTask, TaskParts};

/// Bytes of each of the two regions of a test guest.
pub const REGION: u64 = 8 << 20;
/// Start of the second region; a hole lies before it.
pub const HIGH: u64 = 32 << 20;

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = 4;

/// Two regions of zeroed guest memory with a hole between them.
pub fn memory() -> Arc<Memory> {
    let ranges = [(GuestAddress(0), REGION as usize), (GuestAddress(HIGH), REGION as usize)];
    Arc::new(Memory::from_ranges(&ranges).unwrap())
}

/// Records what a device told its driver.
#[derive(Debug, Default)]
pub struct Recorder {
    queues: Mutex<BTreeMap<u16, u64>>,
    config: AtomicU64,
    reset: AtomicU64,
}

impl Interrupt for Recorder {
    fn queue(&self, index: u16) {
        *self.queues.lock().unwrap().entry(index).or_default() += 1;
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.reset.fetch_add(1, Ordering::SeqCst);
    }
}

impl Recorder {
    /// Notifications of queue `index`.
    pub fn queue_count(&self, index: u16) -> u64 {
        self.queues.lock().unwrap().get(&index).copied().unwrap_or(0)
    }
}

/// What a device watches.
#[derive(Debug, Default)]
pub struct Watched(BTreeMap<RawFd, (u32, EventSet)>);

impl Watch for Watched {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        match self.0.insert(fd, (token, events)) {
            None => Ok(()),
            Some(_) => Err(std::io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        *self.0.get_mut(&fd).ok_or(std::io::ErrorKind::NotFound)? = (token, events);
        Ok(())
    }

    fn remove(&mut self, fd: RawFd) -> std::io::Result<()> {
        self.0.remove(&fd).map(drop).ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// One device, started, with a driver on each queue.
pub struct Harness {
    task: DeviceTask,
    drivers: Vec<Driver>,
    kicks: Vec<Arc<EventFd>>,
    recorder: Arc<Recorder>,
    watched: Watched,
    memory: Arc<Memory>,
}

impl Harness {
    /// Starts `device` with everything it offers accepted, `EVENT_IDX` off and `INDIRECT_DESC` on.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let features = device.features();
        Self::with(device, features, false)
    }

    /// Starts `device` with exactly `features` accepted.
    pub fn with(device: Box<dyn VirtioDevice>, features: u64, event_idx: bool) -> Self {
        let memory = memory();
        let recorder = Arc::new(Recorder::default());
        let mut drivers = Vec::new();
        let mut rings = Vec::new();
        let mut kicks = Vec::new();
        for (index, size) in (0u16..).zip(device.queues()) {
            let driver = Driver::new(index, *size, Arc::clone(&memory), event_idx);
            rings.push(Some(driver.ring()));
            drivers.push(driver);
            kicks.push(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        }
        let mut task = DeviceTask::new(TaskParts {
            device,
            features,
            rings,
            kicks: kicks.clone(),
            interrupt: recorder.clone(),
            memory: memory.clone(),
        });
        let mut watched = Watched::default();
        task.start(&mut watched);
        Self { task, drivers, kicks, recorder, watched, memory }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The driver of queue `index`.
    pub fn driver(&mut self, index: u16) -> &mut Driver {
        &mut self.drivers[usize::from(index)]
    }

    /// Kicks queue `index` and lets the device work until it asks for no further turn.
    pub fn kick(&mut self, index: u16) {
        self.kicks[usize::from(index)].write(1).unwrap();
        self.settle();
    }

    /// Delivers every signalled kick, until there is none.
    pub fn settle(&mut self) {
        for _ in 0..100_000 {
            let Some(index) = self.kicks.iter().position(|kick| kick.read().is_ok()) else { return };
            self.task.handle(u32::try_from(index).unwrap(), EventSet::IN, &mut self.watched);
        }
        panic!("the device spins");
    }

    /// Delivers each watched back-end file that is ready now, once. Returns how many were.
    pub fn poll(&mut self) -> usize {
        let files: Vec<_> =
            self.watched.0.iter().map(|(fd, (token, events))| (*fd, *token, *events)).collect();
        let mut ready = 0;
        for (fd, token, events) in files {
            if self.kicks.iter().any(|kick| std::os::fd::AsRawFd::as_raw_fd(kick.as_ref()) == fd) {
                continue;
            }
            let wanted = i16::try_from(events.bits() & 0x7fff).unwrap();
            let mut poll = libc::pollfd { fd, events: wanted, revents: 0 };
            // SAFETY: one valid pollfd, no timeout.
            #[allow(unsafe_code)]
            let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
            if n == 1 {
                ready += 1;
                let events = EventSet::from_bits_truncate(u32::try_from(poll.revents).unwrap());
                self.task.handle(token, events, &mut self.watched);
            }
        }
        self.settle();
        ready
    }

    /// Delivers an event of one of the device's own files, ready or not.
    pub fn deliver(&mut self, token: u32, events: EventSet) {
        self.task.handle((1 << 16) + token, events, &mut self.watched);
        self.settle();
    }

    /// The machine is paused and goes on: the device leaves its loop and enters another.
    pub fn pause_and_resume(&mut self) {
        self.watched.clear();
        self.task.start(&mut self.watched);
        self.settle();
    }

    /// How many files besides the queues' kicks are watched.
    pub fn watched_files(&self) -> usize {
        self.watched.0.values().filter(|(token, _)| *token >= 1 << 16).count()
    }

    /// Where the device stands on queue `index`, as it would be saved.
    pub fn ring_state(&self, index: u16) -> RingState {
        self.task.ring_states()[usize::from(index)].unwrap()
    }

    /// Notifications sent for queue `index`.
    pub fn interrupts(&self, index: u16) -> u64 {
        self.recorder.queue_count(index)
    }

    /// Configuration-change notifications sent.
    pub fn config_changes(&self) -> u64 {
        self.recorder.config.load(Ordering::SeqCst)
    }

    /// Whether the device asked for a reset.
    pub fn asked_for_reset(&self) -> bool {
        self.recorder.reset.load(Ordering::SeqCst) > 0
    }

    /// The driver resets the device; it comes out as it would go back to its transport.
    pub fn reset(mut self) -> Box<dyn VirtioDevice> {
        self.watched.clear();
        self.task.into_device()
    }
}

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
}

impl Driver {
    /// A queue of `size` entries; queue `index` has its own 128 KiB for rings and 1 MiB for buffers.
    pub fn new(index: u16, size: u16, memory: Arc<Memory>, event_idx: bool) -> Self {
        let next_buffer = Self::buffers(index);
        Self { index, size, memory, event_idx, available: 0, used: 0, next_descriptor: 0, next_buffer }
    }

    /// Lets both rings begin at `position`, as if so many chains had gone through already.
    pub fn begin_at(&mut self, position: u16) -> RingState {
        self.used = position;
        self.memory.write_obj(position, GuestAddress(self.used_ring() + 2)).unwrap();
        self.set_available_index(position);
        RingState { next_available: position, next_used: position, ..self.registers() }
    }

    fn buffers(index: u16) -> u64 {
        HIGH + u64::from(index) * (1 << 20)
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
        let options =
            RingOptions { index: self.index, max_size: self.size, event_idx: self.event_idx, indirect: true };
        Ring::new(self.registers(), options, Arc::clone(&self.memory), RingCounters::default()).unwrap()
    }

    /// Posts a chain: `readable` buffers with their bytes, then `writable` buffers of these sizes.
    pub fn post(&mut self, readable: &[&[u8]], writable: &[u32]) -> Posted {
        let head = self.next_descriptor;
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
