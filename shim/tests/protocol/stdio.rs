//! Standard streams: fifos, files, logging programs, terminals.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::ResizePtyRequest;
use nix::libc::SIGKILL;

use crate::bundles::shell;
use crate::containerd::Containerd;
use crate::fifos::{Streams, fifo, read_all, write_all};
use crate::host::PATIENCE;
use crate::wire::{answer, context};

/// Runs a script to its end; gives its exit and the two outputs.
fn output_of(script: &str, input: Option<Vec<u8>>) -> (u32, Vec<u8>, Vec<u8>) {
    let mut containerd = Containerd::with_shim("one", &shell(script));
    let mut stdio =
        Streams { stdout: fifo(&containerd, "out"), stderr: fifo(&containerd, "err"), ..Streams::default() };
    let (out, err) = (read_all(&stdio.stdout), read_all(&stdio.stderr));
    if input.is_some() {
        stdio.stdin = fifo(&containerd, "in");
    }
    containerd.create("one", &stdio).unwrap();
    let writer = input.map(|input| write_all(&stdio.stdin, input));
    containerd.run("one", "").unwrap();
    if let Some(writer) = writer {
        writer.join().unwrap();
        containerd.close_stdin("one", "").unwrap();
    }
    let exit = containerd.wait("one", "").unwrap().exit_status;
    containerd.delete("one", "").unwrap();
    containerd.end("one");
    (exit, out.join().unwrap(), err.join().unwrap())
}

/// Bytes without a pattern that an error could hide in.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(count).collect()
}

#[test]
fn both_outputs_arrive_whole_before_the_exit_is_told() {
    let (exit, out, err) = output_of("echo out; echo err >&2; exit 5", None);
    assert_eq!((exit, out.as_slice(), err.as_slice()), (5, b"out\n".as_slice(), b"err\n".as_slice()));
}

#[test]
fn twenty_mebibytes_go_in_and_come_out_again() {
    let sent = noise(20 << 20);
    let (exit, out, _) = output_of("cat", Some(sent.clone()));
    assert_eq!(exit, 0);
    assert_eq!(out.len(), sent.len());
    assert!(out == sent, "the bytes differ");
}

#[test]
fn input_ends_when_the_client_says_so_and_not_when_it_goes_away() {
    let containerd = Containerd::with_shim("one", &shell("cat; echo end"));
    let stdio =
        Streams { stdin: fifo(&containerd, "in"), stdout: fifo(&containerd, "out"), ..Streams::default() };
    let out = read_all(&stdio.stdout);
    containerd.create("one", &stdio).unwrap();
    containerd.run("one", "").unwrap();
    for text in ["first\n", "second\n"] {
        write_all(&stdio.stdin, text.into()).join().unwrap();
    }
    containerd.close_stdin("one", "").unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 0);
    containerd.delete("one", "").unwrap();
    assert_eq!(out.join().unwrap(), b"first\nsecond\nend\n");
}

#[test]
fn input_closed_before_the_start_is_empty() {
    let containerd = Containerd::with_shim("one", &shell("cat; echo end"));
    let stdio = Streams { stdin: fifo(&containerd, "in"), ..Streams::default() };
    containerd.create("one", &stdio).unwrap();
    containerd.close_stdin("one", "").unwrap();
    containerd.run("one", "").unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 0);
}

#[test]
fn output_waits_for_a_client_that_comes_late_or_again() {
    let containerd = Containerd::with_shim("one", &shell("echo early; read line; echo $line"));
    let stdio =
        Streams { stdin: fifo(&containerd, "in"), stdout: fifo(&containerd, "out"), ..Streams::default() };
    containerd.create("one", &stdio).unwrap();
    containerd.run("one", "").unwrap();
    let mut first = File::open(&stdio.stdout).unwrap();
    let mut bytes = [0; 6];
    first.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"early\n");
    drop(first);
    let again = read_all(&stdio.stdout);
    write_all(&stdio.stdin, b"late\n".to_vec()).join().unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    assert_eq!(again.join().unwrap(), b"late\n");
}

#[test]
fn a_slow_reader_gets_everything_although_the_process_has_ended() {
    let containerd = Containerd::with_shim("one", &shell("head -c 150000 /dev/zero"));
    let stdio = Streams { stdout: fifo(&containerd, "out"), ..Streams::default() };
    containerd.create("one", &stdio).unwrap();
    let mut out = File::options().read(true).write(true).open(&stdio.stdout).unwrap();
    containerd.run("one", "").unwrap();
    // Nobody reads before the exit is told: it waits for a reader at most for a while, as the call does.
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 0);
    let mut bytes = vec![0; 150_000];
    out.read_exact(&mut bytes).unwrap();
    containerd.delete("one", "").unwrap();
}

#[test]
fn a_deletion_waits_for_a_slow_reader_but_not_for_one_that_never_reads() {
    for reads in [true, false] {
        let containerd = Containerd::with_shim("one", &shell("head -c 150000 /dev/zero"));
        let stdio = Streams { stdout: fifo(&containerd, "out"), ..Streams::default() };
        containerd.create("one", &stdio).unwrap();
        let mut out = File::options().read(true).write(true).open(&stdio.stdout).unwrap();
        containerd.run("one", "").unwrap();
        containerd.wait("one", "").unwrap();
        thread::scope(|scope| {
            let deletion = scope.spawn(|| containerd.delete("one", "").unwrap());
            if reads {
                // Longer than the exit was held for it.
                thread::sleep(Duration::from_secs(3));
                out.read_exact(&mut vec![0; 150_000]).unwrap();
            }
            // A call has its time: what waited for ever would fail here.
            assert_eq!(deletion.join().unwrap().exit_status, 0);
        });
    }
}

#[test]
fn what_a_process_leaves_behind_does_not_hold_up_its_exit() {
    let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    let stdio = Streams { stdout: fifo(&containerd, "out"), ..Streams::default() };
    let out = read_all(&stdio.stdout);
    containerd.exec("one", "e", "echo said; sleep 1000 & exit 3", &stdio).unwrap();
    containerd.run("one", "e").unwrap();
    // Calls are given up long before the process is that is left behind.
    assert_eq!(containerd.wait("one", "e").unwrap().exit_status, 3);
    containerd.delete("one", "e").unwrap();
    assert_eq!(out.join().unwrap(), b"said\n");
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    containerd.end("one");
}

#[test]
fn output_can_be_appended_to_a_file() {
    let mut containerd = Containerd::new();
    let path = containerd.path("logs").join("a b.log");
    // Two streams are read in any order: the second is written to when the first has arrived.
    let arrived = format!("grep -q out '{}'", path.display());
    let script = format!("echo out; until {arrived}; do sleep 0.01; done; echo err >&2");
    containerd.bundle("one", &shell(&script));
    containerd.start_shim("one");
    let uri = format!("file://{}", path.display().to_string().replace(' ', "%20"));
    let stdio = Streams { stdout: uri.clone(), stderr: uri, ..Streams::default() };
    containerd.create("one", &stdio).unwrap();
    containerd.run("one", "").unwrap();
    containerd.wait("one", "").unwrap();
    assert_eq!(fs::read_to_string(path).unwrap(), "out\nerr\n");
}

#[test]
fn a_logging_program_gets_both_outputs_and_is_waited_for() {
    let mut containerd = Containerd::with_shim("one", &shell("echo out; echo err >&2"));
    let program = containerd.path("logger");
    let log = containerd.path("log.txt");
    let script = "#!/bin/sh\nexec > \"$2\" 5>&-\n\
        echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $1 $2\"; cat <&3; cat <&4; sleep 0.3; echo end\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let stdout = format!("binary://{}?to={}", program.display(), log.display());
    containerd.create("one", &Streams { stdout, ..Streams::default() }).unwrap();
    containerd.run("one", "").unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    let expected = format!("one {} to {}\nout\nerr\nend\n", containerd.namespace, log.display());
    assert_eq!(fs::read_to_string(&log).unwrap(), expected);
    containerd.end("one");
}

#[test]
fn a_logging_program_that_is_missing_or_never_ready_fails_the_creation() {
    let mut containerd = Containerd::with_shim("one", &shell("true"));
    let stdio = Streams { stdout: "binary:///no/such/program".to_owned(), ..Streams::default() };
    assert!(containerd.create("one", &stdio).unwrap_err().to_string().contains("/no/such/program"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.delete("one", "").unwrap();
    containerd.end("one");
}

#[test]
fn a_terminal_is_one_stream_both_ways_with_a_size() {
    let containerd = Containerd::with_shim("one", &shell("tty; read x; stty size; echo got $x; exit 6"));
    let stdio = Streams {
        stdin: fifo(&containerd, "in"),
        stdout: fifo(&containerd, "out"),
        terminal: true,
        ..Streams::default()
    };
    let (sender, receiver) = mpsc::channel();
    let mut out = File::options().read(true).write(true).open(&stdio.stdout).unwrap();
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(count) = out.read(&mut chunk) {
            let _ = sender.send(chunk[..count].to_vec());
        }
    });
    let mut seen = String::new();
    let mut until = |text: &str| {
        while !seen.contains(text) {
            seen.push_str(&String::from_utf8_lossy(&receiver.recv_timeout(PATIENCE).unwrap()));
        }
    };
    containerd.create("one", &stdio).unwrap();
    containerd.run("one", "").unwrap();
    assert!(containerd.state("one", "").unwrap().terminal);
    until("/dev/pts/");
    let resize = ResizePtyRequest { id: "one".to_owned(), width: 101, height: 33, ..Default::default() };
    answer(containerd.client().resize_pty(context(), &resize)).unwrap();
    let mut input = File::options().write(true).open(&stdio.stdin).unwrap();
    input.write_all(b"word\n").unwrap();
    until("33 101");
    until("got word");
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 6);
}

#[test]
fn a_log_that_nobody_reads_slows_nothing_down() {
    let mut containerd = Containerd::new();
    containerd.bundle("one", &shell("true"));
    let output = containerd.command("one", &["-debug", "start"]).output().unwrap();
    containerd.address = String::from_utf8(output.stdout).unwrap();
    containerd.connect();
    // Each call logs a line: many times what fits into a fifo.
    for _ in 0..3000 {
        let _ = containerd.kill("nobody", "", SIGKILL);
    }
    let mut log = File::options().read(true).write(true).open(containerd.path("one").join("log")).unwrap();
    let mut bytes = vec![0; 1 << 20];
    let count = log.read(&mut bytes).unwrap();
    assert!(count > 32 * 1024, "{count}");
    let _ = containerd.kill("nobody", "", SIGKILL);
    let count = log.read(&mut bytes).unwrap();
    let line = String::from_utf8_lossy(&bytes[..count]).into_owned();
    assert!(line.contains("level=debug") && line.contains("dropped="), "{line}");
    containerd.end("one");
}
