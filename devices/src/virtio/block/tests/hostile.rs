//! What a hostile driver tries on a disk, by the numbers of the scenario list.

use super::*;
use crate::memory::{Bytes, GuestAddress};
use crate::testing::{Descriptor, HIGH, NEXT, WRITE};

const SECTORS: u64 = 8;

/// A disk under attack. The check at the end: the file is as long as before, and honest I/O works.
struct Attack {
    vm: Harness,
    file: File,
    before: Vec<u8>,
}

fn attack() -> Attack {
    let file = image(SECTORS);
    Attack { vm: Harness::new(build(&config(), &file)), before: contents(&file), file }
}

impl Attack {
    fn survived(mut self) {
        assert_eq!(contents(&self.file), self.before, "the image is untouched");
        assert!(!self.vm.asked_for_reset());
        assert_eq!(read(&mut self.vm, 7, 512).data, pattern(7));
        assert_eq!(write(&mut self.vm, 0, &[0x77; 512]), OK);
        assert_eq!(contents(&self.file)[..512], [0x77; 512]);
        assert_eq!(self.file.metadata().unwrap().len(), SECTORS * 512);
    }
}

#[test]
fn hg_b01_b02_b03_no_sector_reaches_past_the_end() {
    let mut it = attack();
    let far =
        [SECTORS, SECTORS + 1, 1 << 32, 1 << 54, 1 << 55, (1 << 55) + 1, 1 << 63, u64::MAX - 1, u64::MAX];
    for sector in far {
        for len in [512, 1024, 8192] {
            assert_eq!(write(&mut it.vm, sector, &vec![9; len]), IOERR, "sector {sector}");
            let got = read(&mut it.vm, sector, u32::try_from(len).unwrap());
            assert_eq!((got.status, got.len), (IOERR, 0), "sector {sector}");
        }
    }
    // N sectors from the last one on, one descriptor each: the bound is on the sum.
    let sector = [9; 512];
    let request = header(OUT, SECTORS - 1);
    let pieces: Vec<&[u8]> = std::iter::once(&request[..]).chain([&sector[..]; 4]).collect();
    assert_eq!(ask(&mut it.vm, &pieces, &[1]).status, IOERR);
    it.survived();
}

#[test]
fn hg_b04_b05_odd_lengths_and_unknown_types_fail() {
    let mut it = attack();
    for len in [1, 511, 513] {
        assert_eq!(write(&mut it.vm, 0, &vec![9; len]), IOERR);
    }
    for kind in [2, 3, 5, 6, 7, 9, 12, 0x8000_0000] {
        assert_eq!(ask(&mut it.vm, &[&header(kind, 0), &[9; 512]], &[1]).status, UNSUPP);
    }
    it.survived();
}

#[test]
fn hg_b07_a_flush_with_data_or_a_sector_is_a_flush() {
    let mut it = attack();
    assert_eq!(ask(&mut it.vm, &[&header(FLUSH, u64::MAX)], &[1]).status, OK);
    assert_eq!(ask(&mut it.vm, &[&header(FLUSH, 0), &[9; 512]], &[1]).status, OK);
    let got = ask(&mut it.vm, &[&header(FLUSH, 0)], &[512, 1]);
    assert_eq!((got.status, got.len), (OK, 0));
    assert_eq!(got.data, [0xa5; 512]);
    it.survived();
}

#[test]
fn hg_b08_the_serial_number_needs_20_bytes_and_takes_no_more() {
    let mut it = attack();
    for (room, status, len) in [(0, IOERR, 1), (19, IOERR, 0), (20, OK, 21), (21, OK, 20), (4096, OK, 20)] {
        let got = ask(&mut it.vm, &[&header(GET_ID, 0)], &[room, 1]);
        assert_eq!((got.status, got.len), (status, len), "{room} bytes of room");
        let unwritten = if status == OK { 20 } else { 0 };
        assert!(got.data[unwritten.min(got.data.len())..].iter().all(|byte| *byte == 0xa5));
    }
    it.survived();
}

#[test]
fn hg_b09_bad_segments_fail() {
    let mut it = attack();
    for kind in [DISCARD, WRITE_ZEROES] {
        for wrong in [
            segment(u64::MAX, 1, 0),
            segment(1 << 55, 1, 0),
            segment(SECTORS, 1, 0),
            segment(SECTORS - 1, 2, 0),
            segment(0, u32::MAX, 0),
            segment(u64::MAX / 512, u32::MAX, 0),
        ] {
            assert_eq!(ask(&mut it.vm, &[&header(kind, 0), &wrong], &[1]).status, IOERR);
        }
        for len in [0, 1, 15, 17, 31] {
            assert_eq!(ask(&mut it.vm, &[&header(kind, 0), &vec![0; len]], &[1]).status, IOERR);
        }
        let late = [segment(0, SECTORS as u32, 0), segment(SECTORS, 1, 0)];
        assert_eq!(ask(&mut it.vm, &[&header(kind, 0), late.as_flattened()], &[1]).status, IOERR);
        let nothing = ask(&mut it.vm, &[&header(kind, 0), &segment(SECTORS, 0, 0)], &[1]);
        assert_eq!(nothing.status, OK, "no sectors at the end are inside");
    }
    it.survived();
}

#[test]
fn hg_b10_a_request_without_room_for_a_status_is_given_back_with_length_0() {
    let mut it = attack();
    let posted = it.vm.driver(0).post(&[&header(OUT, 0), &[9; 512]], &[]);
    it.vm.kick(0);
    assert_eq!(it.vm.driver(0).take(), Some((posted.head, 0)));
    let posted = it.vm.driver(0).post(&[&header(OUT, 0), &[9; 512], &[0]], &[]);
    it.vm.kick(0);
    assert_eq!(it.vm.driver(0).take(), Some((posted.head, 0)), "a readable status is none");
    let none = ask(&mut it.vm, &[&header(IN, 0)], &[512]);
    assert_eq!((none.status, none.len), (IOERR, 0), "its last byte becomes the status");
    assert_eq!(none.data, [0xa5; 511]);
    let two = ask(&mut it.vm, &[&header(OUT, 0), &[9; 512]], &[2]);
    assert_eq!((two.status, two.data), (IOERR, vec![0xa5]), "data on the wrong side");
    it.survived();
}

#[test]
fn hg_b11_headers_that_are_short_writable_or_oversized_fail() {
    let mut it = attack();
    for len in 1..16 {
        assert_eq!(ask(&mut it.vm, &[&header(IN, 0)[..len]], &[512, 1]).status, IOERR, "{len} bytes");
    }
    assert_eq!(ask(&mut it.vm, &[], &[16, 512, 1]).status, IOERR);
    let mut long = header(IN, 0).to_vec();
    long.push(0);
    let got = ask(&mut it.vm, &[&long], &[512, 1]);
    assert_eq!((got.status, got.len), (IOERR, 0));
    it.survived();
}

#[test]
fn hg_b12_data_in_254_pieces_of_one_sector_is_one_request() {
    let file = image(256);
    let mut vm = Harness::new(build(&config(), &file));
    let pieces: Vec<u32> = [512; 254].into_iter().chain([1]).collect();
    let got = ask(&mut vm, &[&header(IN, 1)], &pieces);
    assert_eq!((got.status, got.len), (OK, 254 * 512 + 1));
    assert_eq!(got.data, contents(&file)[512..255 * 512]);

    let sector = [0x3c; 512];
    let request = header(OUT, 1);
    let pieces: Vec<&[u8]> = std::iter::once(&request[..]).chain([&sector[..]; 254]).collect();
    assert_eq!(ask(&mut vm, &pieces, &[1]).status, OK);
    assert_eq!(contents(&file)[512..255 * 512], [0x3c; 254 * 512]);
    assert_eq!(contents(&file)[255 * 512..], pattern(255));
}

#[test]
fn hg_b13_overlapping_writes_in_flight_are_done_in_order() {
    let file = image(4);
    let mut vm = Harness::new(build(&config(), &file));
    for value in 1..=3u8 {
        vm.driver(0).post(&[&header(OUT, 0), &[value; 1024]], &[1]);
    }
    vm.driver(0).post(&[&header(OUT, 1), &[4; 512]], &[1]);
    vm.kick(0);
    assert_eq!(contents(&file)[..1024], [[3; 512], [4; 512]].concat());
}

#[test]
fn hg_b14_two_queues_may_use_the_same_head_index() {
    let file = image(4);
    let mut vm = Harness::new(build(&Config { queues: 2, ..config() }, &file));
    let a = vm.driver(0).post(&[&header(IN, 1)], &[512, 1]);
    let b = vm.driver(1).post(&[&header(IN, 2)], &[512, 1]);
    assert_eq!(a.head, b.head);
    vm.kick(1);
    vm.kick(0);
    assert_eq!(answer(&mut vm, 0, &a).data, pattern(1));
    assert_eq!(answer(&mut vm, 1, &b).data, pattern(2));
}

#[test]
fn hg_b15_discard_and_zeroing_that_were_not_accepted_are_unsupported() {
    let file = image(SECTORS);
    let device = build(&config(), &file);
    let features = device.features() & !(1 << 13 | 1 << 14);
    let mut it = Attack { vm: Harness::with(device, features, false), before: contents(&file), file };
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(ask(&mut it.vm, &[&header(kind, 0), &segment(0, 8, 0)], &[1]).status, UNSUPP);
    }
    it.survived();
}

#[test]
fn hg_b16_the_driver_cannot_write_the_configuration() {
    let device = build(&config(), &image(SECTORS));
    let space = device.config().unwrap();
    let mut before = [0; 60];
    space.read(0, &mut before);
    space.write(0, &[0xff; 60]);
    let mut after = [0; 60];
    space.read(0, &mut after);
    assert_eq!(after, before);
}

#[test]
fn hg_b20_a_read_only_disk_does_not_need_a_writable_file() {
    let file = image(1);
    let fd = reopen(&file, std::fs::OpenOptions::new().read(true));
    let flags = crate::sys::file::status_flags(std::os::fd::AsFd::as_fd(&fd)).unwrap();
    assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
    let device = try_build(&Config { read_only: true, ..config() }, fd).unwrap();
    assert_eq!(read(&mut Harness::new(device), 0, 512).data, pattern(0));
}

#[test]
fn hg_b21_an_image_that_shrinks_under_the_disk_fails_requests_and_nothing_else() {
    let it = attack();
    let (mut vm, file) = (it.vm, it.file);
    file.set_len(1024).unwrap();
    let got = read(&mut vm, 0, 2048);
    assert_eq!((got.status, got.len), (IOERR, 1024), "what was there was written, so it is claimed");
    assert_eq!(read(&mut vm, 4, 512).status, IOERR);
    assert_eq!(read(&mut vm, 1, 512).data, pattern(1));
    file.set_len(1 << 20).unwrap();
    assert_eq!(read(&mut vm, 4, 512).data, [0; 512]);
    assert_eq!(write(&mut vm, SECTORS, &[9; 512]), IOERR, "the capacity is what it was");
}

#[test]
fn hg_b22_a_ring_full_of_flushes_is_answered() {
    let mut it = attack();
    for _ in 0..128 {
        it.vm.driver(0).post(&[&header(FLUSH, 0)], &[1]);
    }
    it.vm.kick(0);
    for _ in 0..128 {
        assert_eq!(it.vm.driver(0).take().map(|(_, len)| len), Some(1));
    }
    assert_eq!(it.vm.driver(0).take(), None);
    it.survived();
}

#[test]
fn a_request_above_the_advertised_maximum_fails_and_one_at_it_does_not() {
    let file = image(0);
    file.set_len(64 << 20).unwrap();
    let mut vm = Harness::new(build(&config(), &file));
    // Many descriptors for the same megabyte: bytes the guest does not have.
    let mut write_mebibytes = |whole: u16, rest: u32| {
        vm.memory().write_slice(&header(OUT, 0), GuestAddress(HIGH)).unwrap();
        let driver = vm.driver(0);
        driver.describe(0, Descriptor { address: HIGH, len: 16, flags: NEXT, next: 1 });
        for i in 1..=whole {
            let len = 1 << 20;
            driver.describe(i, Descriptor { address: HIGH + 4096, len, flags: NEXT, next: i + 1 });
        }
        let last = whole + 1;
        driver.describe(last, Descriptor { address: HIGH + 4096, len: rest, flags: NEXT, next: last + 1 });
        let status = Descriptor { address: HIGH + 64, len: 1, flags: WRITE, next: 0 };
        driver.describe(last + 1, status);
        driver.offer(0);
        vm.kick(0);
        assert_eq!(vm.driver(0).take(), Some((0, 1)));
        vm.driver(0).posted_at(HIGH + 64, 1)[0]
    };
    assert_eq!(MAX_DATA, (31 << 20) + 896 * 1024);
    assert_eq!(write_mebibytes(31, 896 * 1024), OK);
    assert_eq!(write_mebibytes(31, 896 * 1024 + 512), IOERR);
    assert_eq!(write_mebibytes(40, 512), IOERR);
}

#[test]
fn hg_r04_a_header_that_changes_after_it_was_read_changes_nothing() {
    // The data buffer of a read is the request's own header: it is overwritten while being served.
    let mut it = attack();
    it.vm.memory().write_slice(&header(IN, 2), GuestAddress(HIGH)).unwrap();
    let driver = it.vm.driver(0);
    driver.describe(0, Descriptor { address: HIGH, len: 16, flags: NEXT, next: 1 });
    driver.describe(1, Descriptor { address: HIGH, len: 512, flags: WRITE | NEXT, next: 2 });
    driver.describe(2, Descriptor { address: HIGH + 512, len: 1, flags: WRITE, next: 0 });
    driver.offer(0);
    it.vm.kick(0);
    assert_eq!(it.vm.driver(0).take(), Some((0, 513)));
    assert_eq!(it.vm.driver(0).posted_at(HIGH, 512), pattern(2));
    it.survived();
}

#[test]
fn hg_r04_a_sector_that_changes_while_it_is_checked_reaches_no_other_place() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut it = attack();
    let memory = it.vm.memory().clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let mutator = std::thread::spawn(move || {
        let sector = GuestAddress(HIGH + 8);
        while !stopped.load(Ordering::Relaxed) {
            for value in [7u64, SECTORS, 1 << 55, u64::MAX, 1 << 20] {
                memory.write_obj(value, sector).unwrap();
            }
        }
    });
    it.vm.memory().write_slice(&header(OUT, 7), GuestAddress(HIGH)).unwrap();
    it.vm.memory().write_slice(&pattern(7), GuestAddress(HIGH + 512)).unwrap();
    for _ in 0..5_000 {
        let driver = it.vm.driver(0);
        driver.describe(0, Descriptor { address: HIGH, len: 16, flags: NEXT, next: 1 });
        driver.describe(1, Descriptor { address: HIGH + 512, len: 512, flags: NEXT, next: 2 });
        driver.describe(2, Descriptor { address: HIGH + 64, len: 1, flags: WRITE, next: 0 });
        driver.offer(0);
        it.vm.kick(0);
        assert_eq!(it.vm.driver(0).take(), Some((0, 1)));
    }
    stop.store(true, Ordering::Relaxed);
    mutator.join().unwrap();
    it.survived();
}
