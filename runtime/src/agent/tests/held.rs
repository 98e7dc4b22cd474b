//! A machine that is saved with processes in it, and goes on with another host.

use std::io::{BufRead, BufReader, Read, Write};

use mvm_protocol::{ExitStatus, FailureKind, Namespace, Namespaces, SignalTarget, Surroundings, WindowSize};

use super::{
    containers::{inside, root},
    guest::{Guest, SOON, shell},
    resuming::Survivor,
};
use crate::agent::{AgentClient, Error, Process, ProcessSpec, StdioSpec};

const ALL: StdioSpec = StdioSpec::Pipes { stdin: true, stdout: true, stderr: true };

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line
}

fn echoing() -> ProcessSpec {
    let script = "while read it; do echo out $it; echo err $it >&2; done; exit 5";
    ProcessSpec { stdio: ALL, ..shell(script) }
}

/// Has a process that echoes say something, on both its outputs.
fn talk(process: &mut Process, word: &str) {
    writeln!(process.stdin.as_mut().unwrap(), "{word}").unwrap();
    let mut lines = [&mut process.stdout, &mut process.stderr].map(|stream| {
        let stream = stream.as_ref().unwrap().try_clone().unwrap();
        line(&mut BufReader::with_capacity(1, stream))
    });
    assert_eq!(lines, [format!("out {word}\n"), format!("err {word}\n")]);
    lines.fill(String::new());
}

#[test]
fn a_process_goes_on_with_the_streams_of_another_host_and_its_exit_is_told_there() {
    let (agent, listener, client) = Survivor::new();
    let mut process = client.start(echoing()).unwrap();
    talk(&mut process, "one");
    client.hold().unwrap();
    drop((listener, client));
    let (_listener, client) = agent.greet("clone");
    let found = client.take_over().unwrap();
    assert_eq!(found.iter().map(|it| (it.process, it.exited)).collect::<Vec<_>>(), [(process.id, None)]);
    let mut again = client.attach(process.id, ALL).unwrap();
    assert_eq!((again.id, again.pid), (process.id, process.pid));
    client.release().unwrap();
    talk(&mut again, "two");
    let other = client.start(shell("exit 3")).unwrap();
    assert!(other.id > process.id, "it is not taken for the first");
    assert_eq!(client.wait(other.id, Some(SOON)).unwrap(), ExitStatus::Code(3));
    drop(again.stdin.take());
    assert_eq!(client.wait(again.id, Some(SOON)).unwrap(), ExitStatus::Code(5));
}

#[test]
fn a_terminal_goes_on_with_another_host() {
    let (agent, listener, client) = Survivor::new();
    let terminal = StdioSpec::Terminal(WindowSize { rows: 24, columns: 80 });
    let script = "stty -echo 2>/dev/null; echo ready; while read it; do echo got $it; done";
    let process = client.start(ProcessSpec { stdio: terminal, ..shell(script) }).unwrap();
    let mut lines = BufReader::new(process.terminal.unwrap());
    assert_eq!(line(&mut lines), "ready\r\n");
    client.hold().unwrap();
    drop((lines, listener, client));
    let (_listener, client) = agent.greet("clone");
    client.take_over().unwrap();
    let again = client.attach(process.id, terminal).unwrap();
    client.release().unwrap();
    let mut stream = again.terminal.unwrap();
    stream.write_all(b"badger\n").unwrap();
    assert_eq!(line(&mut BufReader::new(stream)), "got badger\r\n");
    client.signal(process.id, libc::SIGKILL, SignalTarget::Process).unwrap();
    assert_eq!(client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
}

#[test]
fn what_is_written_while_the_machine_is_held_comes_once_it_goes_on_and_nothing_is_lost() {
    let guest = Guest::new();
    let mut process = guest.client.start(echoing()).unwrap();
    talk(&mut process, "one");
    guest.client.hold().unwrap();
    writeln!(process.stdin.as_mut().unwrap(), "two").unwrap();
    guest.client.ping().unwrap();
    guest.client.release().unwrap();
    assert_eq!(line(&mut BufReader::new(process.stdout.take().unwrap())), "out two\n");
}

#[test]
fn a_process_that_ends_while_the_machine_is_held_is_reported_once_it_goes_on() {
    let (agent, listener, client) = Survivor::new();
    let process = client.start(shell("echo last; exit 4")).unwrap();
    // It is at its end, or has ended: either way the host hears of it after the machine goes on.
    client.hold().unwrap();
    drop((listener, client));
    let (_listener, client) = agent.greet("clone");
    client.take_over().unwrap();
    let again = client.attach(process.id, StdioSpec::Pipes { stdin: false, stdout: true, stderr: true });
    client.release().unwrap();
    drop(again.unwrap());
    assert_eq!(client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(4));
}

#[test]
fn a_stream_that_had_ended_before_is_opened_and_ends() {
    let (agent, listener, client) = Survivor::new();
    let mut process = client.start(shell("exec >&-; echo ended >&2; exec sleep 1000")).unwrap();
    assert_eq!(process.stdout.as_mut().unwrap().read(&mut [0]).unwrap(), 0);
    client.hold().unwrap();
    drop((listener, client));
    let (_listener, client) = agent.greet("clone");
    let mut again = client.attach(process.id, ALL).unwrap();
    assert_eq!(again.stdout.as_mut().unwrap().read(&mut [0]).unwrap(), 0);
    assert_eq!(again.stdin.as_mut().unwrap().read(&mut [0]).unwrap(), 0, "it never had one");
    client.release().unwrap();
    client.signal(process.id, libc::SIGKILL, SignalTarget::Process).unwrap();
    assert_eq!(client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
}

fn is(result: Result<(), Error>, wanted: FailureKind) -> bool {
    matches!(result, Err(Error::Refused { kind, .. }) if kind == wanted)
}

#[test]
fn a_held_agent_serves_nothing_that_would_change_what_is_saved() {
    let guest = Guest::new();
    let client = &guest.client;
    assert!(is(client.attach(1, ALL).map(drop), FailureKind::Invalid), "it is not held");
    client.release().unwrap();
    client.hold().unwrap();
    assert!(is(client.hold(), FailureKind::Busy));
    assert!(is(client.sync(), FailureKind::Busy));
    assert!(is(client.prepare(), FailureKind::Busy));
    assert!(is(client.start(shell("true")).map(drop), FailureKind::Busy));
    assert!(is(client.attach(77, ALL).map(drop), FailureKind::NotFound));
    assert!(client.list().unwrap().is_empty());
    client.release().unwrap();
    client.sync().unwrap();
}

/// What a script in a container prints.
fn said(client: &AgentClient, id: &str, script: &str) -> String {
    let mut process = client.start(inside(id, script)).unwrap();
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    client.wait(process.id, Some(SOON)).unwrap();
    text
}

#[test]
fn a_container_that_goes_on_has_the_name_it_is_given_and_its_neighbours_keep_theirs() {
    let guest = Guest::new();
    for id in ["one", "two"] {
        let namespaces = Namespaces { uts: Namespace::Own, ..Namespaces::default() };
        let hostname = Some(id.to_owned());
        let surroundings = Surroundings { namespaces, hostname, ..Surroundings::default() };
        guest.client.set_up_root(root(&guest, id, surroundings)).unwrap();
    }
    guest.client.rename("one", Some("badger")).unwrap();
    guest.client.rename("two", None).unwrap();
    let names =
        ["one", "two"].map(|id| said(&guest.client, id, "read it < /proc/sys/kernel/hostname; echo $it"));
    assert_eq!(names, ["badger\n", "two\n"]);
    assert!(is(guest.client.rename("three", None), FailureKind::NotFound));
}
