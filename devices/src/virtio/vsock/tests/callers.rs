//! Host processes that call, and what a device can be built from (HG-V35 to HG-V38).

use super::*;

#[test]
fn hg_v35_a_caller_must_say_what_it_wants_in_32_bytes_and_one_second() {
    let mut vm = Vm::new();
    let call = |line: &[u8]| {
        let mut stream = UnixStream::connect(&vm.socket).unwrap();
        stream.write_all(line).unwrap();
        stream
    };
    let mut wrong = call(b"HELLO 1\n");
    let mut long = call(&[b'1'; 33]);
    let mut silent = call(b"");
    let mut partial = call(b"CONNECT 1");
    let mut gone = call(b"CONNECT");
    gone.shutdown(std::net::Shutdown::Write).unwrap();
    vm.settle();
    assert!(at_end(&mut wrong) && at_end(&mut long) && at_end(&mut gone));
    assert!(!readable(&silent) && !readable(&partial));
    assert_eq!(vm.harness.poll(), 0, "half a line does not spin");
    partial.write_all(b"0\n").unwrap();
    assert_eq!(vm.receive().unwrap().0.destination_port, 10);
    vm.pass(900);
    assert!(!readable(&silent));
    vm.pass(200);
    assert!(at_end(&mut silent));
}

#[test]
fn a_caller_has_its_own_second_whoever_had_its_place_before() {
    let mut vm = Vm::new();
    let mut first = UnixStream::connect(&vm.socket).unwrap();
    vm.settle();
    first.write_all(b"CONNECT 1\n").unwrap();
    vm.settle();
    vm.pass(900);
    let mut second = UnixStream::connect(&vm.socket).unwrap();
    vm.settle();
    vm.pass(500);
    assert!(!readable(&second), "the first caller's time is not the second's");
    vm.pass(600);
    assert!(at_end(&mut second));
}

#[test]
fn hg_v36_of_two_thousand_callers_32_wait_and_256_are_served() {
    let mut vm = Vm::new();
    let mut callers = std::collections::VecDeque::new();
    let mut silent = Vec::new();
    for _ in 0..32 {
        silent.push(UnixStream::connect(&vm.socket).unwrap());
    }
    vm.settle();
    assert_eq!(vm.harness.watched_files(), BASELINE - 1 + 32, "the listener is left alone while all wait");
    vm.pass(1100);
    assert!(silent.iter_mut().all(at_end));
    let mut refused = 0;
    for port in 0..2000 {
        let mut stream = UnixStream::connect(&vm.socket).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        vm.settle();
        if at_end(&mut { stream.try_clone().unwrap() }) {
            refused += 1;
        }
        callers.push_back(stream);
        if callers.len() > 300 {
            callers.pop_front();
        }
    }
    assert_eq!(vm.inbox.len(), 256);
    assert_eq!(refused, 2000 - 256);
    let ports: std::collections::HashSet<_> = vm.inbox.iter().map(|(header, _)| header.source_port).collect();
    assert_eq!(ports.len(), 256, "no port is given twice");
}

#[test]
fn hg_v37_only_sockets_of_the_right_kind_are_taken() {
    let (stream, other) = UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let cases: [(FdSlot, OwnedFd); 2] = [(FdSlot(1), stream.into()), (FdSlot(2), file.into())];
    let mut files: HashMap<FdSlot, OwnedFd> = cases.into_iter().collect();
    for slot in [1, 2, 9] {
        let config = Config { listener: Some(FdSlot(slot)), ..Config::new(GuestCid(3)) };
        assert!(matches!(config.build(&mut files), Err(BuildError::File { what: "vsock listener", .. })));
    }
    drop(other);
}

#[test]
fn hg_v38_every_port_number_can_be_dialled() {
    for port in [0, 1, u32::MAX] {
        let mut vm = Vm::new();
        // Both stay open: the end of one would reach the guest before the beginning of the other, or after.
        let _caller = vm.host_dials(port);
        let _called = vm.guest_dials(key(port, port));
    }
}

#[test]
fn c124_context_ids_with_a_meaning_of_their_own_are_refused() {
    for bad in [0, 1, 2, u32::MAX] {
        assert_eq!(GuestCid::try_from(bad), Err(BadCid(bad)));
        assert!(serde_json::from_str::<Config>(&format!("{{\"guest_cid\":{bad}}}")).is_err());
    }
    let config: Config = serde_json::from_str("{\"guest_cid\":3}").unwrap();
    assert_eq!(config, Config::new(GuestCid(3)));
    let device = config.build(&mut HashMap::new()).unwrap();
    let mut bytes = [0xff; 9];
    device.config().unwrap().read(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0], "the upper half is zero, and so is what lies behind");
    for connections in [0, 1024] {
        let config = Config { connections, ..config.clone() };
        assert!(matches!(config.build(&mut HashMap::new()), Err(BuildError::Value { .. })));
    }
}

#[test]
fn c133_without_any_feature_it_speaks_streams() {
    let (device, server, clock, directory) = device(4);
    let harness = Harness::with(Box::new(device), 0, true);
    let mut vm = Vm::of(harness, server, clock, directory);
    vm.post(16, 4096);
    let key = key(1, 1);
    let mut host = vm.guest_dials(key);
    vm.send(data(key, 1), b"y");
    host.read_exact(&mut [0]).unwrap();
}
