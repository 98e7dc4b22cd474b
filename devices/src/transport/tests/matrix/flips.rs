//! States that somebody changed: refused, or a device that keeps within its bounds and starts anew.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{Guest, Point, afresh, prepare};
use crate::memory::Memory;
use crate::testing::load::{self, Load};
use crate::testing::pci::PciDriver;
use crate::transport::State;

/// A saved device, and memory for machines that go on from what was made of its state.
struct Original {
    load: Box<dyn Load>,
    memory: Arc<Memory>,
    bytes: Vec<u8>,
    asked: u16,
}

impl Original {
    fn new(name: &str, point: Point) -> Self {
        let mut load = load::named(name);
        let saved = prepare(load.as_mut(), point, true).save();
        let bytes = postcard::to_stdvec(&saved.state).unwrap();
        Self { memory: Arc::clone(&saved.memory), asked: saved.driver.asked, load, bytes }
    }

    /// Goes on from `bytes`; whether it was not refused. A device that was let in works for a driver that resets it.
    fn lives_on(&mut self, bytes: &[u8]) -> bool {
        let Ok(state) = postcard::from_bytes::<State>(bytes) else { return false };
        let vm = PciDriver::in_memory(self.load.device(), Arc::clone(&self.memory));
        let (queue, asked) = (self.load.queue(), self.asked);
        let mut guest =
            Guest { vm, queues: Vec::new(), waiting: Default::default(), asked, queue, event_idx: false };
        if guest.vm.function.restore(&state).is_err() {
            return false;
        }
        guest.vm.function.resume().unwrap();
        for queue in 0..guest.vm.get16(0x12) {
            guest.vm.kick(queue);
        }
        guest.vm.settle();
        guest.vm.set_status(0);
        assert_eq!(guest.vm.status(), 0);
        afresh(&mut guest, self.load.as_mut());
        true
    }
}

/// Changes every bit of the state of the kind called `name`, one at a time.
fn flip_each_bit(name: &str) {
    let mut original = Original::new(name, Point::Masked);
    let mut refused = 0;
    for at in 0..original.bytes.len() {
        for bit in 0..8 {
            let mut changed = original.bytes.clone();
            changed[at] ^= 1 << bit;
            refused += usize::from(!original.lives_on(&changed));
        }
    }
    assert!((1..original.bytes.len() * 8).contains(&refused), "{refused}: it tells something from nothing");
    for length in 0..original.bytes.len() {
        let cut = original.bytes[..length].to_vec();
        assert!(!original.lives_on(&cut), "cut to {length} bytes");
    }
}

/// Changes several bytes of that state at once, and makes up some.
fn change_at_random(name: &str) {
    let mut original = Original::new(name, Point::Offered);
    let length = original.bytes.len();
    let changes = proptest::collection::vec((0..length, any::<u8>()), 1..12);
    let made_up = proptest::collection::vec(any::<u8>(), 0..length);
    let config = ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() };
    let original = std::cell::RefCell::new(&mut original);
    let done = TestRunner::new(config).run(&(changes, made_up), |(changes, made_up)| {
        let mut original = original.borrow_mut();
        let mut changed = original.bytes.clone();
        changes.iter().for_each(|(at, byte)| changed[*at] = *byte);
        original.lives_on(&changed);
        original.lives_on(&made_up);
        Ok(())
    });
    done.unwrap();
}

macro_rules! each {
    ($by:ident: $($name:ident)*) => {$(
        #[test]
        fn $name() {
            super::$by(stringify!($name));
        }
    )*};
}

mod every_bit_that_is_changed_is_refused_or_bounded_for {
    each! { flip_each_bit: block console net rng balloon vsock }
}

mod changes_at_random_are_refused_or_bounded_for {
    each! { change_at_random: block console net rng balloon vsock }
}
