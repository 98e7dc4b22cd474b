//! What crosses the vsock, both ways.

use mvm_devices::testing::hostile::Reach;
use mvm_protocol::{
    Decoder, Event, ExitStatus, Failure, FailureKind, GuestMessage, Hello, HostMessage, Reply, Request,
    STREAM_HEADER_LEN, ShutdownMode, Stats, StreamHeader, encode,
};
use mvm_runtime::fuzzing::agent;

use super::{target, told};
use crate::Target;

pub(super) const TARGETS: &[Target] = &[
    target("agent_reply", reply, reply_seeds, &["taken", "broken"]),
    target("agent_request", request, request_seeds, &["messages", "broken"]),
    target("agent_stream", stream, stream_seeds, super::BOTH),
];

/// The first byte says in how large pieces the rest comes.
fn reply(bytes: &[u8], reach: &mut Reach) {
    let (first, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let taken = agent::replies(rest, usize::from(*first) + 1);
    assert!(taken * 4 <= rest.len(), "a message has a header");
    reach.add("taken", taken as u64);
    reach.add("broken", (taken == 0).into());
}

fn frames(messages: &[GuestMessage]) -> Vec<u8> {
    messages.iter().flat_map(|message| encode(message).expect("it fits a frame")).collect()
}

fn reply_seeds() -> Vec<Vec<u8>> {
    let answer = |id, reply| GuestMessage::Response { id, result: Ok(reply) };
    let refusal = Failure { kind: FailureKind::NotFound, errno: 2, message: "no".to_owned() };
    let refused = GuestMessage::Response { id: 3, result: Err(refusal) };
    let killed = |root: &str, kills| GuestMessage::Event(Event::OutOfMemory { root: root.to_owned(), kills });
    let exited = |process| {
        let at = Default::default();
        GuestMessage::Event(Event::Exited { process, status: ExitStatus::Code(1), at })
    };
    let honest = [
        answer(1, Reply::Done),
        answer(2, Reply::Stats(Stats::default())),
        refused,
        answer(4, Reply::Started { pid: 9 }),
        exited(1),
        killed("root", 3),
    ];
    let mut all: Vec<Vec<u8>> = honest.iter().map(|one| frames(std::slice::from_ref(one))).collect();
    all.push(frames(&honest));
    all.push(frames(&[answer(1, Reply::Done), answer(1, Reply::Done)]));
    all.push(frames(&[answer(99, Reply::Clock(u64::MAX))]));
    all.push((0..600).flat_map(|n| frames(&[exited(n), killed(&format!("r{n}"), 1)])).collect());
    all.extend([vec![0xff; 12], vec![0, 0, 0x10, 0], vec![0; 400], vec![]]);
    all.iter().flat_map(|frames| [0, 255].map(|piece| [&[piece][..], &frames[..]].concat())).collect()
}

fn request(bytes: &[u8], reach: &mut Reach) {
    let mut decoder = Decoder::new();
    decoder.push(bytes);
    loop {
        match decoder.next_message::<HostMessage>() {
            Ok(Some(message)) => {
                let frame = encode(&message).expect("what came in a frame fits one");
                let mut again = Decoder::new();
                again.push(&frame);
                assert_eq!(again.next_message::<HostMessage>(), Ok(Some(message)));
                reach.add("messages", 1);
            }
            Ok(None) => return,
            Err(_) => return reach.add("broken", 1),
        }
    }
}

fn request_seeds() -> Vec<Vec<u8>> {
    let requests = [
        Request::Ping,
        Request::Update { root: "a".to_owned(), limits: Default::default() },
        Request::Freeze { root: "a".to_owned(), frozen: true },
        Request::Shutdown { mode: ShutdownMode::PowerOff, grace_ms: 100 },
        Request::AdjustClock { by_ns: i64::MIN },
        Request::Rename { root: "a".to_owned(), hostname: Some("b".to_owned()) },
        Request::EjectCard { mac: [2; 6] },
    ];
    let frames =
        requests.map(|request| encode(&HostMessage::Request { id: 7, request }).expect("it fits a frame"));
    let mut all = frames.to_vec();
    all.push(frames.concat());
    all.extend([vec![0xff; 9], vec![3, 0, 0, 0, 1, 7, 0xff], vec![]]);
    all
}

/// A stream's first bytes, and a hello of any version.
fn stream(bytes: &[u8], reach: &mut Reach) {
    let _ = Hello::version_in(bytes);
    let Some(header) = bytes.first_chunk::<STREAM_HEADER_LEN>() else { return told(reach, false) };
    let again = StreamHeader::decode(header).map(StreamHeader::encode);
    assert!(again.is_err() || again == Ok(*header));
    told(reach, again.is_ok());
}

fn stream_seeds() -> Vec<Vec<u8>> {
    let header = StreamHeader { token: mvm_protocol::Token(7) }.encode();
    vec![header.to_vec(), vec![0; STREAM_HEADER_LEN], vec![]]
}
