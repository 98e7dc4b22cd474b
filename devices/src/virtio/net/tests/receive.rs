//! Which buffers the card keeps, gives back and waits for.

use super::*;

#[test]
fn buffers_that_were_not_needed_go_back_where_they_were() {
    let (mut vm, wire, _) = card();
    offer(&mut vm, &[1526; 20]);
    wire.send(large(), &frame(9000));
    vm.poll();
    assert_eq!(received(&mut vm).0.len(), 6);
    let state = vm.ring_state(RECEIVE);
    assert_eq!((state.next_available, state.next_used), (6, 6), "none is held between turns");
    wire.send(Header::default(), &frame(60));
    vm.poll();
    assert_eq!(received(&mut vm).0, [72]);
    let state = vm.ring_state(RECEIVE);
    assert_eq!((state.next_available, state.next_used), (7, 7));
}

#[test]
fn a_chain_refused_between_two_good_ones_costs_the_earlier_one_and_nothing_else() {
    let (mut vm, wire, _) = card();
    offer(&mut vm, &[1526; 3]);
    wire.send(large(), &frame(3000));
    vm.poll();
    assert_eq!(received(&mut vm).0, [1526, 1486]);
    // One good buffer is left; the next long frame is expected to need more, so the card looks on.
    offer(&mut vm, &[4, 1526]);
    wire.send(Header::default(), &[0; 3]);
    vm.poll();
    assert_eq!(received(&mut vm).0, [0, 0], "the bad one, and the good one before it");
    wire.send(Header::default(), &frame(60));
    vm.poll();
    let (lens, bytes) = received(&mut vm);
    assert_eq!((lens, split(&bytes).1), (vec![72], &frame(60)[..]));
    let state = vm.ring_state(RECEIVE);
    assert_eq!((state.next_available, state.next_used), (5, 5));
}

#[test]
fn a_frame_waits_for_the_buffers_it_still_needs() {
    for event_idx in [false, true] {
        let (tap, file) = pair();
        let wire = Wire { file, prepared: Arc::default() };
        let net = Net::new(&config(), SocketTap { file: tap, prepared: Arc::default() });
        let features = net.features();
        let mut vm = Harness::with(Box::new(net), features, event_idx);
        offer(&mut vm, &[1526, 700]);
        wire.send(large(), &frame(5000));
        wire.send(Header::default(), &frame(60));
        vm.poll();
        let state = vm.ring_state(RECEIVE);
        assert_eq!((state.next_available, state.next_used), (0, 0), "nothing is held while it waits");
        assert_eq!(vm.watched_files(), 0);
        if event_idx {
            let avail_event = vm.driver(RECEIVE).used_ring() + 4 + 8 * 256;
            let event: u16 = vm.memory().read_obj(GuestAddress(avail_event)).unwrap();
            assert_eq!(event, 2, "a kick is asked for when the third buffer comes");
        }
        offer(&mut vm, &[1526]);
        assert_eq!(vm.driver(RECEIVE).used_index(), 0);
        offer(&mut vm, &[1526, 1526, 1526]);
        vm.poll();
        let (lens, bytes) = received(&mut vm);
        assert_eq!(lens, [1526, 700, 1526, 1260, 72]);
        assert_eq!(split(&bytes[..5012]), (Header { num_buffers: 4, ..large() }, &frame(5000)[..]));
        assert_eq!(split(&bytes[5012..]).1, frame(60));
        assert_eq!(vm.watched_files(), 1);
    }
}

#[test]
fn a_frame_for_which_half_a_ring_has_no_room_is_dropped() {
    let (mut vm, wire, counts) = card();
    offer(&mut vm, &[100; 128]);
    wire.send(large(), &frame(20_000));
    wire.send(Header::default(), &frame(1000));
    vm.poll();
    let (lens, bytes) = received(&mut vm);
    assert_eq!((lens.len(), counts.get("rx_dropped")), (11, 1));
    assert_eq!(split(&bytes).1, frame(1000));
}

#[test]
fn a_waiting_frame_and_held_buffers_do_not_outlive_a_reset() {
    let (tap, file) = pair();
    let wire = Wire { file, prepared: Arc::default() };
    let net = Net::new(&config(), SocketTap { file: tap, prepared: Arc::default() });
    let features = net.features();
    let mut vm = Harness::with(Box::new(net), features, false);
    offer(&mut vm, &[100]);
    wire.send(large(), &frame(5000));
    vm.poll();
    let mut vm = Harness::with(vm.reset(), features, false);
    offer(&mut vm, &[1526; 10]);
    vm.poll();
    assert_eq!(received(&mut vm).0, [0u32; 0], "the frame went with the driver it was for");
    wire.send(Header::default(), &frame(60));
    vm.poll();
    assert_eq!(received(&mut vm).0, [72]);
}

#[test]
fn one_turn_moves_at_most_64_frames_and_one_interrupt_tells_of_them() {
    let (mut vm, wire, _) = card();
    offer(&mut vm, &[200; 100]);
    for _ in 0..100 {
        assert!(wire.send(Header::default(), &frame(60)));
    }
    vm.poll();
    assert_eq!((vm.driver(RECEIVE).used_index(), vm.interrupts(RECEIVE)), (64, 1));
    vm.poll();
    assert_eq!((vm.driver(RECEIVE).used_index(), vm.interrupts(RECEIVE)), (100, 2));
    assert_eq!(received(&mut vm).0, [72; 100]);
}

#[test]
fn a_driver_that_posts_nonsense_for_ever_does_not_keep_the_loop() {
    let (mut vm, wire, _) = card();
    offer(&mut vm, &[4; 256]);
    wire.send(Header::default(), &frame(60));
    vm.poll();
    assert_eq!(vm.driver(RECEIVE).used_index(), 256);
    assert_eq!(vm.watched_files(), 0);
    assert!(!vm.asked_for_reset());
}
