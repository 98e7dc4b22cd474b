//! What a hostile driver or a bad host does to a network card, by the numbers of the scenario list.

use super::*;
use crate::testing::Descriptor;

/// Honest traffic both ways.
fn works(vm: &mut Harness, wire: &Wire) {
    assert!(!vm.asked_for_reset());
    while wire.take().is_some() {}
    send(vm, Header::default(), &frame(777));
    assert_eq!(wire.take(), Some((Header::default(), frame(777))));
    offer(vm, &[1526; 4]);
    wire.send(Header::default(), &frame(888));
    vm.poll();
    let (_, bytes) = received(vm);
    assert_eq!(split(&bytes).1, frame(888));
}

#[test]
fn hg_n01_a_frame_shorter_than_the_header_is_given_back() {
    let (mut vm, wire, _) = card();
    for len in 0..12 {
        let bytes = vec![0xff; len];
        let posted = vm.driver(TRANSMIT).post(&[&bytes], &[]);
        vm.kick(TRANSMIT);
        assert_eq!(vm.driver(TRANSMIT).take(), Some((posted.head, 0)));
    }
    assert_eq!(wire.take(), None);
    works(&mut vm, &wire);
}

#[test]
fn hg_n02_n03_only_frames_of_possible_length_are_sent() {
    let (mut vm, wire, counts) = card();
    for len in [0, 1, 13, 65_551, 70_000] {
        send(&mut vm, Header::default(), &frame(len));
        assert_eq!(wire.take(), None, "{len} bytes");
    }
    assert_eq!(counts.get("tx_malformed"), 5);
    for len in [14, 60, 1514, 1515, 65_549, 65_550] {
        send(&mut vm, Header::default(), &frame(len));
        assert_eq!(wire.take(), Some((Header::default(), frame(len))), "{len} bytes");
    }
    works(&mut vm, &wire);
}

#[test]
fn hg_n03_only_frames_of_possible_length_are_received() {
    let (mut vm, wire, counts) = card();
    let mut dropped = 0;
    for (len, passes) in
        [(0, false), (13, false), (65_551, false), (69_000, false), (14, true), (65_550, true)]
    {
        offer(&mut vm, &[70_000]);
        assert!(wire.send(Header::default(), &frame(len)));
        vm.poll();
        let (lens, bytes) = received(&mut vm);
        if passes {
            assert_eq!(split(&bytes).1, frame(len));
        } else {
            dropped += 1;
            assert_eq!((lens, counts.get("rx_dropped")), (vec![], dropped), "{len} bytes");
        }
    }
    for bytes in [&[0; 1][..], &[0; 11]] {
        wire.send_raw(bytes);
        vm.poll();
    }
    assert_eq!(counts.get("rx_dropped"), dropped + 2);
}

#[test]
fn hg_n04_no_unsound_header_reaches_the_host() {
    let csum = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::default() };
    let unsound = [
        Header { csum_start: 3998, csum_offset: 1, ..csum },
        Header { csum_start: 0xffff, csum_offset: 0xffff, ..csum },
        Header { csum_start: 0, csum_offset: 3999, ..csum },
        Header { flags: 0, ..large() },
        Header { gso_size: 0, ..large() },
        Header { gso_type: 2, ..large() },
        Header { gso_type: 3, ..large() },
        Header { gso_type: 6, ..large() },
        Header { gso_type: 0x80, ..large() },
        Header { gso_type: 0x85, ..large() },
        Header { gso_type: 0x7f, ..large() },
    ];
    let sound = [
        csum,
        Header { csum_start: 3998, csum_offset: 0, ..csum },
        large(),
        Header { gso_type: 0x81, ..large() },
        Header { gso_type: 4, ..large() },
        Header { gso_type: 5, ..large() },
        Header { gso_size: 0xffff, ..large() },
    ];
    let (mut vm, wire, counts) = card();
    for header in unsound {
        send(&mut vm, header, &frame(4000));
        assert_eq!(wire.take(), None, "{header:?}");
    }
    assert_eq!(counts.get("tx_malformed"), unsound.len() as u64);
    for header in sound {
        send(&mut vm, header, &frame(4000));
        assert_eq!(wire.take(), Some((header, frame(4000))));
    }
    works(&mut vm, &wire);

    let (mut vm, wire, _) = card_with(&config(), |_| 1 << 15);
    for header in unsound.into_iter().chain(sound) {
        send(&mut vm, header, &frame(4000));
        assert_eq!(wire.take(), None, "nothing was agreed: {header:?}");
    }
    works(&mut vm, &wire);
}

#[test]
fn hg_n05_buffers_of_the_wrong_direction_are_given_back() {
    let (mut vm, wire, _) = card();
    let posted = vm.driver(TRANSMIT).post(&[&[0; 12], &frame(60)], &[100]);
    vm.kick(TRANSMIT);
    assert_eq!(vm.driver(TRANSMIT).take(), Some((posted.head, 0)));
    assert_eq!(wire.take(), None);

    let readable = vm.driver(RECEIVE).post(&[&[0; 2000]], &[]);
    let mixed = vm.driver(RECEIVE).post(&[&[0; 20]], &[2000]);
    vm.kick(RECEIVE);
    wire.send(Header::default(), &frame(60));
    vm.poll();
    assert_eq!(vm.driver(RECEIVE).take(), Some((readable.head, 0)));
    assert_eq!(vm.driver(RECEIVE).take(), Some((mixed.head, 0)));
    offer(&mut vm, &[2000]);
    vm.poll();
    assert_eq!(received(&mut vm).0, [72], "the frame waited for a buffer that makes sense");
    works(&mut vm, &wire);
}

#[test]
fn hg_n06_receive_buffers_without_room_for_a_header_are_given_back() {
    let (mut vm, wire, _) = card();
    offer(&mut vm, &[0, 1, 11, 12, 12, 50]);
    wire.send(Header::default(), &frame(60));
    vm.poll();
    let (lens, bytes) = received(&mut vm);
    assert_eq!(lens, [0, 0, 0, 12, 12, 48]);
    assert_eq!(split(&bytes).1, frame(60));
    works(&mut vm, &wire);
}

#[test]
fn hg_n07_n12_an_empty_receive_queue_stops_reading_until_the_next_kick() {
    let (mut vm, wire, counts) = card();
    let mut sent = 0;
    while wire.send(Header::default(), &frame(100 + sent)) {
        sent += 1;
    }
    assert!(sent > 64, "{sent} frames wait, more than a turn takes");
    assert_eq!(vm.watched_files(), 1);
    assert_eq!(vm.poll(), 1);
    assert_eq!(vm.watched_files(), 0, "no file is left that could wake the loop");
    assert_eq!((vm.poll(), vm.driver(RECEIVE).used_index()), (0, 0));
    assert_eq!(counts.get("rx_starved"), 1);

    for i in 0..sent {
        offer(&mut vm, &[2000]);
        vm.poll();
        let (_, bytes) = received(&mut vm);
        assert_eq!(split(&bytes).1, frame(100 + i), "in order and none lost");
    }
    works(&mut vm, &wire);
}

#[test]
fn hg_n08_when_the_tap_is_gone_the_cable_is_out_and_the_loop_is_quiet() {
    let (tap, file) = pair();
    let net = Net::new(&config(), SocketTap { file: tap, prepared: Arc::default() });
    let space = VirtioDevice::config(&net).unwrap();
    let features = net.features();
    let mut vm = Harness::with(Box::new(net), features, false);
    offer(&mut vm, &[2000]);
    drop(file);
    assert_eq!(vm.poll(), 1);
    assert_eq!((vm.watched_files(), vm.config_changes()), (0, 1));
    let mut status = [9];
    space.read(6, &mut status);
    assert_eq!((status, vm.asked_for_reset()), ([0], false));
    assert_eq!(send(&mut vm, Header::default(), &frame(60)), 0, "sending goes nowhere, but ends");
    offer(&mut vm, &[2000]);
    assert_eq!(vm.poll(), 0);

    let vm = Harness::with(vm.reset(), features, false);
    assert_eq!(vm.watched_files(), 0, "nor does a reset bring it back");
    assert!(!vm.asked_for_reset());
}

#[test]
fn hg_n10_frames_from_another_address_are_dropped_if_so_configured() {
    let mut spoofed = frame(60);
    spoofed[11] ^= 1;
    let (mut vm, wire, counts) = card_with(&Config { only_own_mac: true, ..config() }, |all| all);
    send(&mut vm, Header::default(), &spoofed);
    assert_eq!((wire.take(), counts.get("tx_spoofed")), (None, 1));
    works(&mut vm, &wire);

    let (mut vm, wire, _) = card();
    send(&mut vm, Header::default(), &spoofed);
    assert_eq!(wire.take(), Some((Header::default(), spoofed)));
    assert!(Config { only_own_mac: true, mac: None, ..config() }.check().is_err());
}

#[test]
fn hg_n11_what_a_busy_host_does_not_take_is_dropped_and_counted() {
    let (mut vm, wire, counts) = card();
    let mut posted = 0;
    while counts.get("tx_dropped") < 10 {
        send(&mut vm, Header::default(), &frame(1514));
        posted += 1;
        assert!(posted < 100_000, "the wire never fills");
    }
    assert_eq!(counts.get("tx_frames") + 10, posted);
    works(&mut vm, &wire);
}

#[test]
fn hg_r06_a_frame_in_any_number_of_pieces_is_one_frame() {
    let (mut vm, wire, _) = card();
    let whole = [&[0; HEADER][..], &frame(243)].concat();
    let pieces: Vec<&[u8]> = whole.chunks(1).collect();
    assert_eq!(pieces.len(), 255);
    vm.driver(TRANSMIT).post(&pieces, &[]);
    vm.kick(TRANSMIT);
    assert_eq!(wire.take(), Some((Header::default(), frame(243))));
}

#[test]
fn hg_r06_a_frame_that_changes_while_it_is_checked_is_sent_as_it_was_checked() {
    let (mut vm, wire, counts) = card_with(&Config { only_own_mac: true, ..config() }, |all| all);
    let good = [&large().bytes()[..], &frame(2000)].concat();
    let mut bad = good.clone();
    bad[6] = 0xff; // csum_start
    bad[7] = 0xff;
    bad[HEADER + 11] ^= 1; // source address
    let at = GuestAddress(crate::testing::HIGH + (1 << 20));
    let memory = vm.memory().clone();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let mutator = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            memory.write_slice(&bad[..32], at).unwrap();
            memory.write_slice(&good[..32], at).unwrap();
        }
    });
    for _ in 0..20_000 {
        let driver = vm.driver(TRANSMIT);
        driver.describe(0, Descriptor { address: at.0, len: 2012, ..Descriptor::default() });
        driver.offer(0);
        vm.kick(TRANSMIT);
        assert_eq!(vm.driver(TRANSMIT).take(), Some((0, 0)));
        if let Some((header, sent)) = wire.take() {
            assert_eq!(sent[6..12], MAC);
            assert!(usize::from(header.csum_start) + usize::from(header.csum_offset) + 2 <= sent.len());
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    mutator.join().unwrap();
    assert_eq!(counts.get("tx_frames") + counts.get("tx_malformed") + counts.get("tx_spoofed"), 20_000);
    works(&mut vm, &wire);
}
