//! Every kind of device, saved at every interesting moment and restored on a copy of its guest's memory: what was
//! asked is answered once, and the driver hears of it.

mod flips;

mod offered;
mod point;

use std::collections::VecDeque;
use std::sync::Arc;

use super::count;
use crate::memory::{Bytes, GuestAddress, Memory};
use crate::testing::load::{self, Load};
use crate::testing::pci::PciDriver;
use crate::testing::{Driver, Posted, copy};
use crate::transport::State;
use point::{POINTS, Point};

/// Where the test driver has its rings.
const RINGS: std::ops::Range<u64> = 0x10_0000..0x20_0000;
/// Message control: every vector is masked.
const MASK_ALL: u16 = 0x4000;
const MSIX_ON: u16 = 0x8000;

/// A guest's driver and what it waits for.
struct Guest {
    vm: PciDriver,
    queues: Vec<Driver>,
    waiting: VecDeque<(u16, Posted)>,
    asked: u16,
    queue: u16,
    event_idx: bool,
}

impl Guest {
    fn new(load: &mut dyn Load, event_idx: bool) -> Self {
        let (vm, queue) = (PciDriver::new(load.device()), load.queue());
        Self { vm, queues: Vec::new(), waiting: VecDeque::new(), asked: 0, queue, event_idx }
    }

    fn start(&mut self) {
        // Rings of the past must not be read.
        let rings = vec![0; usize::try_from(RINGS.end - RINGS.start).unwrap()];
        self.vm.memory.write_slice(&rings, GuestAddress(RINGS.start)).unwrap();
        self.waiting.clear();
        self.queues = self.vm.start(self.event_idx);
        assert_eq!(self.vm.status(), 15);
    }

    fn driver(&mut self) -> &mut Driver {
        &mut self.queues[usize::from(self.queue)]
    }

    fn vector(&self) -> u16 {
        (self.queue + 1).min(self.vm.msix_control() & 0x7ff)
    }

    fn ask(&mut self, load: &dyn Load, count: u16) {
        for _ in 0..count {
            let number = self.asked;
            let posted = load.post(self.driver(), number);
            self.waiting.push_back((number, posted));
            self.asked += 1;
        }
    }

    fn kick(&mut self) {
        self.vm.kick(self.queue);
    }

    /// Has the driver interrupted once everything is answered that it asked so far.
    fn want_last(&mut self) {
        let last = self.asked - 1;
        self.driver().set_used_event(last);
    }

    /// Lets the device do everything it can.
    fn settle(&mut self) {
        let asked = self.asked;
        for _ in 0..1000 {
            self.vm.settle();
            if self.driver().used_index() == asked {
                return;
            }
        }
        panic!("{} of {asked} requests are answered", self.driver().used_index());
    }

    /// Takes every answer: one for each request, in order.
    fn take(&mut self, load: &mut dyn Load) {
        while let Some((number, posted)) = self.waiting.pop_front() {
            let (head, len) = self.driver().take().unwrap_or_else(|| panic!("request {number} is lost"));
            assert_eq!(head, posted.head, "request {number}");
            load.check(&self.queues[usize::from(self.queue)], number, &posted, len);
        }
        assert_eq!(self.driver().take(), None, "nothing is answered twice");
    }

    /// Asks once more, and waits for the interrupt.
    fn go_on(&mut self, load: &mut dyn Load) {
        let (vector, asked) = (self.vector(), self.asked);
        self.driver().set_used_event(asked);
        let before = self.vm.sink.signals(vector);
        self.ask(load, 1);
        self.kick();
        self.vm.sink.wait(vector, before + 1);
        self.take(load);
    }

    fn pending(&mut self) -> u64 {
        u64::from_le_bytes(self.vm.read(self.vm.pending(), 0))
    }

    fn generation(&mut self) -> u8 {
        let [generation] = self.vm.read(self.vm.common, 0x15);
        generation
    }

    /// Saves it and ends it. What it leaves is a state and a copy of its memory.
    fn save(mut self) -> Saved {
        let generation = self.generation();
        self.vm.function.pause().unwrap();
        let state = self.vm.function.save().unwrap();
        let memory = copy(&self.vm.memory);
        let registers = super::registers(&mut self.vm);
        let answered = self.queues.get(usize::from(self.queue)).map_or(0, Driver::used_index);
        let served = count(&self.vm, "chains");
        let Self { queues, waiting, asked, queue, event_idx, .. } = self;
        let queues = queues.iter().map(|driver| driver.moved_to(Arc::clone(&memory))).collect();
        let driver = Left { queues, waiting, asked, queue, event_idx };
        Saved { state, memory, registers, generation, answered, served, driver }
    }
}

/// What a driver has in its own memory.
struct Left {
    queues: Vec<Driver>,
    waiting: VecDeque<(u16, Posted)>,
    asked: u16,
    queue: u16,
    event_idx: bool,
}

/// A machine that was saved, and what was true of it.
struct Saved {
    state: State,
    memory: Arc<Memory>,
    registers: Vec<u8>,
    generation: u8,
    answered: u16,
    served: u64,
    driver: Left,
}

impl Saved {
    /// Another machine with this state, whose device waits to go on.
    fn restore(&mut self, load: &mut dyn Load) -> Guest {
        let mut vm = PciDriver::in_memory(load.device(), Arc::clone(&self.memory));
        let bytes = postcard::to_stdvec(&self.state).unwrap();
        vm.function.restore(&postcard::from_bytes(&bytes).unwrap()).unwrap();
        assert_eq!(vm.function.save().unwrap(), self.state);
        assert_eq!(super::registers(&mut vm), self.registers);
        let Left { queues, waiting, asked, queue, event_idx } = &mut self.driver;
        let (queues, waiting) = (std::mem::take(queues), std::mem::take(waiting));
        Guest { vm, queues, waiting, asked: *asked, queue: *queue, event_idx: *event_idx }
    }
}

/// Brings a machine to `point`.
fn prepare(load: &mut dyn Load, point: Point, event_idx: bool) -> Guest {
    let mut guest = Guest::new(load, event_idx);
    match point {
        Point::Fresh => return guest,
        Point::Noticed => {
            guest.vm.set_status(1);
            guest.vm.set_status(3);
            return guest;
        }
        Point::Negotiated => {
            let offered = guest.vm.offered();
            assert!(guest.vm.negotiate(if event_idx { offered } else { offered & !(1 << 29) }));
            guest.vm.set_up_vectors();
            let queues = guest.vm.get16(0x12);
            guest.queues = (0..queues).map(|index| guest.vm.set_up_queue(index, event_idx)).collect();
            return guest;
        }
        _ => guest.start(),
    }
    guest.ask(load, 3);
    guest.kick();
    guest.settle();
    guest.take(load);
    match point {
        Point::Idle => {
            for _ in 0..80 {
                guest.ask(load, 8);
                guest.settle();
                guest.take(load);
            }
        }
        Point::Broken => {
            let told = guest.vm.sink.signals(0);
            guest.driver().set_available_index(20_000);
            guest.kick();
            guest.vm.sink.wait(0, told + 1);
        }
        Point::Reset => guest.vm.set_status(0),
        _ => offer(&mut guest, load, point),
    }
    guest
}

/// Asks for things, as at `point`.
fn offer(guest: &mut Guest, load: &dyn Load, point: Point) {
    let (vector, control) = (guest.vector(), guest.vm.msix_control());
    match point {
        Point::Masked => guest.vm.mask_vector(vector, true),
        Point::AllMasked => guest.vm.set_msix_control(control | MASK_ALL),
        Point::Polled => guest.vm.set_msix_control(control & !MSIX_ON),
        Point::Suppressed => guest.driver().set_flags(1),
        _ => {}
    }
    guest.vm.function.pause().unwrap();
    guest.ask(load, 16);
    if point == Point::Suppressed {
        guest.driver().set_used_event(30_000);
    } else {
        guest.want_last();
    }
    match point {
        Point::Offered => return,
        Point::InFlight => {
            guest.vm.function.resume().unwrap();
            return guest.kick();
        }
        _ => guest.kick(),
    }
    guest.vm.function.resume().unwrap();
    guest.settle();
}

/// The driver goes on in the restored machine: whatever it waited for comes, once.
fn conclude(load: &mut dyn Load, point: Point, saved: &mut Saved) {
    let mut guest = saved.restore(load);
    let (vector, control) = (guest.vector(), guest.vm.msix_control());
    guest.vm.function.resume().unwrap();
    if guest.vm.device.is_some() {
        assert_ne!(guest.generation(), saved.generation, "a driver in the middle of reading notices");
    }
    match point {
        Point::Fresh | Point::Noticed | Point::Reset => return afresh(&mut guest, load),
        Point::Broken => {
            assert_eq!(guest.vm.status(), 15 | 64);
            guest.vm.set_status(0);
            return afresh(&mut guest, load);
        }
        Point::Negotiated => guest.vm.set_status(15),
        _ => {}
    }
    guest.settle();
    let sent = guest.vm.sink.signals(vector);
    match point {
        Point::Masked | Point::AllMasked => {
            assert_eq!((sent, guest.pending()), (0, 1 << vector));
            match point {
                Point::Masked => guest.vm.mask_vector(vector, false),
                _ => guest.vm.set_msix_control(control & !MASK_ALL),
            }
            assert_eq!((guest.vm.sink.signals(vector), guest.pending()), (1, 0), "what pended arrives");
        }
        Point::Polled => {
            let isr: [u8; 1] = guest.vm.read(guest.vm.isr, 0);
            assert_eq!((sent, isr), (0, [1]));
            guest.vm.set_msix_control(control | MSIX_ON);
        }
        Point::Suppressed => {
            assert_eq!(sent, 0);
            guest.driver().set_flags(0);
        }
        Point::Offered => assert!(if guest.event_idx { sent == 1 } else { sent > 0 }, "{sent}"),
        Point::InFlight => {
            let rest = guest.driver().used_index() != saved.answered;
            assert_eq!(sent > 0, rest, "{sent} for what came after {}", saved.answered);
        }
        _ => assert_eq!(sent, 0, "what was told before is not told again"),
    }
    guest.take(load);
    guest.go_on(load);
    assert_eq!(saved.served + count(&guest.vm, "chains"), u64::from(guest.asked), "each was looked at once");
    assert_eq!(load.carried_out().unwrap_or(guest.asked.into()), u64::from(guest.asked));
}

/// A driver starts from nothing.
fn afresh(guest: &mut Guest, load: &mut dyn Load) {
    guest.start();
    let before = guest.asked;
    let queue = guest.queue;
    for _ in 0..3 {
        let posted = load.post(&mut guest.queues[usize::from(queue)], guest.asked);
        guest.kick();
        guest.asked += 1;
        let answered = guest.asked - before;
        for _ in 0..1000 {
            guest.vm.settle();
            if guest.driver().used_index() == answered {
                break;
            }
        }
        let (head, len) = guest.driver().take().unwrap();
        assert_eq!(head, posted.head);
        load.check(&guest.queues[usize::from(queue)], guest.asked - 1, &posted, len);
    }
}

/// Saves and restores the kind called `name` at every point; several times where that may be anywhere.
fn try_all(name: &str) {
    for point in POINTS.into_iter().chain([Point::InFlight; 8]) {
        for event_idx in [false, true] {
            let _shown = Shown(point, event_idx);
            let mut load = load::named(name);
            let mut saved = prepare(load.as_mut(), point, event_idx).save();
            conclude(load.as_mut(), point, &mut saved);
        }
    }
}

/// Says which case failed.
struct Shown(Point, bool);

impl Drop for Shown {
    fn drop(&mut self) {
        #[allow(clippy::print_stderr)] // beside the panic's message
        if std::thread::panicking() {
            eprintln!("at {:?}, event index {}", self.0, self.1);
        }
    }
}

macro_rules! each {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            super::try_all(stringify!($name));
        }
    )*};
}

mod every_moment_at_which_it_is_saved_ends_well_for {
    each! { block console net rng balloon mem vsock }
}

#[test]
fn every_kind_is_in_the_matrix() {
    let mut names: Vec<_> = load::all().into_iter().map(|(name, _)| name).collect();
    let mut listed = crate::virtio::NAMES.to_vec();
    names.sort_unstable();
    listed.sort_unstable();
    assert_eq!(names, listed);
}
