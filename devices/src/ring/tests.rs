//! The ring against a driver that does anything (names as in the transport's tests; `q_` is the hostile
//! driver at the ring).

mod conformance;

use std::sync::Arc;

use super::{Notify, Ring, RingCounters, RingOptions, Served};
use crate::chain::Chain;
use crate::error::{ChainError, Error, RingError};
use crate::memory::{Bytes, GuestAddress};
use crate::testing::{Descriptor, Driver, NEXT, Recorder, memory};

pub(super) const SIZE: u16 = 8;

pub(super) fn driver(event_idx: bool) -> Driver {
    Driver::new(0, SIZE, memory(), event_idx)
}

/// The device's side of `driver`, at `position`.
pub(super) fn ring_at(driver: &mut Driver, position: u16, event_idx: bool) -> Ring {
    let options = RingOptions { index: 0, max_size: SIZE, event_idx, indirect: true };
    let registers = driver.begin_at(position);
    Ring::new(registers, options, Arc::clone(driver.memory()), RingCounters::default()).unwrap()
}

fn serve(ring: &mut Ring, recorder: &Recorder) -> Result<Served, Error> {
    ring.serve(recorder, Notify::Batch, |chain| Ok(chain.writer().remaining()))
}

fn cause(result: Result<impl Sized, Error>) -> RingError {
    match result {
        Err(Error::Ring { ring: 0, cause }) => cause,
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn q_30_a_full_ring_is_no_jump() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0xfffc, false);
    for _ in 0..SIZE {
        driver.post(&[], &[4]);
    }
    assert_eq!(serve(&mut ring, &Recorder::default()).unwrap(), Served::More);
    assert_eq!(driver.used_index(), 4);
}

#[test]
fn a_chain_posted_while_kicks_are_switched_on_again_is_not_missed() {
    let mut driver = driver(true);
    let mut ring = ring_at(&mut driver, 0, true);
    ring.disable_kicks().unwrap();
    assert!(ring.pop().unwrap().is_none());
    driver.post(&[], &[4]);
    assert!(ring.enable_kicks().unwrap(), "look again");
}

#[test]
fn q_31_q_38_the_ring_is_filled_and_drained_past_the_wrap_many_times() {
    let mut driver = driver(true);
    let mut ring = ring_at(&mut driver, 0xff00, true);
    let recorder = Recorder::default();
    for round in 0..20_000u32 {
        let heads: Vec<_> = (0..SIZE).map(|_| driver.post(&[], &[4]).head).collect();
        let _ = serve(&mut ring, &recorder).unwrap();
        let used: Vec<_> = std::iter::from_fn(|| driver.take()).map(|(head, _)| head).collect();
        assert_eq!(used, heads, "round {round}");
    }
}

#[test]
fn q_32_a_head_that_the_device_has_already_breaks_the_ring() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let posted = driver.post(&[], &[4]);
    let chain = ring.pop().unwrap().unwrap();
    driver.offer(posted.head);
    assert_eq!(cause(ring.pop()), RingError::InFlight(posted.head));
    drop(chain);
}

#[test]
fn a_head_may_come_again_once_it_was_given_back() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let posted = driver.post(&[], &[4]);
    for _ in 0..20 {
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 0).unwrap();
        ring.publish().unwrap();
        driver.offer(posted.head);
    }
    assert_eq!(driver.used_index(), 20);
}

#[test]
fn q_33_a_head_past_the_table_breaks_the_ring_in_every_slot() {
    for slot in 0..SIZE {
        for head in [SIZE, SIZE + 1, 0x8000, 0xffff] {
            let mut driver = driver(false);
            let mut ring = ring_at(&mut driver, slot, false);
            driver.offer(head);
            assert_eq!(cause(serve(&mut ring, &Recorder::default())), RingError::Head(head));
        }
    }
}

#[test]
fn q_35_what_the_driver_writes_to_the_used_ring_is_not_believed() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    for round in 1..=20u16 {
        let used = driver.used_ring();
        driver.memory().write_slice(&[0xee; 4 + 8 * SIZE as usize], GuestAddress(used)).unwrap();
        let posted = driver.post(&[], &[4]);
        let _ = serve(&mut ring, &Recorder::default()).unwrap();
        assert_eq!(driver.used_index(), round);
        let slot = used + 4 + 8 * u64::from((round - 1) % SIZE);
        let id: u32 = driver.memory().read_obj(GuestAddress(slot)).unwrap();
        assert_eq!(id, u32::from(posted.head));
    }
}

#[test]
fn q_37_garbage_in_the_available_flags_is_ignored() {
    for flags in [0xfffe, 0x5554, 2] {
        let mut driver = driver(false);
        let mut ring = ring_at(&mut driver, 0, false);
        let recorder = Recorder::default();
        driver.set_flags(flags);
        driver.post(&[], &[4]);
        let _ = serve(&mut ring, &recorder).unwrap();
        assert_eq!((driver.used_index(), recorder.queue_count(0)), (1, 1));
    }
}

#[test]
fn a_malformed_chain_is_given_back_with_length_zero_counted_and_announced() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let recorder = Recorder::default();
    driver.describe(7, Descriptor { address: 0x1000, len: 4, flags: NEXT, next: 7 });
    driver.offer(7);
    assert_eq!(serve(&mut ring, &recorder).unwrap(), Served::All);
    assert_eq!(driver.take(), Some((7, 0)));
    assert_eq!((ring.counters.refused.get(), ring.counters.chains.get()), (1, 0));
    assert_eq!(recorder.queue_count(0), 1);
}

#[test]
fn a_request_the_device_refuses_is_given_back_and_the_next_is_served() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let bad = driver.post(&[b"bad"], &[4]);
    let good = driver.post(&[b"good"], &[4]);
    let device = |chain: &Chain| match chain.reader().remaining() {
        3 => Err(ChainError::Malformed("bad").into()),
        _ => Ok(4),
    };
    let _ = ring.serve(&Recorder::default(), Notify::Each, device).unwrap();
    assert_eq!((driver.take(), driver.take()), (Some((bad.head, 0)), Some((good.head, 4))));
    assert_eq!(ring.counters.refused.get(), 1);
}

#[test]
fn a_failing_device_gives_its_chain_back_and_leaves_the_rest() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let recorder = Recorder::default();
    let first = driver.post(&[], &[4]);
    driver.post(&[], &[4]);
    let broken = |_: &Chain| Err(Error::device("work")(std::io::ErrorKind::BrokenPipe.into()));
    assert!(matches!(ring.serve(&recorder, Notify::Batch, broken), Err(Error::Device { .. })));
    assert_eq!((driver.take(), driver.take()), (Some((first.head, 0)), None));
    assert_eq!(recorder.queue_count(0), 1);
}

#[test]
fn an_undone_chain_is_popped_again() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0xffff, false);
    let posted = driver.post(&[b"abc"], &[]);
    let chain = ring.pop().unwrap().unwrap();
    ring.undo(chain).unwrap();
    assert_eq!(ring.state().next_available, 0xffff);
    assert_eq!(ring.pop().unwrap().unwrap().head(), posted.head);
}

#[test]
fn a_slow_back_end_ends_the_turn_before_the_queue_does() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let recorder = Recorder::default();
    for _ in 0..3 {
        driver.post(&[], &[4]);
    }
    for turn in 1..=3 {
        let slow = |_: &Chain| {
            std::thread::sleep(super::TURN_TIME);
            Ok(4)
        };
        assert_eq!(ring.serve(&recorder, Notify::Each, slow).unwrap(), Served::More);
        assert_eq!((driver.used_index(), recorder.queue_count(0)), (turn, turn.into()));
    }
    assert_eq!(serve(&mut ring, &recorder).unwrap(), Served::All);
}

#[test]
fn chains_that_make_no_sense_and_never_end_end_the_turn() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0xfffe, false);
    driver.describe(5, Descriptor { address: 0x1000, len: 4, flags: NEXT, next: SIZE });
    for turn in 1..=3u16 {
        ring.begin_turn();
        let mut looks = 0;
        loop {
            // The driver takes its chain back and posts it again before the device has looked twice.
            driver.offer(5);
            assert!(ring.pop().unwrap().is_none());
            driver.offer(5);
            if !ring.enable_kicks().unwrap() {
                break;
            }
            looks += 1;
            assert!(looks <= SIZE, "the turn never ends");
        }
        assert!(ring.is_unfinished());
        let given_back = std::iter::from_fn(|| driver.take()).count();
        assert!((1..=usize::from(SIZE)).contains(&given_back), "{given_back} in turn {turn}");
        driver.set_available_index(ring.state().next_available);
    }
    ring.begin_turn();
    let posted = driver.post(&[], &[4]);
    assert_eq!(serve(&mut ring, &Recorder::default()).unwrap(), Served::All);
    assert_eq!(driver.take(), Some((posted.head, 4)));
    assert!(!ring.is_unfinished());
}

#[test]
fn an_index_that_jumps_to_and_fro_ends_the_turn() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 3, false);
    let mut looks = 0;
    loop {
        driver.set_available_index(3);
        assert!(ring.pop().unwrap().is_none());
        driver.set_available_index(4);
        if !ring.enable_kicks().unwrap() {
            break;
        }
        looks += 1;
        assert!(looks <= SIZE, "the turn never ends");
    }
    assert!(ring.is_unfinished());
}

#[test]
fn a_chain_before_one_that_was_refused_is_given_back_and_not_undone() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0xfffe, false);
    let first = driver.post(&[], &[4]);
    driver.describe(5, Descriptor { address: 0x1000, len: 4, flags: NEXT, next: SIZE });
    driver.offer(5);
    let last = driver.post(&[], &[4]);
    let chains = [ring.pop().unwrap().unwrap(), ring.pop().unwrap().unwrap()];
    assert_eq!(chains.each_ref().map(Chain::head), [first.head, last.head]);
    for chain in chains.into_iter().rev() {
        ring.undo(chain).unwrap();
    }
    assert_eq!((driver.take(), driver.take(), driver.take()), (Some((5, 0)), Some((first.head, 0)), None));
    assert_eq!(ring.pop().unwrap().unwrap().head(), last.head);
    assert!(ring.pop().unwrap().is_none());
}

#[test]
fn a_ring_built_from_its_state_goes_on_where_it_stood() {
    let mut driver = driver(true);
    let mut ring = ring_at(&mut driver, 0xfffe, true);
    for _ in 0..3 {
        driver.post(&[], &[4]);
        let _ = serve(&mut ring, &Recorder::default()).unwrap();
        driver.take();
    }
    let options = RingOptions { index: 0, max_size: SIZE, event_idx: true, indirect: true };
    let memory = Arc::clone(driver.memory());
    let mut again = Ring::new(ring.state(), options, memory, RingCounters::default()).unwrap();
    let recorder = Recorder::default();
    driver.set_used_event(1);
    let posted = driver.post(&[], &[4]);
    let _ = serve(&mut again, &recorder).unwrap();
    assert_eq!((driver.take(), recorder.queue_count(0)), (Some((posted.head, 4)), 1));
}
