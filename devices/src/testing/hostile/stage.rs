//! One kind of device with a hostile driver, step by step on the caller's thread.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::witness::Witness;
use super::{Echo, Entry, Op, Place, Reach, Request, TABLES, TABLES_BYTES, request};
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{EventSet, VirtioDevice};
use crate::memory::{Bytes, GuestAddress};
use crate::testing::load::{self, Load};
use crate::testing::{Descriptor, Driver, Harness, INDIRECT, Posted, WRITE};

/// Rounds of ready files after which a device that still has some spins.
const ROUNDS: usize = 10_000;
/// The first probe, beyond what honest requests name.
const FIRST_PROBE: u16 = 600;

/// One kind of device and all that is done to it.
pub struct Stage {
    name: &'static str,
    load: Box<dyn Load>,
    session: Option<Session>,
    /// Guests of before: nothing of theirs may change any more.
    past: Vec<Witness>,
    counters: Vec<Arc<Counter>>,
    reach: Reach,
}

/// From one reset to the next.
struct Session {
    vm: Harness,
    /// The drivers again, on memory that no device has.
    twins: Vec<Driver>,
    witness: Witness,
    config: Option<Arc<ConfigSpace>>,
    /// Descriptors that honest requests took of each queue.
    taken: BTreeMap<u16, usize>,
    /// Everything so far was what an honest driver does.
    honest: bool,
    /// Somebody wrote over descriptors.
    overwritten: bool,
}

impl Session {
    fn start(device: Box<dyn VirtioDevice>, features: u64, event_idx: bool, name: &str) -> Self {
        let config = device.config();
        let mut vm = Harness::with(device, features, event_idx);
        let memory = Arc::clone(vm.memory());
        let same: Vec<_> =
            (0..vm.queues()).map(|queue| vm.driver(queue).moved_to(Arc::clone(&memory))).collect();
        let witness = Witness::new(memory, &same, name == "balloon");
        let twins = same.iter().map(|driver| driver.moved_to(Arc::clone(&witness.twin))).collect();
        let (taken, honest, overwritten) = (BTreeMap::new(), true, false);
        Self { vm, twins, witness, config, taken, honest, overwritten }
    }

    fn queue(&self, queue: u8) -> u16 {
        u16::from(queue) % self.vm.queues()
    }

    /// The guest does something with a queue: once where the device sees it, once where it does not.
    fn guest<T>(&mut self, queue: u16, does: impl Fn(&mut Driver) -> T) -> T {
        does(&mut self.twins[usize::from(queue)]);
        does(self.vm.driver(queue))
    }

    fn post(&mut self, request: &Request) {
        let queue = request.queue % self.vm.queues();
        let readable: Vec<_> = request.readable.iter().map(Vec::as_slice).collect();
        let posted = self.guest(queue, |driver| driver.post(&readable, &request.writable));
        self.note(queue, readable.len(), &posted);
    }

    fn note(&mut self, queue: u16, readable: usize, posted: &Posted) {
        for (address, len) in &posted.writable {
            self.witness.may_write(*address, *len);
        }
        // One that posts over what the device has is no honest driver.
        let taken = self.taken.entry(queue).or_default();
        *taken += readable + posted.writable.len();
        self.honest &= *taken <= usize::from(self.twins[usize::from(queue)].size());
    }

    fn address(&mut self, place: Place) -> u64 {
        let queue = self.queue(place.queue);
        place.address(self.vm.driver(queue))
    }

    fn descriptor(&mut self, entry: Entry) -> Descriptor {
        let (address, len) = (self.address(entry.place), entry.length.bytes());
        let descriptor = Descriptor { address, len, flags: u16::from(entry.flags), next: entry.next };
        self.account(descriptor);
        descriptor
    }

    /// What a descriptor has the device write.
    fn account(&mut self, descriptor: Descriptor) {
        let Descriptor { address, len, flags, .. } = descriptor;
        if flags & WRITE != 0 {
            self.witness.may_write(address, len);
        }
        let end = address.saturating_add(len.into());
        if flags & INDIRECT != 0 && (address < TABLES || end > TABLES + TABLES_BYTES) {
            self.witness.look_away();
        }
    }

    fn describe(&mut self, entry: Entry) {
        let queue = self.queue(entry.place.queue);
        let descriptor = self.descriptor(entry);
        let index = entry.index % self.twins[usize::from(queue)].size();
        self.guest(queue, |driver| driver.describe(index, descriptor));
    }

    fn describe_elsewhere(&mut self, entry: Entry) {
        let descriptor = self.descriptor(entry);
        let index = entry.index % (TABLES_BYTES / 16) as u16;
        self.guest(0, |driver| driver.describe_at(TABLES, index, descriptor));
    }

    fn bytes(&mut self, place: Place, value: u32) {
        let at = GuestAddress(self.address(place));
        let value = u64::from(value) << 32 | u64::from(value);
        // Where there is no memory, nothing is written.
        let written = self.guest(0, |driver| driver.memory().write_obj(value, at).is_ok());
        if written && at.0 + 8 > TABLES && at.0 < TABLES + TABLES_BYTES {
            self.witness.look_away();
        }
        self.overwritten |= written;
    }

    /// Takes account of descriptors that the guest wrote otherwise than as such.
    fn take_account(&mut self) {
        if !std::mem::take(&mut self.overwritten) {
            return;
        }
        for queue in 0..self.twins.len() {
            let twin = &self.twins[queue];
            let table = twin.posted_at(twin.table(), usize::from(twin.size()) * 16);
            for bytes in table.chunks_exact(16) {
                let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                self.account(Descriptor {
                    address: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
                    len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
                    flags: word(12),
                    next: word(14),
                });
            }
        }
    }

    fn poll_until_quiet(&mut self) {
        let quiet = (0..ROUNDS).any(|_| self.vm.poll() == 0);
        assert!(quiet, "the device spins");
    }
}

impl Stage {
    /// A new device of the kind called `kind`, or, for any other name, the ring alone.
    pub fn of(kind: &str) -> Self {
        let found = load::all().into_iter().find(|(name, _)| *name == kind);
        let (name, mut load) = found.unwrap_or_else(|| ("echo", Box::new(Echo)));
        let device = load.device();
        let counters = device.counters();
        let features = device.features();
        let session = Some(Session::start(device, features, false, name));
        Self { name, load, session, past: Vec::new(), counters, reach: Reach::default() }
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().unwrap()
    }

    /// Does one thing.
    pub fn act(&mut self, op: Op) {
        let name = self.name;
        let session = self.session.as_mut().unwrap();
        let honest = matches!(op, Op::Ask { .. } | Op::Kick { .. } | Op::Poll | Op::Host { .. } | Op::Pause);
        session.honest &= honest || matches!(op, Op::Config { .. } | Op::Reset { .. });
        match op {
            Op::Ask { variety, value } => {
                let request = request(name, variety, value);
                session.post(&request);
                self.reach.add("asked", 1);
                self.step(|vm| vm.kick(request.queue % vm.queues()));
            }
            Op::Describe(entry) => session.describe(entry),
            Op::Indirect(entry) => session.describe_elsewhere(entry),
            Op::Offer { queue, head } => session.guest(session.queue(queue), |driver| driver.offer(head)),
            Op::Jump { queue, by } => {
                session.guest(session.queue(queue), |driver| driver.jump(by));
            }
            Op::Flags { queue, flags } => {
                session.guest(session.queue(queue), |driver| driver.set_flags(flags))
            }
            Op::UsedEvent { queue, event } => {
                session.guest(session.queue(queue), |driver| driver.set_used_event(event));
            }
            Op::Bytes { place, value } => session.bytes(place, value),
            Op::Kick { queue } => self.step(|vm| vm.kick(u16::from(queue) % vm.queues())),
            Op::Poll => self.step(|vm| {
                vm.poll();
            }),
            Op::Deliver { token, events } => {
                let events =
                    [EventSet::IN, EventSet::OUT, EventSet::IN | EventSet::OUT][usize::from(events % 3)];
                self.step(|vm| vm.deliver(token.into(), events));
            }
            Op::Host { what, much } => self.load.host(what, much),
            Op::Config { offset, value } => self.configure(offset, value),
            Op::Pause => self.step(Harness::pause_and_resume),
            Op::Reset { event_idx, without } => self.reset(event_idx, without),
        }
    }

    /// The device works.
    fn step(&mut self, work: impl FnOnce(&mut Harness)) {
        let session = self.session.as_mut().unwrap();
        session.take_account();
        let used = |session: &Session| session.twins_used();
        let before = used(session);
        work(&mut session.vm);
        let answered = before.iter().zip(used(session)).map(|(old, new)| u64::from(new.wrapping_sub(*old)));
        self.reach.add("answered", answered.sum());
        assert!(
            !session.honest || !session.vm.asked_for_reset(),
            "{} asks for a reset, and its driver did nothing wrong",
            self.name
        );
    }

    fn configure(&mut self, offset: u16, value: Option<u32>) {
        let Some(space) = &self.session().config else { return };
        match value {
            Some(value) => space.write(offset.into(), &value.to_le_bytes()),
            None => space.read(offset.into(), &mut [0; 8]),
        }
    }

    /// Ends a session: what the device did in it was its to do.
    fn end(&mut self) -> Box<dyn VirtioDevice> {
        let Session { vm, mut witness, .. } = self.session.take().unwrap();
        self.reach.add("refused", vm.counters().refused.get());
        self.reach.add("interrupts", vm.counters().interrupts.get());
        self.reach.add("needs_reset", vm.asked_for_reset().into());
        self.reach.add("unjudged", witness.is_blind().into());
        witness.check(self.name);
        self.past.push(witness);
        vm.reset()
    }

    fn reset(&mut self, event_idx: bool, without: u32) {
        let device = self.end();
        let offered = device.features();
        let some = offered & !u64::from(without);
        let features = if device.accepts(some) { some } else { offered };
        self.reach.add("resets", 1);
        self.session = Some(Session::start(device, features, event_idx, self.name));
    }

    /// Lets the device do what is left to do, resets it, and has it answer an honest request. What was reached.
    pub fn finish(mut self) -> Reach {
        self.act(Op::Ask { variety: 0, value: 7 });
        for queue in 0..self.session().vm.queues() {
            self.step(|vm| vm.kick(queue));
        }
        self.session().poll_until_quiet();
        let device = self.end();
        let features = device.features();
        let mut vm = Harness::with(device, features, false);
        let queue = self.load.queue();
        let posted = self.load.probe(vm.driver(queue), FIRST_PROBE);
        vm.kick(queue);
        let Some((head, len)) = vm.driver(queue).take() else {
            panic!("{} answers nothing after a reset", self.name);
        };
        assert_eq!((head, vm.asked_for_reset()), (posted.head, false), "{}", self.name);
        self.load.check_probe(vm.driver(queue), FIRST_PROBE, &posted, len);
        self.reach.add("works_after", 1);
        self.load.intact();
        for witness in &mut self.past {
            witness.check(self.name);
        }
        for counter in &self.counters {
            self.reach.add(counter.name(), counter.get());
        }
        self.reach
    }
}

impl Session {
    /// Used indexes as the device published them.
    fn twins_used(&self) -> Vec<u16> {
        let memory = self.vm.memory();
        self.twins.iter().map(|twin| twin.moved_to(Arc::clone(memory)).used_index()).collect()
    }
}
