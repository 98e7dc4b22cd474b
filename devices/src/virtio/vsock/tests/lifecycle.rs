//! How connections end, and how long anything is waited for (HG-V30 to HG-V39).

use super::*;

#[test]
fn hg_v30_a_guest_that_posts_no_buffers_holds_the_host_up_without_cost() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    let other = super::key(2, 2);
    let mut bystander = vm.guest_dials(other);
    // Takes all buffers out of the ring: packets of 1 byte, not given back.
    host.set_nonblocking(true).unwrap();
    let mut written = 0;
    for _ in 0..10_000 {
        written += host.write(&[7; 4096]).unwrap_or(0);
        vm.harness.poll();
    }
    assert_eq!(vm.harness.poll(), 0, "nothing is watched that could spin");
    assert_eq!(
        host.write(&[7]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock,
        "the host process is held up"
    );
    // C-125: what the guest sends is still handled.
    vm.send(data(other, 2), b"tx");
    let mut bytes = [0; 2];
    bystander.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"tx");
    // It posts buffers again: everything arrives.
    let mut got = 0;
    let mut taken = 0;
    while got < written {
        while let Some((header, payload)) = vm.receive() {
            if header.op == Some(Op::ReadWrite) {
                got += payload.len();
            }
        }
        assert!(got > taken || got == written, "the stream is stuck at {got} of {written}");
        taken = got;
        let fwd_cnt = u32::try_from(got).unwrap();
        vm.send(Header { fwd_cnt, ..from_guest(key, Op::CreditUpdate) }, b"");
    }
    assert_eq!(got, written);
}

#[test]
fn c_125_what_the_guest_sends_is_handled_while_answers_wait_for_its_buffers() {
    let mut vm = Vm::starved();
    let (one, other) = (key(1, 1), key(2, 2));
    let mut hosts = [one, other].map(|key| {
        vm.send(from_guest(key, Op::Request), b"");
        let dial = vm.question();
        let (near, far) = UnixStream::pair().unwrap();
        vm.server.accept(dial.id, far.as_fd()).unwrap();
        vm.harness.poll();
        patient(near)
    });
    for (key, host) in [one, other].into_iter().zip(&mut hosts) {
        vm.send(data(key, 2), b"tx");
        vm.send(from_guest(key, Op::CreditRequest), b"");
        let mut bytes = [0; 2];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"tx");
    }
    vm.send(from_guest(key(3, 3), Op::CreditRequest), b"");
    vm.post(16, 128);
    vm.expect(Op::Reset, key(3, 3));
    vm.expect(Op::Response, one);
    vm.expect(Op::Response, other);
}

#[test]
fn hg_v31_the_host_ends_its_direction_first_then_the_guest() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    host.write_all(b"last").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(vm.receive().unwrap().1, b"last");
    assert_eq!(vm.expect(Op::Shutdown, key).flags, SHUTDOWN_SEND);
    vm.expect_silence();
    vm.send(data(key, 5), b"still");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    vm.send(shutdown(key, SHUTDOWN_BOTH), b"");
    vm.expect(Op::Reset, key);
    assert!(at_end(&mut host));
    assert_eq!(vm.harness.watched_files(), BASELINE);
}

#[test]
fn hg_v31_the_guest_ends_its_direction_first_then_the_host() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    vm.send(data(key, 4), b"last");
    vm.send(shutdown(key, SHUTDOWN_SEND), b"");
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    host.write_all(b"answer").unwrap();
    assert_eq!(vm.receive().unwrap().1, b"answer");
    drop(host);
    assert_eq!(vm.expect(Op::Shutdown, key).flags, SHUTDOWN_BOTH);
    vm.send(from_guest(key, Op::Reset), b"");
    vm.expect_silence();
    assert_eq!(vm.harness.watched_files(), BASELINE);
}

#[test]
fn c130_ended_directions_stay_ended() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    vm.send(shutdown(key, SHUTDOWN_SEND), b"");
    vm.send(shutdown(key, 0), b"");
    assert!(at_end(&mut host));
    vm.send(data(key, 1), b"x");
    vm.expect(Op::Reset, key);
}

#[test]
fn a_guest_that_will_not_receive_makes_the_hosts_writes_fail() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    vm.send(shutdown(key, SHUTDOWN_RECEIVE), b"");
    assert_eq!(vm.expect(Op::Shutdown, key).flags, SHUTDOWN_SEND);
    assert_eq!(host.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    vm.send(data(key, 1), b"y");
    host.read_exact(&mut [0]).unwrap();
    vm.expect_silence();
}

#[test]
fn hg_v32_what_the_host_wrote_before_it_went_still_arrives() {
    let mut vm = Vm::starved();
    let key = key(1, 1);
    vm.send(from_guest(key, Op::Request), b"");
    let dial = vm.question();
    let (mut host, far) = UnixStream::pair().unwrap();
    vm.server.accept(dial.id, far.as_fd()).unwrap();
    drop(far);
    vm.harness.poll();
    // The host leaves bytes of the guest's unread, too: its end then counts as broken off.
    vm.send(data(key, 6), b"unread");
    host.write_all(&[9; 10_000]).unwrap();
    drop(host);
    while vm.harness.poll() > 0 {}
    vm.send(data(key, 4), b"late");
    vm.post(16, 1000);
    vm.expect(Op::Response, key);
    let mut got = 0;
    let flags = loop {
        let (header, payload) = vm.receive().unwrap();
        match header.op {
            Some(Op::ReadWrite) => got += payload.len(),
            Some(Op::Shutdown) if header.flags == SHUTDOWN_BOTH => break header.flags,
            Some(Op::Shutdown | Op::CreditUpdate) => {}
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!((got, flags), (10_000, SHUTDOWN_BOTH));
    vm.expect_silence();
}

#[test]
fn hg_v33_a_guest_that_never_confirms_is_reset_after_two_seconds() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    drop(vm.guest_dials(key));
    assert_eq!(vm.expect(Op::Shutdown, key).flags, SHUTDOWN_BOTH);
    vm.pass(1900);
    vm.expect_silence();
    vm.pass(200);
    vm.expect(Op::Reset, key);
    assert_eq!(vm.harness.watched_files(), BASELINE);
    vm.guest_dials(key);
}

#[test]
fn hg_v34_a_request_without_an_answer_is_given_up_after_two_seconds() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    vm.send(from_guest(key, Op::Request), b"");
    let dial = vm.question();
    vm.pass(1900);
    vm.expect_silence();
    vm.pass(200);
    vm.expect(Op::Reset, key);
    // The answer comes too late: it is closed, and a new question is another one.
    let (mut near, far) = UnixStream::pair().unwrap();
    vm.server.accept(dial.id, far.as_fd()).unwrap();
    drop(far);
    vm.send(from_guest(key, Op::Request), b"");
    vm.settle();
    assert!(at_end(&mut near));
    assert_ne!(vm.question().id, dial.id);

    let mut host = UnixStream::connect(&vm.socket).unwrap();
    host.write_all(b"CONNECT 80\n").unwrap();
    let (request, _) = vm.receive().unwrap();
    vm.pass(2100);
    assert!(at_end(&mut host));
    let resets: Vec<_> = vm.inbox.drain(..).map(|(header, _)| (header.op, header.key_of_guest())).collect();
    assert_eq!(resets.len(), 2, "both requests were given up");
    assert!(resets.contains(&(Some(Op::Reset), request.key_of_guest())));
}

#[test]
fn hg_v39_every_connection_that_ends_at_once_is_reset() {
    let mut vm = Vm::starved();
    let mut ends = Vec::new();
    for peer in 0..256 {
        vm.send(from_guest(key(1, peer), Op::Request), b"");
        let dial = vm.question();
        let (near, far) = UnixStream::pair().unwrap();
        vm.server.accept(dial.id, far.as_fd()).unwrap();
        ends.push(near);
        vm.harness.poll();
    }
    for peer in 0..256 {
        vm.send(shutdown(key(1, peer), SHUTDOWN_BOTH), b"");
    }
    assert!(ends.iter_mut().all(at_end), "host processes need not wait for the guest's buffers");
    vm.post(64, 128);
    vm.settle();
    let resets: std::collections::HashSet<_> = vm
        .inbox
        .drain(..)
        .filter(|(h, _)| h.op == Some(Op::Reset))
        .map(|(h, _)| h.destination_port)
        .collect();
    assert_eq!(resets.len(), 256);
    assert_eq!(vm.harness.watched_files(), BASELINE);
}

#[test]
fn a_backlog_outlives_the_guests_end_of_the_connection() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    let mut sent = 0;
    // Until the host's socket is full and 8 KiB wait in the device.
    loop {
        let before = sent;
        vm.send(data(key, 8192), &[3; 8192]);
        sent += 8192;
        vm.send(from_guest(key, Op::CreditRequest), b"");
        let mut forwarded = 0;
        while let Some((header, _)) = vm.receive() {
            forwarded = header.fwd_cnt as usize;
        }
        if forwarded <= before {
            break;
        }
    }
    vm.send(shutdown(key, SHUTDOWN_BOTH), b"");
    vm.expect(Op::Reset, key);
    // The guest may use its port again meanwhile.
    let _next = vm.guest_dials(key);
    let mut got = Vec::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match host.read(&mut block).unwrap() {
            0 => break,
            n => got.extend_from_slice(&block[..n]),
        }
        vm.settle();
    }
    assert_eq!(got.len(), sent);
}
