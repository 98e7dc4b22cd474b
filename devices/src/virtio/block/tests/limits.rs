//! A disk whose machine is held to a rate.

use super::*;

/// A disk of 8 sectors whose machine is held to `limits`.
fn limited(limits: &[&str]) -> (Harness, Meters, HashMap<&'static str, Arc<Counter>>) {
    limited_disk(&image(8), limits)
}

fn limited_disk(image: &File, limits: &[&str]) -> (Harness, Meters, HashMap<&'static str, Arc<Counter>>) {
    let (meters, _file) = Meters::create().unwrap();
    limits.iter().for_each(|limit| meters.set(&limit.parse().unwrap()));
    let mut disk = build(&config(), image);
    disk.charge_at(meters.clone());
    let counts = counts(disk.as_ref());
    (Harness::new(disk), meters, counts)
}

fn post_read(vm: &mut Harness) -> Posted {
    let posted = vm.driver(0).post(&[&header(IN, 0)], &[512, 1]);
    vm.kick(0);
    posted
}

/// Lets time pass until the device has looked again.
fn look_again(vm: &mut Harness) {
    while vm.poll() == 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_request_beyond_the_rate_is_held_and_carried_out_when_the_limit_is_lifted() {
    let (mut vm, meters, counts) = limited(&["disk-read=1ops:1ops"]);
    assert_eq!(read(&mut vm, 0, 512).status, OK);
    meters.owe_for_ever(What::DiskRead);
    let held = post_read(&mut vm);
    assert!(vm.driver(0).take().is_none());
    assert_eq!((counts["held"].get(), counts["reads"].get()), (1, 1));
    let state = vm.ring_state(0);
    assert_eq!((state.next_available, state.next_used), (1, 1), "it is on the ring, and would be saved so");
    meters.set(&"disk-read=none".parse().unwrap());
    look_again(&mut vm);
    assert_eq!(answer(&mut vm, 0, &held).data, pattern(0));
    assert_eq!(counts["reads"].get(), 2);
}

#[test]
fn a_held_disk_goes_on_by_itself_when_its_time_has_come() {
    let (mut vm, _meters, _) = limited(&["disk-write=20ops:1ops"]);
    let begun = std::time::Instant::now();
    for _ in 0..3 {
        let before = vm.driver(0).used_index();
        let posted = vm.driver(0).post(&[&header(FLUSH, 0)], &[1]);
        vm.kick(0);
        while vm.driver(0).used_index() == before {
            look_again(&mut vm);
        }
        assert_eq!(answer(&mut vm, 0, &posted).status, OK);
    }
    assert!(begun.elapsed().as_millis() >= 100, "two of them had to be earned");
}

#[test]
fn a_held_disk_takes_no_turn_whatever_the_driver_kicks_and_none_after_a_reset() {
    let (mut vm, meters, counts) = limited(&["disk-read=1ops:1ops"]);
    assert_eq!(read(&mut vm, 0, 512).status, OK);
    meters.owe_for_ever(What::DiskRead);
    post_read(&mut vm);
    for _ in 0..100 {
        vm.kick(0);
    }
    assert_eq!((counts["reads"].get(), counts["held"].get()), (1, 101), "each kick is looked at once");
    assert_eq!(vm.watched_files(), 1, "by one timer");
    let disk = vm.reset();
    let mut vm = Harness::new(disk);
    assert_eq!(vm.watched_files(), 0);
    post_read(&mut vm);
    assert_eq!(counts["reads"].get(), 1, "a reset does not pay");
}

#[test]
fn a_disk_that_is_held_while_its_machine_is_paused_is_held_after_it() {
    let (mut vm, meters, counts) = limited(&["disk-read=1ops:1ops"]);
    assert_eq!(read(&mut vm, 0, 512).status, OK);
    meters.owe_for_ever(What::DiskRead);
    let held = post_read(&mut vm);
    vm.pause_and_resume();
    assert_eq!((counts["reads"].get(), vm.watched_files()), (1, 1));
    meters.set(&"disk-read=none".parse().unwrap());
    look_again(&mut vm);
    assert_eq!(answer(&mut vm, 0, &held).status, OK);
}

#[test]
fn every_kind_of_request_is_charged_as_what_it_is() {
    let cases: [(What, Vec<u8>, u32); 4] = [
        (What::DiskRead, header(GET_ID, 0).to_vec(), 20),
        (What::DiskWrite, header(FLUSH, 0).to_vec(), 0),
        (What::DiskWrite, [header(DISCARD, 0), segment(0, 8, 0)].concat(), 0),
        (What::DiskWrite, [header(WRITE_ZEROES, 0), segment(0, 8, 0)].concat(), 0),
    ];
    for (what, request, answer) in cases {
        let (mut vm, meters, counts) = limited(&["disk-read=1ops:1ops", "disk-write=1ops:1ops"]);
        let writable: &[u32] = if answer > 0 { &[answer, 1] } else { &[1] };
        assert_eq!(ask(&mut vm, &[&request], writable).status, OK);
        let charged = What::ALL.into_iter().filter(|what| meters.paid(*what)[1] > 0);
        assert!(charged.eq([what]), "{request:?}");
        meters.owe_for_ever(what);
        vm.driver(0).post(&[&request], writable);
        vm.kick(0);
        assert_eq!(counts["held"].get(), 1, "{what:?} {request:?}");
    }
}

#[test]
fn zeroes_are_charged_as_bytes_and_what_makes_no_sense_is_not() {
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(32 << 20).unwrap();
    let (mut vm, meters, counts) = limited_disk(&sparse, &["disk-write=64K:64K"]);
    let beyond = [header(WRITE_ZEROES, 0), segment(65536, 1, 0)].concat();
    assert_eq!(ask(&mut vm, &[&beyond], &[1]).status, IOERR);
    assert_eq!(write(&mut vm, 65536, &[0; 512]), IOERR);
    assert_eq!(meters.paid(What::DiskWrite), [0, 0]);
    let zeroes = [header(WRITE_ZEROES, 0), segment(0, 65536, 0)].concat();
    assert_eq!(ask(&mut vm, &[&zeroes], &[1]).status, OK);
    // They are worth more than eight minutes.
    vm.driver(0).post(&[&header(FLUSH, 0)], &[1]);
    vm.kick(0);
    assert_eq!(counts["held"].get(), 1);
}
