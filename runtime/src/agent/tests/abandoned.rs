//! Processes whose guest does not say that they ended, or starts them when nobody expects it any more.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use mvm_protocol::*;

use super::guest::SOON;
use super::hostile::{client, message, read_frames};
use crate::agent::{AgentClient, Error, Process, ProcessSpec, StdioSpec};

/// Time for a process whose streams never open.
const TIME: Duration = Duration::from_secs(2);

const ALL: StdioSpec = StdioSpec::Pipes { stdin: true, stdout: true, stderr: true };

/// A process without streams.
fn nothing() -> ProcessSpec {
    let stdio = StdioSpec::Pipes { stdin: false, stdout: false, stderr: false };
    ProcessSpec { stdio, ..ProcessSpec::new(["true"]) }
}

/// Starts it at an agent that says it runs.
fn start_nothing(client: &AgentClient, agent: &mut UnixStream) -> Result<Process, Error> {
    start(client, agent, nothing(), SOON)
}

/// Starts a process at an agent that says it runs, and opens no stream.
fn start(
    client: &AgentClient,
    agent: &mut UnixStream,
    spec: ProcessSpec,
    time: Duration,
) -> Result<Process, Error> {
    thread::scope(|scope| {
        let start = scope.spawn(|| client.start_within(spec, time));
        let mut decoder = Decoder::new();
        let id = loop {
            if let HostMessage::Request { id, request: Request::Start(_) } = message(agent, &mut decoder) {
                break id;
            }
        };
        let answer = GuestMessage::Response { id, result: Ok(Reply::Started { pid: 1 }) };
        agent.write_all(&encode(&answer).unwrap()).unwrap();
        start.join().unwrap()
    })
}

#[test]
fn a_guest_that_opens_no_stream_has_one_deadline_for_the_answer_and_all_streams() {
    let (client, mut agent) = client();
    let begun = Instant::now();
    let started = start(&client, &mut agent, ProcessSpec { stdio: ALL, ..nothing() }, TIME);
    assert!(matches!(started, Err(Error::Deadline { what: "open a stream" })), "{started:?}");
    // Far more than the time, and less than one stream had for itself once.
    assert!(begun.elapsed() < 5 * TIME, "{:?}", begun.elapsed());
}

#[test]
fn whoever_waits_for_a_process_that_is_given_up_is_done_before_and_after() {
    let (client, mut agent) = client();
    let process = start_nothing(&client, &mut agent).unwrap().id;
    thread::scope(|scope| {
        let waits: Vec<_> = (0..4).map(|_| scope.spawn(|| client.wait(process, None))).collect();
        client.abandon(process);
        for wait in waits {
            assert!(matches!(wait.join().unwrap(), Err(Error::Abandoned)));
        }
    });
    assert!(matches!(client.wait(process, None), Err(Error::Abandoned)));
}

#[test]
fn a_guest_that_says_of_no_process_that_it_ended_gets_no_more_than_it_may_have() {
    let (client, mut agent) = client();
    for _ in 0..limits::MAX_PROCESSES {
        let process = start_nothing(&client, &mut agent).unwrap();
        client.abandon(process.id);
    }
    assert!(matches!(client.start(nothing()), Err(Error::Crowded)), "nobody answers, so nobody was asked");
}

#[test]
fn a_process_that_is_started_too_late_for_its_host_is_killed() {
    let (client, mut agent) = client();
    read_frames(&mut agent, 1);
    let time = Duration::from_millis(20);
    assert!(matches!(client.start_within(nothing(), time), Err(Error::Deadline { .. })));
    let mut decoder = Decoder::new();
    let HostMessage::Request { request: Request::Start(start), .. } = message(&mut agent, &mut decoder)
    else {
        panic!("it was not asked for");
    };
    let HostMessage::Request { request, .. } = message(&mut agent, &mut decoder) else {
        panic!("no request")
    };
    let target = SignalTarget::Process;
    assert_eq!(request, Request::Signal { process: start.process, signal: libc::SIGKILL, target });
    assert!(matches!(client.wait(start.process, None), Err(Error::Abandoned)));
}
