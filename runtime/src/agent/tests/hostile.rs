//! Both sides against a peer that breaks the protocol or goes away.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::{Duration, Instant},
};

use mvm_protocol::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::guest::{Guest, SOON, identity, start_agent};
use crate::agent::{AgentClient, Error};

/// A client whose agent is played by the test.
fn played(opening: &[u8]) -> (Result<AgentClient, Error>, UnixStream) {
    played_within(opening, Duration::from_secs(60))
}

/// The same, with this long for the hello.
fn played_within(opening: &[u8], time: Duration) -> (Result<AgentClient, Error>, UnixStream) {
    let dir = tempfile::tempdir().unwrap();
    let streams = UnixListener::bind(dir.path().join("streams")).unwrap();
    let (host, mut agent) = UnixStream::pair().unwrap();
    agent.write_all(opening).unwrap();
    (AgentClient::connect(host, streams, identity(), time), agent)
}

fn hello(version: Version) -> Vec<u8> {
    let stages = StageTimes::default();
    let (agent_version, kernel_release) = ("\u{1b}[31m".to_owned(), "k".repeat(9000));
    let hello = Hello { magic: MAGIC, version, agent_version, kernel_release, connection: 0, stages };
    encode(&GuestMessage::Hello(hello)).unwrap()
}

/// A client and the control connection of an agent that says nothing more.
pub(crate) fn client() -> (AgentClient, UnixStream) {
    let (client, agent) = played(&hello(VERSION));
    (client.unwrap(), agent)
}

#[test]
fn a_guest_that_says_nothing_or_something_else_is_not_waited_for_long() {
    assert!(matches!(played_within(b"", Duration::from_millis(200)).0, Err(Error::Deadline { .. })));
    assert!(matches!(played(b"\x05\0\0\0HTTP/").0, Err(Error::NotHello)));
    assert!(matches!(played(&u32::MAX.to_le_bytes()).0, Err(Error::Decode(DecodeError::TooLong(u32::MAX)))));
}

#[test]
fn a_later_major_version_is_named_and_a_later_minor_one_accepted() {
    let later = Version { major: VERSION.major + 1, minor: 0 };
    let error = played(&hello(later)).0.unwrap_err();
    assert_eq!(error.to_string(), "the guest's agent speaks protocol 4.0, this host 3.1");
    let newer = Version { major: VERSION.major, minor: VERSION.minor + 1 };
    assert!(played(&hello(newer)).0.is_ok());
}

#[test]
fn the_guests_texts_are_cut_and_escaped() {
    let (client, _agent) = client();
    assert_eq!(client.hello().agent_version, "\\u{1b}[31m");
    assert_eq!(client.hello().kernel_release.len(), limits::MAX_GUEST_TEXT);
}

#[test]
fn a_guest_that_announces_four_gibibytes_loses_its_connection() {
    let (client, mut agent) = client();
    agent.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let error = client.ping().unwrap_err();
    assert!(matches!(error, Error::Lost { .. } | Error::Io { .. }), "{error}");
}

#[test]
fn an_answer_to_a_question_nobody_asked_loses_the_connection() {
    let (client, mut agent) = client();
    let answer = GuestMessage::Response { id: 4711, result: Ok(Reply::Done) };
    agent.write_all(&encode(&answer).unwrap()).unwrap();
    let error = client.wait(1, Some(SOON)).unwrap_err();
    let text = "the connection to the guest's agent is lost: it answered a request that was not made";
    assert_eq!(error.to_string(), text);
}

#[test]
fn an_answer_of_the_wrong_kind_is_an_error_of_its_call_only() {
    let (client, mut agent) = client();
    for (id, reply) in [(1, Reply::Started { pid: 1 }), (2, Reply::Done)] {
        let answer = encode(&GuestMessage::Response { id, result: Ok(reply) }).unwrap();
        let result = thread::scope(|scope| {
            let call = scope.spawn(|| client.ping());
            // Answers only once it was asked.
            read_frames(&mut agent, if id == 1 { 2 } else { 1 });
            agent.write_all(&answer).unwrap();
            call.join().unwrap()
        });
        assert_eq!(matches!(result, Err(Error::WrongReply)), id == 1, "{result:?}");
    }
}

pub(crate) fn read_frames(agent: &mut UnixStream, count: usize) {
    for _ in 0..count {
        let mut length = [0; 4];
        agent.read_exact(&mut length).unwrap();
        let mut payload = vec![0; u32::from_le_bytes(length) as usize];
        agent.read_exact(&mut payload).unwrap();
    }
}

#[test]
fn requests_that_fit_no_frame_take_no_place_in_flight() {
    let (client, _agent) = client();
    let root = "x".repeat(limits::MAX_FRAME);
    for _ in 0..=limits::MAX_IN_FLIGHT {
        let error = client.root_stats(&root).unwrap_err();
        assert!(matches!(error, Error::Encode(_)), "{error}");
    }
}

#[test]
fn the_loss_of_the_connection_can_be_waited_for_with_other_things() {
    let (client, agent) = client();
    let mut lost = [PollFd::new(client.lost(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut lost, PollTimeout::ZERO).unwrap(), 0);
    assert!(!client.answers(), "it plays dead");
    assert_eq!(poll(&mut lost, PollTimeout::ZERO).unwrap(), 0, "silence is no loss");
    drop(agent);
    assert_eq!(poll(&mut lost, PollTimeout::NONE).unwrap(), 1);
    assert!(matches!(client.ping(), Err(Error::Lost { .. })), "every call knows");
}

#[test]
fn a_guest_that_goes_away_ends_every_wait() {
    let (client, agent) = client();
    thread::scope(|scope| {
        let waits: Vec<_> = (0..4)
            .map(|process| {
                scope.spawn({
                    let client = &client;
                    move || client.wait(process, None)
                })
            })
            .collect();
        drop(agent);
        for wait in waits {
            assert!(matches!(wait.join().unwrap(), Err(Error::Lost { .. })));
        }
    });
}

#[test]
fn stream_connections_with_bad_headers_or_none_do_not_keep_good_ones_out() {
    let guest = Guest::new();
    let path = guest.dir.path().join("vsock_1025");
    let _silent: Vec<UnixStream> = (0..10).map(|_| UnixStream::connect(&path).unwrap()).collect();
    for header in [[0xff; 16], StreamHeader { token: Token(1) }.encode()] {
        let mut stranger = UnixStream::connect(&path).unwrap();
        stranger.write_all(&header).unwrap();
        let refused = stranger.read(&mut [0]);
        assert!(matches!(refused, Ok(0) | Err(_)), "{refused:?}");
    }
    let mut process = guest.sh("echo fine");
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "fine\n");
}

/// The agent's side: what a host sends that it should not.
struct Host {
    control: UnixListener,
    _streams: UnixListener,
    agent: std::process::Child,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let control = UnixListener::bind(dir.path().join("vsock_1024")).unwrap();
        let streams = UnixListener::bind(dir.path().join("vsock_1025")).unwrap();
        let agent = start_agent(dir.path());
        Self { control, _streams: streams, agent, _dir: dir }
    }

    /// The agent's next connection, and the hello on it.
    fn accept(&self) -> (UnixStream, Decoder, Hello) {
        let (mut stream, _) = self.control.accept().unwrap();
        let mut decoder = Decoder::new();
        let GuestMessage::Hello(hello) = next(&mut stream, &mut decoder) else { panic!("no hello") };
        (stream, decoder, hello)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn next(stream: &mut UnixStream, decoder: &mut Decoder) -> GuestMessage {
    message(stream, decoder)
}

/// The next message of whoever is at the other end.
pub(super) fn message<T: serde::de::DeserializeOwned>(stream: &mut UnixStream, decoder: &mut Decoder) -> T {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut chunk = [0; 4096];
    loop {
        if let Some(message) = decoder.next_message().unwrap() {
            return message;
        }
        let count = stream.read(&mut chunk).unwrap();
        assert!(count > 0, "the connection was closed");
        decoder.push(&chunk[..count]);
    }
}

fn send(stream: &mut UnixStream, message: &HostMessage) {
    stream.write_all(&encode(message).unwrap()).unwrap();
}

fn ack() -> HostMessage {
    HostMessage::HelloAck(HelloAck { magic: MAGIC, version: VERSION, features: 0, identity: identity() })
}

#[test]
fn malformed_frames_end_only_that_connection_and_the_agent_dials_again() {
    let host = Host::new();
    for (round, bytes) in
        [&b"\xff\xff\xff\xff"[..], b"\0\0\0\0", b"\x02\0\0\0\x07\x07"].into_iter().enumerate()
    {
        let (mut stream, _, hello) = host.accept();
        assert_eq!(hello.connection as usize, round);
        send(&mut stream, &ack());
        stream.write_all(bytes).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "round {round}");
    }
    let (mut stream, mut decoder, _) = host.accept();
    send(&mut stream, &ack());
    send(&mut stream, &HostMessage::Request { id: 1, request: Request::Ping });
    let answer = GuestMessage::Response { id: 1, result: Ok(Reply::Done) };
    assert_eq!(next(&mut stream, &mut decoder), answer);
}

#[test]
fn a_request_before_the_answer_to_the_hello_ends_the_connection() {
    let host = Host::new();
    let (mut stream, ..) = host.accept();
    send(&mut stream, &HostMessage::Request { id: 1, request: Request::Ping });
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_unknown_verb_is_refused_by_its_id_and_the_connection_goes_on() {
    let host = Host::new();
    let (mut stream, mut decoder, _) = host.accept();
    send(&mut stream, &ack());
    let mut frame = encode(&HostMessage::Request { id: 77, request: Request::Ping }).unwrap();
    *frame.last_mut().unwrap() = 0x7f;
    stream.write_all(&frame).unwrap();
    let GuestMessage::Response { id: 77, result: Err(failure) } = next(&mut stream, &mut decoder) else {
        panic!("no refusal");
    };
    assert_eq!(failure.kind, FailureKind::Unsupported);
    send(&mut stream, &HostMessage::Request { id: 78, request: Request::Ping });
    let answer = GuestMessage::Response { id: 78, result: Ok(Reply::Done) };
    assert_eq!(next(&mut stream, &mut decoder), answer);
}

#[test]
fn requests_cut_into_single_bytes_are_served() {
    let host = Host::new();
    let (mut stream, mut decoder, _) = host.accept();
    let mut bytes = encode(&ack()).unwrap();
    bytes.extend(encode(&HostMessage::Request { id: 5, request: Request::List }).unwrap());
    bytes.iter().for_each(|byte| stream.write_all(&[*byte]).unwrap());
    let answer = GuestMessage::Response { id: 5, result: Ok(Reply::Processes(vec![])) };
    assert_eq!(next(&mut stream, &mut decoder), answer);
}

#[test]
fn an_exit_while_the_host_was_away_is_reported_when_it_is_back_until_it_is_forgotten() {
    let host = Host::new();
    let (mut stream, mut decoder, _) = host.accept();
    send(&mut stream, &ack());
    let request = Request::Start(Box::new(Start {
        process: 9,
        root: None,
        args: vec!["/bin/sh".to_owned(), "-c".to_owned(), "exit 9".to_owned()],
        env: vec![],
        cwd: "/".to_owned(),
        user: User::Named(String::new()),
        stdio: Stdio::Pipes { stdin: None, stdout: None, stderr: None },
        pid_namespace: PidNamespace::Agent,
        oom_score_adj: 0,
        confinement: Default::default(),
    }));
    send(&mut stream, &HostMessage::Request { id: 1, request });
    let GuestMessage::Response { result: Ok(Reply::Started { .. }), .. } = next(&mut stream, &mut decoder)
    else {
        panic!("not started");
    };
    drop(stream);
    for round in 1..3 {
        let (mut stream, mut decoder, hello) = host.accept();
        assert_eq!(hello.connection, round);
        send(&mut stream, &ack());
        let GuestMessage::Event(Event::Exited { process: 9, status, .. }) = next(&mut stream, &mut decoder)
        else {
            panic!("no exit");
        };
        assert_eq!(status, ExitStatus::Code(9));
        if round == 2 {
            send(&mut stream, &HostMessage::Request { id: 1, request: Request::Forget { process: 9 } });
            next(&mut stream, &mut decoder);
        }
    }
    let (mut stream, mut decoder, _) = host.accept();
    send(&mut stream, &ack());
    send(&mut stream, &HostMessage::Request { id: 1, request: Request::Ping });
    let answer = GuestMessage::Response { id: 1, result: Ok(Reply::Done) };
    assert_eq!(next(&mut stream, &mut decoder), answer, "the exit was forgotten");
}

#[test]
fn a_guest_that_lets_nothing_be_killed_has_one_time_for_all_of_it() {
    let (client, _agent) = client();
    let begun = Instant::now();
    let killed = client.kill_by(1..=256, begun + Duration::from_millis(100));
    assert!(matches!(killed, Err(Error::Deadline { .. })), "{killed:?}");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let ejected = client.eject_card_by([2; 6], begun);
    assert!(matches!(ejected, Err(Error::Deadline { .. })), "{ejected:?}");
}
