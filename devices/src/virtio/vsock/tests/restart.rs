//! What a reset, a pause, a restore and the parent's end leave standing (HG-V40, HG-V41).

use super::*;
use crate::device::VirtioDevice;

#[test]
fn hg_v40_event_buffers_that_are_too_short_are_given_back_and_the_next_is_used() {
    let (mut device, server, clock, directory) = device(256);
    device.restore(&DeviceState::Vsock(State { next_port: 7 })).unwrap();
    let mut vm = Vm::around(device, server, clock, directory);
    let short = vm.harness.driver(EVENT).post(&[], &[3]);
    let read_only = vm.harness.driver(EVENT).post(&[b"12345678"], &[]);
    vm.harness.kick(EVENT);
    assert_eq!(vm.harness.driver(EVENT).take(), Some((short.head, 0)));
    assert_eq!(vm.harness.driver(EVENT).take(), Some((read_only.head, 0)));
    let good = vm.harness.driver(EVENT).post(&[], &[4]);
    vm.harness.kick(EVENT);
    assert_eq!(vm.harness.driver(EVENT).take(), Some((good.head, 4)));
    assert_eq!(vm.harness.driver(EVENT).written(&good), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
}

#[test]
fn c134_after_a_restore_the_guest_hears_of_the_reset_before_anybody_calls_it() {
    let (mut device, server, clock, directory) = device(256);
    device.restore(&DeviceState::Vsock(State { next_port: (1 << 30) + 5 })).unwrap();
    let mut vm = Vm::around(device, server, clock, directory);
    vm.post(16, 4096);
    let mut host = UnixStream::connect(&vm.socket).unwrap();
    host.write_all(b"CONNECT 1\n").unwrap();
    vm.expect_silence();
    vm.harness.driver(EVENT).post(&[], &[4]);
    vm.harness.kick(EVENT);
    vm.expect_silence();
    // The driver comes back with the buffer: it has dropped its sockets.
    vm.harness.driver(EVENT).post(&[], &[4]);
    vm.harness.kick(EVENT);
    let (request, _) = vm.receive().unwrap();
    assert_eq!(request.source_port, (1 << 30) + 5, "ports go on where they stood");
    assert_eq!(vm.harness.interrupts(EVENT), 1);
    // The dialer survived as well.
    vm.guest_dials(key(1, 1));
    let device = vm.harness.reset();
    assert_eq!(device.state(), DeviceState::Vsock(State { next_port: (1 << 30) + 6 }));
}

#[test]
fn c134_a_driver_that_never_comes_back_to_the_event_queue_is_called_after_two_seconds() {
    let (mut device, server, clock, directory) = device(256);
    device.restore(&DeviceState::Vsock(State::default())).unwrap();
    let mut vm = Vm::around(device, server, clock, directory);
    vm.post(16, 4096);
    vm.harness.driver(EVENT).post(&[], &[4]);
    vm.harness.kick(EVENT);
    let mut host = UnixStream::connect(&vm.socket).unwrap();
    host.write_all(b"CONNECT 1\n").unwrap();
    vm.expect_silence();
    vm.pass(2100);
    assert_eq!(vm.receive().unwrap().0.op, Some(Op::Request));
}

#[test]
fn a_pause_keeps_connections() {
    let mut vm = Vm::new();
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    let mut caller = UnixStream::connect(&vm.socket).unwrap();
    caller.write_all(b"CONN").unwrap();
    vm.settle();
    vm.harness.pause_and_resume();
    caller.write_all(b"ECT 9\n").unwrap();
    host.write_all(b"x").unwrap();
    vm.settle();
    let ops: Vec<_> = vm.inbox.drain(..).map(|(header, _)| header.op.unwrap()).collect();
    assert!(ops.contains(&Op::Request) && ops.contains(&Op::ReadWrite) && ops.len() == 2, "{ops:?}");
    vm.send(data(key, 1), b"y");
    host.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_parent_that_is_gone_leaves_calls_and_open_connections_working() {
    let mut vm = Vm::new();
    let open = key(1, 1);
    let mut host = vm.guest_dials(open);
    let (server, _file) = DialServer::pair().unwrap();
    drop(std::mem::replace(&mut vm.server, server));
    vm.settle();
    assert_eq!(vm.harness.poll(), 0);
    vm.send(from_guest(key(2, 2), Op::Request), b"");
    vm.expect(Op::Reset, key(2, 2));
    vm.send(data(open, 1), b"y");
    host.read_exact(&mut [0]).unwrap();
    vm.host_dials(5);
}

#[test]
fn hg_v41_a_reset_closes_every_stream_and_the_device_works_again() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard).unwrap();
    let mut vm = Vm::with_room_for(1023);
    vm.post(128, 128);
    let mut ends: Vec<_> = (0..1000).map(|peer| vm.guest_dials(key(1, peer))).collect();
    assert_eq!(vm.harness.watched_files(), BASELINE + 1000);
    let Vm { harness, server, clock, _directory, .. } = vm;
    let device = harness.reset();
    assert!(ends.iter_mut().all(at_end), "the device holds no copy of any stream");
    drop(ends);
    let mut vm = Vm::around_boxed(device, server, clock, _directory);
    assert_eq!(vm.harness.watched_files(), BASELINE);
    vm.post(16, 4096);
    let _host = vm.guest_dials(key(1, 1));
    vm.host_dials(3);
}

#[test]
fn a_machine_that_goes_on_under_another_context_id_is_told_it_with_the_reset() {
    let (mut device, server, clock, directory) = device(256);
    let space = device.config().unwrap();
    // As the transport does: what the saved driver read comes first.
    space.update(|bytes| bytes.copy_from_slice(&77u64.to_le_bytes()));
    device.restore(&DeviceState::Vsock(State { next_port: 1 << 30 })).unwrap();
    let mut cid = [0; 8];
    space.read(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    let mut vm = Vm::around(device, server, clock, directory);
    vm.post(16, 4096);
    let event = vm.harness.driver(EVENT).post(&[], &[4]);
    vm.harness.kick(EVENT);
    assert_eq!(vm.harness.driver(EVENT).take(), Some((event.head, 4)), "which has a driver read it again");
    vm.guest_dials(key(1, 1));
}
