//! Opening connections, both ways, and a first byte over each.

use super::*;

#[test]
fn a_guest_dials_the_host_and_bytes_flow_both_ways() {
    let mut vm = Vm::new();
    let key = key(1024, 5000);
    let mut host = vm.guest_dials(key);
    vm.send(data(key, 5), b"hello");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    host.write_all(b"world").unwrap();
    let (header, payload) = vm.receive().unwrap();
    assert_eq!((header.op, header.key_of_guest()), (Some(Op::ReadWrite), key));
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER, 5));
    assert_eq!(payload, b"world");
    vm.expect_silence();
}

#[test]
fn a_host_process_calls_the_guest_and_bytes_flow_both_ways() {
    let mut vm = Vm::new();
    let (mut host, key) = vm.host_dials(52);
    host.write_all(b"ping").unwrap();
    let (header, payload) = vm.receive().unwrap();
    assert_eq!((header.op, payload.as_slice()), (Some(Op::ReadWrite), &b"ping"[..]));
    vm.send(data(key, 4), b"pong");
    let mut bytes = [0; 4];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
}

#[test]
fn bytes_behind_the_callers_line_reach_the_guest_once_it_accepts() {
    let mut vm = Vm::new();
    let mut host = UnixStream::connect(&vm.socket).unwrap();
    host.write_all(b"CONNECT 7\nearly").unwrap();
    let (request, _) = vm.receive().unwrap();
    vm.expect_silence();
    vm.send(from_guest(request.key_of_guest(), Op::Response), b"");
    let (header, payload) = vm.receive().unwrap();
    assert_eq!((header.op, payload.as_slice()), (Some(Op::ReadWrite), &b"early"[..]));
}

#[test]
fn a_refusal_reaches_the_one_who_dialled() {
    let mut vm = Vm::new();
    let key = key(9, 9);
    vm.send(from_guest(key, Op::Request), b"");
    let dial = vm.question();
    vm.server.refuse(dial.id).unwrap();
    vm.expect(Op::Reset, key);

    let mut host = UnixStream::connect(&vm.socket).unwrap();
    host.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = vm.receive().unwrap();
    vm.send(from_guest(request.key_of_guest(), Op::Reset), b"");
    assert!(at_end(&mut host));
    vm.expect_silence();
}
