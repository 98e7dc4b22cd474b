//! vsock beside the agent: any program of the guest, any program of the host.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use mvm_integration::vm::{PATIENCE, TestVm, Vm, drain, scratch};
use mvm_protocol::ExitStatus;
use mvm_runtime::agent::StdioSpec;
use mvm_runtime::machine::VSOCK_SOCKET;

use crate::Test;

/// Bytes sent each way.
const BULK: usize = 3 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("a_guest_program_reaches_a_listener_of_the_host_over_vsock", guest_dials),
    ("a_host_program_reaches_a_listener_of_the_guest_over_vsock", host_dials),
    ("a_port_nobody_listens_on_is_refused_both_ways", refused),
];

/// A machine with sockets, and the tool in it.
fn machine(name: &str) -> (Vm, PathBuf) {
    let dir = scratch().join(name);
    let mut vm = TestVm::new().sockets(&dir).boot();
    let tool = std::fs::read(env!("CARGO_BIN_EXE_guest_tool")).expect("it is built with this test");
    assert_eq!(vm.output("cat > /tool && chmod +x /tool", &tool).status, ExitStatus::Code(0));
    (vm, dir)
}

fn bulk() -> Vec<u8> {
    (0..BULK as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn guest_dials() {
    let (mut vm, dir) = machine("guest-dials");
    let listener = UnixListener::bind(dir.join(format!("{VSOCK_SOCKET}_7000"))).expect("a socket");
    let host = thread::spawn(move || {
        let (mut guest, _) = listener.accept().expect("a connection");
        let mut bytes = Vec::new();
        guest.read_to_end(&mut bytes).expect("it ends in order");
        bytes.reverse();
        guest.write_all(&bytes).expect("it takes all");
    });
    let output = vm.output("/tool dial 7000", &bulk());
    assert_eq!(output.status, ExitStatus::Code(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.iter().eq(bulk().iter().rev()), "{} bytes came back changed", output.stdout.len());
    host.join().expect("no panic");
}

fn host_dials() {
    let (mut vm, dir) = machine("host-dials");
    let process =
        vm.start(&["/tool", "echo", "7001"], StdioSpec::Pipes { stdin: false, stdout: true, stderr: false });
    let mut line = String::new();
    BufReader::new(process.stdout.expect("asked for")).read_line(&mut line).expect("it says so");
    assert_eq!(line, "listening\n");
    let mut stream = UnixStream::connect(dir.join(VSOCK_SOCKET)).expect("the machine listens");
    stream.write_all(b"CONNECT 7001\n").expect("it takes it");
    let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
    let mut answer = String::new();
    reader.read_line(&mut answer).expect("an answer");
    assert!(answer.starts_with("OK "), "{answer:?}");
    let back = drain(reader);
    stream.write_all(&bulk()).expect("it takes all");
    stream.shutdown(Shutdown::Write).expect("an end");
    assert!(back.join().expect("no panic") == bulk());
    assert_eq!(vm.container.agent.wait(process.id, Some(PATIENCE)).expect("it ends"), ExitStatus::Code(0));
}

fn refused() {
    let (mut vm, dir) = machine("refused");
    let output = vm.output("/tool dial 7002", b"");
    assert_eq!(output.status, ExitStatus::Code(1));
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(complaint.contains("ECONNRESET") || complaint.contains("Connection reset"), "{complaint}");
    let mut stream = UnixStream::connect(dir.join(VSOCK_SOCKET)).expect("the machine listens");
    stream.write_all(b"CONNECT 7003\n").expect("it takes it");
    let mut answer = Vec::new();
    // Closed without an answer; a reset says the same.
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer, b"");
}
