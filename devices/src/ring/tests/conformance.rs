//! The requirements of VIRTIO 1.2 §2.7 on a device's side of a queue, by their numbers in the tables.

use super::*;

#[test]
fn c_024_q_30_an_available_index_that_jumps_breaks_the_ring() {
    for jump in [SIZE + 1, 0x7fff, 0x8000, 0xffff] {
        let mut driver = driver(false);
        let mut ring = ring_at(&mut driver, 5, false);
        driver.set_available_index(5u16.wrapping_add(jump));
        assert_eq!(cause(serve(&mut ring, &Recorder::default())), RingError::AvailIndex, "jump by {jump:#x}");
        assert_eq!(driver.used_index(), 5);
    }
}

#[test]
fn c_025_without_event_idx_only_the_flag_counts() {
    for (flags, used_event, expected) in
        [(0, 0, 1), (0, 0xffff, 1), (1, 0, 0), (1, 7, 0), (2, 0, 1), (0xfffe, 0, 1), (0xffff, 0, 0)]
    {
        let mut driver = driver(false);
        let mut ring = ring_at(&mut driver, 0, false);
        let recorder = Recorder::default();
        driver.set_flags(flags);
        driver.set_used_event(used_event);
        driver.post(&[], &[4]);
        assert_eq!(serve(&mut ring, &recorder).unwrap(), Served::All);
        assert_eq!(recorder.queue_count(0), expected, "flags {flags:#x} used_event {used_event:#x}");
    }
}

#[test]
fn c_026_q_36_with_event_idx_only_the_entry_waited_for_counts() {
    for start in [0u16, 1, 0x7ffe, 0x8000, 0xfffd, 0xfffe, 0xffff] {
        for chains in 1..=SIZE {
            for distance in (-10i32..20).chain([0x7fff, 0x8000]) {
                for flags in [0, 1] {
                    let mut driver = driver(true);
                    let mut ring = ring_at(&mut driver, start, true);
                    let recorder = Recorder::default();
                    let event = i32::from(start).wrapping_add(distance).rem_euclid(0x1_0000);
                    driver.set_flags(flags);
                    driver.set_used_event(u16::try_from(event).unwrap());
                    for _ in 0..chains {
                        driver.post(&[], &[4]);
                    }
                    let _ = serve(&mut ring, &recorder).unwrap();
                    let expected = u64::from((0..i32::from(chains)).contains(&distance));
                    assert_eq!(
                        recorder.queue_count(0),
                        expected,
                        "{chains} from {start:#x}, event {event:#x}"
                    );
                }
            }
        }
    }
}

#[test]
fn c_027_an_entry_stands_before_the_index_shows_it() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0xffff, false);
    for len in 1..=3 {
        let posted = driver.post(&[], &[8]);
        let chain = ring.pop().unwrap().unwrap();
        let before = driver.used_index();
        ring.complete(chain, len).unwrap();
        let slot = driver.used_ring() + 4 + 8 * u64::from(before % SIZE);
        let entry: u64 = driver.memory().read_obj(GuestAddress(slot)).unwrap();
        assert_eq!((entry, driver.used_index()), (u64::from(len) << 32 | u64::from(posted.head), before));
        ring.publish().unwrap();
        assert_eq!(driver.take(), Some((posted.head, len)));
    }
}

#[test]
fn c_028_c_029_used_entries_name_the_head_and_the_length_in_order() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0xfffe, false);
    let heads: Vec<_> = (1..=4).map(|n| driver.post(&[b"abc"], &[n]).head).collect();
    let _ = serve(&mut ring, &Recorder::default()).unwrap();
    let used: Vec<_> = std::iter::from_fn(|| driver.take()).collect();
    let expected: Vec<_> = heads.into_iter().zip(1..=4).collect();
    assert_eq!(used, expected);
}

#[test]
fn c_030_used_flags_are_zero_or_one_and_zero_with_event_idx() {
    for event_idx in [false, true] {
        let mut driver = driver(event_idx);
        let mut ring = ring_at(&mut driver, 0, event_idx);
        let flags =
            |driver: &Driver| -> u16 { driver.memory().read_obj(GuestAddress(driver.used_ring())).unwrap() };
        ring.disable_kicks().unwrap();
        assert_eq!(flags(&driver), u16::from(!event_idx));
        driver.post(&[], &[4]);
        let _ = serve(&mut ring, &Recorder::default()).unwrap();
        assert_eq!(flags(&driver), 0);
    }
}

#[test]
fn with_event_idx_the_driver_is_asked_to_kick_at_the_next_chain() {
    let mut driver = driver(true);
    let mut ring = ring_at(&mut driver, 0xffff, true);
    driver.post(&[], &[4]);
    assert_eq!(serve(&mut ring, &Recorder::default()).unwrap(), Served::All);
    let at = driver.used_ring() + 4 + 8 * u64::from(SIZE);
    let avail_event: u16 = driver.memory().read_obj(GuestAddress(at)).unwrap();
    assert_eq!(avail_event, 0);
}

#[test]
fn c_031_q_34_kicks_with_nothing_new_change_nothing() {
    let mut driver = driver(false);
    let mut ring = ring_at(&mut driver, 0, false);
    let recorder = Recorder::default();
    for _ in 0..100_000 {
        assert_eq!(serve(&mut ring, &recorder).unwrap(), Served::All);
    }
    assert_eq!((driver.used_index(), recorder.queue_count(0)), (0, 0));
}
