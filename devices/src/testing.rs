//! A driver and a guest made of plain memory, for tests of devices without a machine.
//!
//! [`Harness`] runs one device on the test's own thread, step by step: nothing happens between calls.
//! [`Driver`] is the guest's side of one queue; its raw methods can also build nonsense.

pub mod conformance;
mod driver;
pub mod hostile;
pub mod load;
pub mod pci;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{EventSet, VirtioDevice, Watch};
use crate::interrupt::Interrupt;
use crate::memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, Memory};
use crate::ring::{RingCounters, RingState};
use crate::task::{DeviceTask, TaskParts};

pub use driver::{Descriptor, Driver, Posted};

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
    Arc::new(Memory::anonymous(&ranges).unwrap())
}

/// A copy of a test guest's memory, whose untouched pages stay untouched.
pub fn copy(memory: &Memory) -> Arc<Memory> {
    let (copy, mut page, zeroes) = (self::memory(), vec![0; 4096], vec![0; 4096]);
    for region in memory.iter() {
        for at in (region.start_addr().0..).step_by(4096).take((region.len() / 4096) as usize) {
            memory.read_slice(&mut page, GuestAddress(at)).unwrap();
            if page != zeroes {
                copy.write_slice(&page, GuestAddress(at)).unwrap();
            }
        }
    }
    copy
}

/// Pages of a test guest's memory that somebody touched, by their addresses.
pub fn touched(memory: &Memory) -> Vec<u64> {
    let mut pages = Vec::new();
    for region in memory.iter() {
        let mut there = vec![0u8; (region.mapped() / 4096) as usize];
        let len = there.len() * 4096;
        // SAFETY: the region is mapped as long as it is borrowed, and the list has a byte for each of its pages.
        #[allow(unsafe_code)]
        let done = unsafe { libc::mincore(region.as_ptr().cast(), len, there.as_mut_ptr()) };
        assert_eq!(done, 0, "a mapped region");
        let at = (region.start_addr().0..).step_by(4096);
        pages.extend(at.zip(there).filter(|(_, there)| there & 1 != 0).map(|(at, _)| at));
    }
    pages
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
    counters: RingCounters,
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
        let counters = RingCounters::default();
        for (index, size) in (0u16..).zip(device.queues()) {
            let driver = Driver::new(index, *size, Arc::clone(&memory), event_idx);
            rings.push(Some(driver.ring_with(counters.clone())));
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
        Self { task, drivers, kicks, recorder, watched, memory, counters }
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

    /// What the device's rings count, over all of them.
    pub fn counters(&self) -> &RingCounters {
        &self.counters
    }

    /// How many queues there are.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.drivers.len()).unwrap()
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
