//! A card whose machine is held to a rate.

use super::*;

fn limited(limits: &[&str]) -> (Harness, Wire, Counts, Meters) {
    let (meters, _file) = Meters::create().unwrap();
    limits.iter().for_each(|limit| meters.set(&limit.parse().unwrap()));
    let (tap, file) = pair();
    let mut net = Net::new(&config(), SocketTap { file: tap, prepared: Arc::default() });
    net.charge_at(meters.clone());
    let counts = Counts(net.counters().into_iter().map(|counter| (counter.name(), counter)).collect());
    (Harness::new(Box::new(net)), Wire { file, prepared: Arc::default() }, counts, meters)
}

/// Lets time pass until the device has looked again.
fn look_again(vm: &mut Harness) {
    while vm.poll() == 0 {
        std::thread::yield_now();
    }
}

#[test]
fn frames_beyond_the_rate_wait_in_the_ring_and_are_sent_when_the_limit_is_lifted() {
    let (mut vm, wire, counts, meters) = limited(&["net-send=1ops:1ops"]);
    send(&mut vm, Header::default(), &frame(60));
    assert!(meters.paid(What::NetSend)[1] > 0, "it was charged");
    meters.owe_for_ever(What::NetSend);
    for len in [61, 62] {
        vm.driver(TRANSMIT).post(&[&Header::default().bytes(), &frame(len)], &[]);
    }
    vm.kick(TRANSMIT);
    assert!(vm.driver(TRANSMIT).take().is_none());
    assert_eq!((counts.get("tx_frames"), counts.get("held")), (1, 1));
    meters.set(&"net-send=none".parse().unwrap());
    look_again(&mut vm);
    let lens: Vec<_> = std::iter::from_fn(|| wire.take()).map(|(_, frame)| frame.len()).collect();
    assert_eq!(lens, [60, 61, 62]);
}

#[test]
fn frames_beyond_the_rate_wait_in_the_tap_which_is_not_watched_meanwhile() {
    let (mut vm, wire, counts, meters) = limited(&["net-receive=1ops:1ops"]);
    offer(&mut vm, &[1526; 20]);
    wire.send(Header::default(), &frame(60));
    vm.poll();
    assert_eq!(received(&mut vm).0, [72]);
    assert!(meters.paid(What::NetReceive)[1] > 0, "it was charged");
    meters.set(&"net-receive=1ops:1ops".parse().unwrap());
    meters.owe_for_ever(What::NetReceive);
    wire.send(Header::default(), &frame(61));
    vm.poll();
    assert_eq!((counts.get("rx_frames"), counts.get("held")), (1, 1));
    assert_eq!(vm.watched_files(), 1, "the timer");
    // More buffers do not help.
    offer(&mut vm, &[1526; 20]);
    assert_eq!(received(&mut vm).0, [0u32; 0]);
    meters.set(&"net-receive=none".parse().unwrap());
    look_again(&mut vm);
    assert_eq!(received(&mut vm).0, [73]);
    assert_eq!(vm.watched_files(), 2, "and the tap");
}

#[test]
fn a_card_that_is_held_both_ways_goes_on_both_ways() {
    let (mut vm, wire, counts, _meters) = limited(&["net-receive=20ops:1ops", "net-send=10ops:1ops"]);
    let begun = std::time::Instant::now();
    offer(&mut vm, &[1526; 20]);
    for _ in 0..3 {
        wire.send(Header::default(), &frame(60));
        vm.driver(TRANSMIT).post(&[&Header::default().bytes(), &frame(60)], &[]);
    }
    vm.kick(TRANSMIT);
    while counts.get("rx_frames") < 3 || counts.get("tx_frames") < 3 {
        look_again(&mut vm);
    }
    assert!(begun.elapsed().as_millis() >= 200, "two of three frames had to be earned");
}

#[test]
fn a_card_that_is_held_is_held_after_a_pause_and_not_watched_after_a_reset() {
    let (mut vm, wire, counts, meters) = limited(&["net-receive=1ops:1ops"]);
    offer(&mut vm, &[1526; 4]);
    wire.send(Header::default(), &frame(60));
    vm.poll();
    meters.owe_for_ever(What::NetReceive);
    wire.send(Header::default(), &frame(60));
    vm.poll();
    vm.pause_and_resume();
    vm.poll();
    assert_eq!(counts.get("rx_frames"), 1);
    let vm = Harness::new(vm.reset());
    assert_eq!(vm.watched_files(), 1, "the tap");
}
