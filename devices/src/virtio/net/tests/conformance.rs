//! The requirements of VIRTIO 1.2 §5.1 on a network device, by their numbers in the conformance list.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_GSO: u64 = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55;
const HOST_GSO: u64 = 1 << 11 | 1 << 12 | 1 << 13 | 1 << 56;
const MRG_RXBUF: u64 = 1 << 15;

#[test]
fn c085_c135_c136_c137_no_control_queue_and_nothing_that_needs_one() {
    let (tap, _wire) = pair();
    let net = Net::new(&config(), SocketTap { file: tap, prepared: Arc::default() });
    for off in [2, 10, 14, 17, 18, 19, 20, 21, 22, 23, 57, 60, 61, 62] {
        assert_eq!(net.features() & 1 << off, 0, "feature {off}");
    }
    assert_eq!(net.queues(), [256, 256]);
}

#[test]
fn c086_an_mtu_below_68_is_refused() {
    for (mtu, possible) in [(0, false), (67, false), (68, true), (1500, true), (65535, true)] {
        let config = Config { mtu: Some(mtu), ..config() };
        assert_eq!(config.check().is_ok(), possible, "{mtu}");
    }
}

#[test]
fn c087_the_driver_cannot_change_the_configuration() {
    let config = Config { mtu: Some(9000), ..config() };
    let net = Net::new(&config, SocketTap { file: pair().0, prepared: Arc::default() });
    let space = VirtioDevice::config(&net).unwrap();
    space.write(0, &[0xff; 12]);
    let mut bytes = [0; 12];
    space.read(0, &mut bytes);
    assert_eq!(bytes[..6], MAC);
    assert_eq!(bytes[6..], [1, 0, 0, 0, 0x28, 0x23], "link up, no pairs, MTU 9000");
}

#[test]
fn c088_frames_longer_than_the_mtu_do_not_pass() {
    let (mut vm, wire, counts) = card_with(&Config { mtu: Some(1000), ..config() }, |all| all);
    let mut arrives = |header: Header, frame: &[u8]| {
        offer(&mut vm, &[2048]);
        assert!(wire.send(header, frame));
        vm.poll();
        let (lens, bytes) = received(&mut vm);
        assert!(lens.is_empty() || bytes[HEADER..] == *frame);
        !lens.is_empty()
    };
    let plain = Header::default();
    let mut tagged = frame(1018);
    tagged[12..14].copy_from_slice(&[0x81, 0x00]);
    assert!(arrives(plain, &frame(1014)));
    assert!(!arrives(plain, &frame(1015)));
    assert!(arrives(plain, &tagged), "a VLAN tag is part of the link's header");
    tagged.push(0);
    assert!(!arrives(plain, &tagged));
    assert!(arrives(large(), &frame(1900)), "a large frame is cut by the driver");
    assert_eq!(counts.get("rx_dropped"), 2);

    // Without the feature the driver was told nothing.
    let (mut vm, wire, _) = card_with(&Config { mtu: Some(1000), ..config() }, |all| all & !(1 << 3));
    offer(&mut vm, &[2048]);
    wire.send(plain, &frame(1500));
    vm.poll();
    assert_eq!(received(&mut vm).0, [1512]);
}

#[test]
fn c089_c093_a_frame_is_sent_in_one_piece_and_as_it_is() {
    let (mut vm, wire, counts) = card_with(&Config { mtu: Some(1500), ..config() }, |all| all);
    for len in [14, 60, 1000, 1514] {
        assert_eq!(send(&mut vm, Header::default(), &frame(len)), 0);
        assert_eq!(wire.take(), Some((Header::default(), frame(len))));
        assert_eq!(wire.take(), None);
    }
    assert_eq!((counts.get("tx_frames"), counts.get("tx_bytes")), (4, 14 + 60 + 1000 + 1514));
}

#[test]
fn c090_c091_unknown_flags_and_unused_fields_do_not_reach_the_host() {
    let (mut vm, wire, _) = card();
    let noise = Header {
        flags: 0xfe,
        gso_type: 0,
        hdr_len: 9,
        gso_size: 9,
        csum_start: 0xffff,
        csum_offset: 0xffff,
        num_buffers: 9,
    };
    send(&mut vm, noise, &frame(60));
    assert_eq!(wire.take().unwrap().0, Header::default());
    let wanted = Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() };
    send(&mut vm, Header { flags: 0xff, ..wanted }, &frame(60));
    assert_eq!(wire.take().unwrap().0, wanted);
}

#[test]
fn c092_a_wrong_header_length_does_not_matter() {
    let (mut vm, wire, _) = card();
    for (told, passed) in [(0, 0), (54, 54), (4000, 4000), (4001, 0), (65535, 0)] {
        send(&mut vm, Header { hdr_len: told, ..large() }, &frame(4000));
        let (header, sent) = wire.take().unwrap();
        assert_eq!(header, Header { hdr_len: passed, ..large() });
        assert_eq!(sent, frame(4000));
    }
}

#[test]
fn c094_c096_a_long_frame_fills_buffers_in_order_and_says_how_many() {
    let (mut vm, wire, _) = card();
    offer(&mut vm, &[600, 100, 2000, 300]);
    wire.send(Header::default(), &frame(1000));
    vm.poll();
    let third = chain_at(&mut vm, 2);
    assert_eq!(vm.driver(RECEIVE).written(&third)[312..], [0xa5; 1688], "nothing past the length");
    let (lens, bytes) = received(&mut vm);
    assert_eq!(lens, [600, 100, 312], "all but the last are full, the fourth is left alone");
    let (header, got) = split(&bytes);
    assert_eq!(header.num_buffers, 3);
    assert_eq!(got, frame(1000));
}

#[test]
fn c095_without_merging_a_frame_has_one_buffer_or_is_dropped() {
    let (mut vm, wire, counts) = card_with(&config(), |all| all & !MRG_RXBUF);
    offer(&mut vm, &[1000, 2000]);
    wire.send(Header::default(), &frame(988));
    wire.send(Header::default(), &frame(1988));
    wire.send(Header::default(), &frame(1989));
    vm.poll();
    let (lens, bytes) = received(&mut vm);
    assert_eq!(lens, [1000, 2000]);
    assert_eq!(split(&bytes).0.num_buffers, 1);
    assert_eq!(split(&bytes[1000..]), (Header { num_buffers: 1, ..Header::default() }, &frame(1988)[..]));
    offer(&mut vm, &[2000]);
    vm.poll();
    assert_eq!(received(&mut vm).0, [0u32; 0], "no buffer is used for what does not fit");
    assert_eq!(counts.get("rx_dropped"), 1);
}

#[test]
fn c095_without_merging_no_frame_is_spread_over_buffers() {
    let (mut vm, wire, counts) = card_with(&config(), |all| all & !MRG_RXBUF);
    offer(&mut vm, &[100, 2000, 2000]);
    wire.send(Header::default(), &frame(1500));
    wire.send(Header::default(), &frame(60));
    vm.poll();
    let (lens, bytes) = received(&mut vm);
    assert_eq!(lens, [72], "buffers are used in order, and the first has no room for the long one");
    assert_eq!(split(&bytes).1, frame(60));
    assert_eq!(counts.get("rx_dropped"), 1);
}

#[test]
fn c097_the_buffers_of_a_frame_appear_at_once() {
    let (mut vm, wire, _) = card();
    let used = GuestAddress(vm.driver(RECEIVE).used_ring() + 2);
    let memory = vm.memory().clone();
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let watcher = std::thread::spawn(move || {
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let last = ended.load(Ordering::Acquire);
            let index: u16 = memory.read_obj(used).unwrap();
            assert_eq!(index % 128, 0, "each frame here takes 128 buffers");
            seen.insert(index);
            if last {
                return seen;
            }
        }
    });
    for _ in 0..400 {
        offer(&mut vm, &[500; 128]);
        wire.send(large(), &frame(63_900));
        vm.poll();
    }
    done.store(true, Ordering::Release);
    assert!(watcher.join().unwrap().contains(&51_200));
}

#[test]
fn c098_without_guest_csum_no_flag_is_set() {
    let (mut vm, wire, counts) = card_with(&config(), |all| all & !(GUEST_CSUM | GUEST_GSO));
    offer(&mut vm, &[2000]);
    wire.send(Header { flags: 2, ..Header::default() }, &frame(60));
    vm.poll();
    assert_eq!(split(&received(&mut vm).1).0.flags, 0);
    wire.send(Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::default() }, &frame(60));
    offer(&mut vm, &[2000]);
    vm.poll();
    assert_eq!((counts.get("rx_frames"), counts.get("rx_dropped")), (1, 1), "a sum nobody would fill in");
}

#[test]
fn c099_large_frames_that_were_not_agreed_on_do_not_pass() {
    for (kind, missing) in [(1, 1 << 7), (4, 1 << 8), (5, 1 << 54), (5, 1 << 55), (0x81, 1 << 9), (3, 0)] {
        let (mut vm, wire, counts) = card_with(&config(), |all| all & !missing);
        offer(&mut vm, &[4000]);
        wire.send(Header { gso_type: kind, ..large() }, &frame(3000));
        vm.poll();
        assert_eq!((counts.get("rx_frames"), counts.get("rx_dropped")), (0, 1), "type {kind:#x}");
    }
}

#[test]
fn c100_a_large_frame_has_a_size_and_an_unfinished_sum() {
    let (mut vm, wire, counts) = card();
    offer(&mut vm, &[4000, 4000]);
    for wrong in [Header { flags: 0, ..large() }, Header { gso_size: 0, ..large() }] {
        wire.send(wrong, &frame(3000));
    }
    wire.send(Header { flags: 1 | 4, ..large() }, &frame(3000));
    vm.poll();
    let (lens, bytes) = received(&mut vm);
    assert_eq!(lens, [3012]);
    assert_eq!(split(&bytes).0, Header { num_buffers: 1, ..large() }, "RSC_INFO is not passed");
    assert_eq!(counts.get("rx_dropped"), 2);
}

#[test]
fn features_without_those_they_need_are_refused() {
    let net = Net::new(&config(), SocketTap { file: pair().0, prepared: Arc::default() });
    let all = net.features();
    for (features, good) in [
        (all, true),
        (0, true),
        (CSUM | GUEST_CSUM, true),
        (all & !CSUM, false),
        (all & !GUEST_CSUM, false),
        (all & !(CSUM | HOST_GSO), true),
        (all & !(GUEST_CSUM | GUEST_GSO), true),
        (CSUM | 1 << 13, false),
        (GUEST_CSUM | 1 << 9, false),
        (1 << 56, false),
    ] {
        assert_eq!(net.accepts(features), good, "{features:#x}");
    }
}

#[test]
fn the_tap_learns_what_the_driver_takes() {
    let (_vm, wire, _) = card_with(&config(), |all| all & !(1 << 8));
    let prepared = wire.prepared.lock().unwrap();
    let [agreed] = prepared[..] else { panic!("once per start: {prepared:?}") };
    assert!(agreed.guest.csum && agreed.guest.tso4 && agreed.merge);
    assert!(!agreed.guest.tso6);
}
