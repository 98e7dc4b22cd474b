//! Streams: both directions in bulk, ends in order, back-pressure, terminals.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use mvm_protocol::{ExitStatus, WindowSize};
use sha2::{Digest, Sha256};

use super::guest::{Guest, SOON, shell};
use crate::agent::{Process, ProcessSpec, StdioSpec};

const ALL: StdioSpec = StdioSpec::Pipes { stdin: true, stdout: true, stderr: true };

fn with_stdin(script: &str) -> ProcessSpec {
    ProcessSpec { stdio: ALL, ..shell(script) }
}

/// Bytes that do not repeat soon.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn output(process: &mut Process) -> Vec<u8> {
    read_all(process.stdout.as_mut().unwrap())
}

#[test]
fn twenty_mebibytes_go_in_and_come_out_unchanged() {
    let guest = Guest::new();
    let mut process = guest.client.start(with_stdin("exec cat")).unwrap();
    let bytes = noise(20 << 20);
    let mut stdin = process.stdin.take().unwrap();
    let returned = thread::scope(|scope| {
        scope.spawn(|| {
            stdin.write_all(&bytes).unwrap();
            stdin.shutdown(Shutdown::Write).unwrap();
        });
        output(&mut process)
    });
    assert_eq!(returned.len(), bytes.len());
    assert_eq!(Sha256::digest(&returned), Sha256::digest(&bytes));
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
}

#[test]
fn a_program_that_exits_at_once_keeps_its_last_bytes() {
    let guest = Guest::new();
    for round in 0..200 {
        let mut process = guest.sh(&format!("echo first; echo last {round}"));
        // The exit comes first here: the bytes must be there all the same.
        assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
        assert_eq!(output(&mut process), format!("first\nlast {round}\n").into_bytes());
    }
}

#[test]
fn a_daemon_that_keeps_the_output_open_does_not_delay_the_exit_nor_die_of_it() {
    let guest = Guest::new();
    let marker = guest.dir.path().join("written");
    let read = guest.dir.path().join("read");
    let late = format!(
        "until test -e {}; do sleep 0.01; done; echo late; echo late; touch {}",
        read.display(),
        marker.display()
    );
    let script = format!("({late}) & echo early");
    let mut process = guest.sh(&script);
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
    assert_eq!(output(&mut process), b"early\n");
    std::fs::write(read, "").unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while !marker.exists() {
        assert!(std::time::Instant::now() < deadline, "the daemon was killed by its closed output");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_reader_that_stalls_holds_up_its_own_stream_only_and_loses_nothing() {
    let guest = Guest::new();
    let mut slow = guest.sh("head -c 3000000 /dev/zero; echo end");
    let mut quick = guest.sh("echo quick");
    assert_eq!(output(&mut quick), b"quick\n");
    let status = guest.client.wait(slow.id, Some(Duration::from_millis(200)));
    assert!(status.is_err(), "its output is not read, so its exit cannot have been reported");
    let bytes = output(&mut slow);
    assert_eq!(bytes.len(), 3_000_004);
    assert!(bytes.ends_with(b"\0end\n"));
    assert_eq!(guest.client.wait(slow.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
}

#[test]
fn a_host_that_closes_an_output_stream_ends_its_writer_like_a_closed_pipe() {
    let guest = Guest::new();
    let mut process = guest.sh("exec yes");
    let mut stdout = process.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    drop(stdout);
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(13));
}

#[test]
fn half_close_of_stdin_is_end_of_file_after_the_data() {
    let guest = Guest::new();
    let mut process = guest.client.start(with_stdin("wc -c")).unwrap();
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(b"12345").unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(output(&mut process), b"5\n");
}

#[test]
fn stdin_can_be_closed_by_request_while_its_stream_is_open() {
    let guest = Guest::new();
    let mut process = guest.client.start(with_stdin("cat; echo done")).unwrap();
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(b"x").unwrap();
    let mut byte = [0];
    process.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    guest.client.close_stdin(process.id).unwrap();
    assert_eq!(output(&mut process), b"done\n");
}

#[test]
fn a_stream_that_is_not_wanted_is_dev_null() {
    let guest = Guest::new();
    let stdio = StdioSpec::Pipes { stdin: false, stdout: true, stderr: false };
    let spec =
        ProcessSpec { stdio, ..shell("readlink /proc/self/fd/0; cat; echo x >&2; readlink /proc/$$/fd/2") };
    let mut process = guest.client.start(spec).unwrap();
    assert_eq!(output(&mut process), b"/dev/null\n/dev/null\n");
    assert!(process.stdin.is_none() && process.stderr.is_none());
}

fn terminal(script: &str) -> ProcessSpec {
    let size = WindowSize { rows: 33, columns: 101 };
    ProcessSpec { stdio: StdioSpec::Terminal(size), ..shell(script) }
}

/// Reads until the text ends so.
fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with(end) {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0] as char);
    }
    text
}

#[test]
fn a_terminal_has_its_size_from_the_start_and_is_resized() {
    let guest = Guest::new();
    let mut process = guest.client.start(terminal("stty size; read line; stty size; tty")).unwrap();
    let mut stream = process.terminal.take().unwrap();
    assert_eq!(read_until(&mut stream, "\n"), "33 101\r\n");
    guest.client.resize(process.id, WindowSize { rows: 50, columns: 132 }).unwrap();
    stream.write_all(b"\n").unwrap();
    assert_eq!(read_until(&mut stream, "132\r\n"), "\r\n50 132\r\n");
    assert!(read_until(&mut stream, "\n").starts_with("/dev/pts/"));
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
}

#[test]
fn a_resize_is_a_signal_to_the_program_in_front() {
    let guest = Guest::new();
    let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut process = guest.client.start(terminal(script)).unwrap();
    let mut stream = process.terminal.take().unwrap();
    read_until(&mut stream, "ready\r\n");
    guest.client.resize(process.id, WindowSize { rows: 10, columns: 20 }).unwrap();
    assert_eq!(read_until(&mut stream, "\n"), "10 20\r\n");
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(4));
}

#[test]
fn control_c_on_a_terminal_interrupts_the_program() {
    let guest = Guest::new();
    let mut process = guest.client.start(terminal("echo ready; exec sleep 1000")).unwrap();
    let mut stream = process.terminal.take().unwrap();
    read_until(&mut stream, "ready\r\n");
    stream.write_all(&[3]).unwrap();
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(2));
}

#[test]
fn a_terminals_last_bytes_arrive_before_its_exit() {
    let guest = Guest::new();
    for _ in 0..50 {
        let mut process = guest.client.start(terminal("seq 1 500; echo end")).unwrap();
        guest.client.wait(process.id, Some(Duration::from_millis(1))).ok();
        let text = read_until(process.terminal.as_mut().unwrap(), "end\r\n");
        assert!(text.starts_with("1\r\n2\r\n") && text.contains("\n499\r\n500\r\n"));
    }
}

#[test]
fn a_process_without_a_terminal_cannot_be_resized() {
    let guest = Guest::new();
    let process = guest.sh("exec sleep 1000");
    let error = guest.client.resize(process.id, WindowSize::default()).unwrap_err();
    assert_eq!(error.to_string(), format!("process {} has no terminal", process.id));
}
