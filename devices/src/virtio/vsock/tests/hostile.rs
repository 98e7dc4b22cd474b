//! What a guest's driver may try, by the names of the scenarios (HG-V01 to HG-V23).

use super::*;

/// Sends a packet to a live connection and to an unknown one; returns what came back for each.
fn provoke(header: impl Fn(Key) -> Header, payload: &[u8]) -> [Option<Header>; 2] {
    let mut vm = Vm::new();
    let live = key(1, 100);
    let _host = vm.guest_dials(live);
    [live, key(2, 200)].map(|key| {
        let header = header(key);
        vm.send(header, payload);
        vm.settle();
        assert!(vm.inbox.len() <= 1, "one packet is answered once at most");
        assert!(!vm.harness.asked_for_reset());
        vm.inbox.pop_front().map(|(header, _)| header)
    })
}

fn ops(answers: [Option<Header>; 2]) -> [Option<Op>; 2] {
    answers.map(|answer| answer.and_then(|header| header.op))
}

#[test]
fn hg_v01_a_header_may_be_split_at_any_byte_but_not_cut_short() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    for at in 1..44 {
        vm.send_in_pieces(data(key, 3), b"abc", &[at, 44 - at]);
        let mut bytes = [0; 3];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"abc");
    }
    for short in 1..44 {
        let bytes = data(key, 0).to_wire();
        let posted = vm.harness.driver(TX).post(&[&bytes[..short]], &[]);
        vm.harness.kick(TX);
        assert_eq!(vm.harness.driver(TX).take(), Some((posted.head, 0)));
    }
    assert!(!vm.harness.asked_for_reset());
    vm.send(data(key, 1), b"!");
    host.read_exact(&mut [0]).unwrap();
}

#[test]
fn hg_v02_a_length_that_lies_ends_the_connection_and_touches_nothing_else() {
    for len in [4, 64 * 1024, 64 * 1024 + 1, u32::MAX] {
        let answers = provoke(|key| Header { len, ..data(key, 0) }, b"abc");
        assert_eq!(ops(answers), [Some(Op::Reset), Some(Op::Reset)], "length {len}");
    }
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    vm.send(data(key, 0), b"not counted");
    vm.send(data(key, 2), b"ab and more");
    vm.send(data(key, 1), b"c");
    let mut bytes = [0; 3];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abc");
    assert!(!readable(&host));
}

#[test]
fn hg_v03_an_operation_without_meaning_ends_the_connection() {
    for op in [0u16, 8, 65535] {
        let mut vm = Vm::new();
        let key = key(1, 1);
        let mut host = vm.guest_dials(key);
        let mut bytes = data(key, 0).to_wire();
        bytes[30..32].copy_from_slice(&op.to_le_bytes());
        vm.harness.driver(TX).post(&[&bytes], &[]);
        vm.harness.kick(TX);
        vm.expect(Op::Reset, key);
        assert!(at_end(&mut host));
        vm.expect_silence();
    }
}

#[test]
fn hg_v04_another_socket_type_is_answered_by_a_reset_of_that_type() {
    for kind in [0, 2, 3, 65535] {
        for (op, expected) in
            [(Op::Request, Some(Op::Reset)), (Op::ReadWrite, Some(Op::Reset)), (Op::Reset, None)]
        {
            let answers = provoke(|key| Header { kind, ..from_guest(key, op) }, b"");
            assert_eq!(ops(answers), [expected, expected]);
            assert!(answers.into_iter().flatten().all(|answer| answer.kind == kind));
        }
    }
}

#[test]
fn hg_v05_packets_of_or_for_somebody_else_are_dropped() {
    for (source, destination) in
        [(CID + 1, 2), (2, 2), (0, 2), (CID, 1), (CID, 3), (CID, 1 << 32 | 2), (1 << 32 | CID, 2)]
    {
        let header =
            |key| Header { source_cid: source, destination_cid: destination, ..from_guest(key, Op::Request) };
        assert_eq!(ops(provoke(header, b"")), [None, None], "{source} to {destination}");
    }
}

#[test]
fn hg_v06_v07_strays_are_reset_and_resets_are_not_answered() {
    for op in [Op::Response, Op::Shutdown, Op::ReadWrite, Op::CreditUpdate, Op::CreditRequest] {
        assert_eq!(ops(provoke(|key| from_guest(key, op), b""))[1], Some(Op::Reset), "{op:?}");
    }
    assert_eq!(ops(provoke(|key| from_guest(key, Op::Reset), b"")), [None, None]);
}

#[test]
fn hg_v08_a_request_for_what_is_open_ends_it() {
    for op in [Op::Request, Op::Response] {
        let mut vm = Vm::new();
        let key = key(1, 1);
        let mut host = vm.guest_dials(key);
        vm.send(from_guest(key, op), b"");
        vm.expect(Op::Reset, key);
        assert!(at_end(&mut host));
        // The ports are free again.
        vm.guest_dials(key);
    }
}

#[test]
fn hg_v09_a_flood_of_requests_fills_the_table_and_no_more() {
    let mut vm = Vm::with_room_for(3);
    vm.post(64, 128);
    // Not for as long as a request waits for its answer.
    for peer in 0..1_000 {
        vm.send(from_guest(key(5, peer), Op::Request), b"");
        if peer >= 3 {
            vm.expect(Op::Reset, key(5, peer));
        }
    }
    for _ in 0..3 {
        vm.question();
    }
    assert!(!vm.asked(), "the parent hears of no more than there is room for");
    vm.pass(2000);
    assert_eq!(vm.inbox.drain(..).filter(|(header, _)| header.op == Some(Op::Reset)).count(), 3);
    let key = key(5, 5);
    vm.guest_dials(key);
}

#[test]
fn hg_v09_a_flood_without_receive_buffers_costs_a_bounded_queue() {
    let mut vm = Vm::with_room_for(1);
    for peer in 0..10_000 {
        vm.send(from_guest(key(5, peer), Op::Request), b"");
    }
    vm.post(128, 128);
    vm.settle();
    assert_eq!(vm.inbox.len(), 256, "the oldest resets are lost");
    assert_eq!(vm.inbox.back().unwrap().0.destination_port, 9_999);
}

#[test]
fn hg_v20_a_guest_without_room_is_sent_nothing_until_it_has_some() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    vm.send(Header { buf_alloc: 0, ..from_guest(key, Op::CreditUpdate) }, b"");
    host.write_all(&[7; 100]).unwrap();
    vm.expect_silence();
    assert_eq!(vm.harness.poll(), 0, "the host's socket is not watched meanwhile");
    vm.send(Header { buf_alloc: 60, ..from_guest(key, Op::CreditUpdate) }, b"");
    assert_eq!(vm.receive().unwrap().1.len(), 60);
    // It shrinks its buffer below what is in flight.
    vm.send(Header { buf_alloc: 10, ..from_guest(key, Op::CreditUpdate) }, b"");
    vm.expect_silence();
    vm.send(Header { buf_alloc: u32::MAX, fwd_cnt: 60, ..from_guest(key, Op::CreditUpdate) }, b"");
    assert_eq!(vm.receive().unwrap().1.len(), 40);
}

#[test]
fn hg_v21_a_forward_count_ahead_of_the_truth_gives_no_credit() {
    for fwd_cnt in [1, 1 << 31, u32::MAX] {
        let mut vm = Vm::new();
        let key = key(1, 1);
        let mut host = vm.guest_dials(key);
        vm.send(Header { fwd_cnt, buf_alloc: 4096, ..from_guest(key, Op::CreditUpdate) }, b"");
        host.write_all(b"x").unwrap();
        let in_flight = 0u32.wrapping_sub(fwd_cnt);
        if in_flight < 4096 {
            assert_eq!(vm.receive().unwrap().1, b"x");
        } else {
            vm.expect_silence();
            vm.send(from_guest(key, Op::CreditUpdate), b"");
            assert_eq!(vm.receive().unwrap().1, b"x");
        }
    }
}

/// Fills a connection's host socket and backlog, honestly, after as many bytes as were sent `before`. Returns the bytes
/// sent.
fn fill(vm: &mut Vm, key: Key, before: u32) -> Vec<u8> {
    let mut sent: Vec<u8> = Vec::new();
    let (mut forwarded, block) = (0, 8192);
    loop {
        vm.send(from_guest(key, Op::CreditRequest), b"");
        while let Some((header, _)) = vm.receive() {
            forwarded = (header.fwd_cnt - before) as usize;
        }
        let room = BUFFER as usize - (sent.len() - forwarded);
        if room == 0 {
            return sent;
        }
        let bytes: Vec<u8> = (0..room.min(block)).map(|i| (sent.len() + i) as u8 ^ 0x5a).collect();
        vm.send(data(key, bytes.len()), &bytes);
        sent.extend(bytes);
    }
}

#[test]
fn c_127_every_packet_of_a_stream_says_how_much_room_there_is() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    vm.send(from_guest(key, Op::Request), b"");
    let dial = vm.question();
    let (near, far) = UnixStream::pair().unwrap();
    vm.server.accept(dial.id, far.as_fd()).unwrap();
    drop(far);
    let mut host = patient(near);
    let next = |vm: &mut Vm, op: Op| {
        let (header, _) = vm.receive().unwrap();
        assert_eq!((header.op, header.buf_alloc), (Some(op), BUFFER));
        header.fwd_cnt
    };
    assert_eq!(next(&mut vm, Op::Response), 0);
    let mut sent = 0;
    for _ in 0..3 {
        vm.send(data(key, 1000), &[7; 1000]);
        sent += 1000;
        host.write_all(b"x").unwrap();
        assert_eq!(next(&mut vm, Op::ReadWrite), sent, "what went on to the host is room again");
    }
    let more = u32::try_from(fill(&mut vm, key, sent).len()).unwrap();
    vm.send(from_guest(key, Op::CreditRequest), b"");
    assert_eq!(next(&mut vm, Op::CreditUpdate), sent + more - BUFFER, "what waits in the device is not");
    let mut left = sent + more;
    while left > 0 {
        let n = left.min(10_000);
        host.read_exact(&mut vec![0; n as usize]).unwrap();
        left -= n;
        vm.settle();
    }
    vm.inbox.clear();
    vm.send(from_guest(key, Op::CreditRequest), b"");
    assert_eq!(next(&mut vm, Op::CreditUpdate), sent + more);
    drop(host);
    assert_eq!(next(&mut vm, Op::Shutdown), sent + more);
    vm.pass(2100);
    assert_eq!(next(&mut vm, Op::Reset), sent + more);
    let mut caller = UnixStream::connect(&vm.socket).unwrap();
    caller.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(next(&mut vm, Op::Request), 0);
}

#[test]
fn hg_v22_a_guest_that_overruns_our_buffer_loses_that_connection_only() {
    let mut vm = Vm::new();
    let (flooded, other) = (key(1, 1), key(2, 2));
    let mut host = vm.guest_dials(flooded);
    let mut bystander = vm.guest_dials(other);
    fill(&mut vm, flooded, 0);
    vm.send(data(flooded, 1), b"!");
    vm.expect(Op::Reset, flooded);
    vm.send(data(other, 2), b"ok");
    let mut bytes = [0; 2];
    bystander.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ok");
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert!(!rest.is_empty(), "what the socket took before is still there");
}

#[test]
fn a_slow_host_process_gets_every_byte_and_the_guest_hears_of_the_room() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    let sent = fill(&mut vm, key, 0);
    assert!(sent.len() > BUFFER as usize);
    let mut read = vec![0; sent.len()];
    let mut at = 0;
    let mut forwarded = 0;
    while at < sent.len() {
        let end = sent.len().min(at + 10_000);
        host.read_exact(&mut read[at..end]).unwrap();
        at = end;
        while let Some((header, _)) = vm.receive() {
            assert_eq!(header.op, Some(Op::CreditUpdate), "told without being asked");
            forwarded = header.fwd_cnt as usize;
        }
    }
    assert!(read == sent, "the bytes are the same");
    assert!(sent.len() - forwarded < BUFFER as usize / 2 + 1, "the guest knows of at least half");
}

#[test]
fn hg_v23_a_flood_of_credit_requests_is_answered_at_most_once_each() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let _host = vm.guest_dials(key);
    for _ in 0..100 {
        vm.send(from_guest(key, Op::CreditRequest), b"");
    }
    vm.settle();
    assert_eq!(vm.inbox.len(), 100);
    vm.inbox.clear();

    let mut vm = Vm::starved();
    vm.send(from_guest(key, Op::Request), b"");
    let dial = vm.question();
    let (_near, far) = UnixStream::pair().unwrap();
    vm.server.accept(dial.id, far.as_fd()).unwrap();
    vm.harness.poll();
    for _ in 0..10_000 {
        vm.send(from_guest(key, Op::CreditRequest), b"");
    }
    vm.post(16, 128);
    vm.expect(Op::Response, key);
    vm.expect_silence();
}

#[test]
fn hg_r05_a_header_that_changes_while_it_is_read_is_one_or_the_other() {
    use crate::memory::{Bytes, GuestAddress};
    use std::sync::atomic::AtomicBool;
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    let address = GuestAddress(crate::testing::HIGH + (5 << 20));
    let memory = std::sync::Arc::clone(vm.harness.memory());
    memory.write_slice(&data(key, 1).to_wire(), address).unwrap();
    memory.write_slice(&[b'x'; 64], GuestAddress(address.0 + 44)).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // 1 byte and 64 bytes, the two lengths the chain has room for.
            while !ended.load(Ordering::Relaxed) {
                for len in [64u32, 1] {
                    memory.store(len.to_le(), GuestAddress(address.0 + 24), Ordering::Relaxed).unwrap();
                }
            }
        });
        let mut got = 0;
        for _ in 0..5_000 {
            let driver = vm.harness.driver(TX);
            driver
                .describe(0, crate::testing::Descriptor { address: address.0, len: 108, flags: 0, next: 0 });
            driver.offer(0);
            vm.harness.kick(TX);
            assert_eq!(vm.harness.driver(TX).take(), Some((0, 0)));
            let n = host.read(&mut [0; 256]).unwrap();
            assert!(n == 1 || n == 64, "{n} bytes came out of one packet");
            got += n;
        }
        ended.store(true, Ordering::Relaxed);
        vm.send(from_guest(key, Op::CreditRequest), b"");
        vm.settle();
        let told = vm.inbox.back().unwrap().0.fwd_cnt as usize;
        assert_eq!(told, got, "what was counted is what was passed on");
    });
}
