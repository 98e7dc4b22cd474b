//! A running device: the device, its rings and its kicks, as one value that lives in an I/O loop.
//!
//! A task is made when the driver sets `DRIVER_OK`, moved into a loop, and moved back out on reset or
//! pause. While it runs nobody else can reach the device, so there is no lock and no order of locks.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::device::{Io, VirtioDevice, Watch};
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::memory::Memory;
use crate::ring::{Ring, RingState};

/// Event data below this is a queue's kick; the device's own tokens come after.
const FIRST_TOKEN: u32 = 1 << 16;

/// A device with everything it needs to serve its driver.
pub struct DeviceTask {
    device: Box<dyn VirtioDevice>,
    features: u64,
    rings: Vec<Option<Ring>>,
    kicks: Vec<Arc<EventFd>>,
    interrupt: Arc<dyn Interrupt>,
    memory: Arc<Memory>,
    again: Vec<u16>,
    broken: bool,
}

/// What a transport puts into a task.
pub struct TaskParts {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Features the driver accepted.
    pub features: u64,
    /// One per queue, `None` where the driver left it disabled.
    pub rings: Vec<Option<Ring>>,
    /// One non-blocking event per queue.
    pub kicks: Vec<Arc<EventFd>>,
    /// How the device notifies its driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Guest memory.
    pub memory: Arc<Memory>,
}

impl DeviceTask {
    /// A task ready to be attached to a loop.
    pub fn new(parts: TaskParts) -> Self {
        let TaskParts { device, features, rings, kicks, interrupt, memory } = parts;
        Self { device, features, rings, kicks, interrupt, memory, again: Vec::new(), broken: false }
    }

    /// Takes the device out for good: the driver reset it. The rings end here.
    pub fn into_device(mut self) -> Box<dyn VirtioDevice> {
        self.device.stop();
        self.device
    }

    /// Where each ring stands; `None` for disabled queues.
    pub fn ring_states(&self) -> Vec<Option<RingState>> {
        self.rings.iter().map(|ring| ring.as_ref().map(Ring::state)).collect()
    }

    /// The device, to save its state while the task is out of its loop.
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    /// Begins: starts the device and looks at every queue once, for what was posted before the loop listened.
    pub fn start(&mut self, watch: &mut dyn Watch) {
        if self.broken {
            return;
        }
        for (data, kick) in (0u32..).zip(&self.kicks) {
            // Each kick wakes the loop, however many came before: nobody has to read how many.
            let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(source) = watch.add(kick.as_raw_fd(), data, edge) {
                return self.fail(&Error::Device { operation: "watch a queue", source }, watch);
            }
        }
        let features = self.features;
        self.run(watch, |device, io| device.start(features, io));
        for index in 0..u16::try_from(self.kicks.len()).unwrap_or(u16::MAX) {
            self.run(watch, |device, io| device.on_queue(index, io));
        }
    }

    /// Handles one ready file: a queue's kick (`data` below 2^16) or one of the device's own.
    pub fn handle(&mut self, data: u32, events: EventSet, watch: &mut dyn Watch) {
        if let Some(token) = data.checked_sub(FIRST_TOKEN) {
            return self.run(watch, |device, io| device.on_event(token, events, io));
        }
        let Ok(index) = u16::try_from(data) else { return };
        self.run(watch, |device, io| device.on_queue(index, io));
    }

    /// Calls into the device, unless it is broken, and acts on what it leaves behind.
    fn run(
        &mut self,
        watch: &mut dyn Watch,
        call: impl FnOnce(&mut dyn VirtioDevice, &mut Io<'_>) -> Result<(), Error>,
    ) {
        if self.broken {
            return;
        }
        self.rings.iter_mut().flatten().for_each(Ring::begin_turn);
        let mut tokens = DeviceTokens(watch);
        let mut io = Io {
            rings: &mut self.rings,
            interrupt: self.interrupt.as_ref(),
            watch: &mut tokens,
            memory: &self.memory,
            again: &mut self.again,
        };
        if let Err(error) = call(self.device.as_mut(), &mut io) {
            return self.fail(&error, watch);
        }
        for (index, kick) in (0u16..).zip(&self.kicks) {
            let ring = self.rings.get(usize::from(index)).and_then(Option::as_ref);
            if self.again.contains(&index) || ring.is_some_and(Ring::is_unfinished) {
                // Only fails when the counter is full, after 2^64 kicks.
                let _ = kick.write(1);
            }
        }
        self.again.clear();
    }

    /// The device cannot go on: it asks for a reset, and uses no CPU until it gets one.
    fn fail(&mut self, error: &Error, watch: &mut dyn Watch) {
        log::warn!("{} stopped and needs a reset: {error}", self.device.kind().name);
        self.broken = true;
        self.again.clear();
        // A file that stayed ready would wake the loop for ever.
        watch.clear();
        self.device.stop();
        self.interrupt.needs_reset();
    }
}

/// Moves a device's own tokens out of the range of queue kicks.
struct DeviceTokens<'a>(&'a mut dyn Watch);

impl Watch for DeviceTokens<'_> {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.0.add(fd, token.saturating_add(FIRST_TOKEN), events)
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.0.modify(fd, token.saturating_add(FIRST_TOKEN), events)
    }

    fn remove(&mut self, fd: RawFd) -> std::io::Result<()> {
        self.0.remove(fd)
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// The loop's files as [`Watch`], with a list of those that are this task's.
pub(crate) struct LoopWatch<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    files: &'a mut Vec<RawFd>,
}

impl Watch for LoopWatch<'_, '_> {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.ops.add(Events::with_data_raw(fd, token, events)).map_err(std::io::Error::other)?;
        self.files.push(fd);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.ops.modify(Events::with_data_raw(fd, token, events)).map_err(std::io::Error::other)
    }

    fn remove(&mut self, fd: RawFd) -> std::io::Result<()> {
        self.files.retain(|file| *file != fd);
        self.ops.remove(Events::empty_raw(fd)).map_err(std::io::Error::other)
    }

    fn clear(&mut self) {
        for fd in std::mem::take(self.files) {
            let _ = self.ops.remove(Events::empty_raw(fd));
        }
    }
}

/// A task as the event loop's subscriber.
pub(crate) struct Subscriber {
    pub(crate) task: DeviceTask,
    files: Vec<RawFd>,
}

impl Subscriber {
    pub(crate) fn new(task: DeviceTask) -> Self {
        Self { task, files: Vec::new() }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.task.start(&mut LoopWatch { ops, files: &mut self.files });
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut watch = LoopWatch { ops, files: &mut self.files };
        self.task.handle(events.data(), events.event_set(), &mut watch);
    }
}
