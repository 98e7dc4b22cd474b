//! Answers that fit a frame and hold more than an agent may say.

use std::io::Write;
use std::thread;

use mvm_protocol::*;

use super::hostile::{client, message};
use crate::agent::{AgentClient, Error};

/// How a call fares whose agent answers so.
fn answered<T: Send>(
    reply: Reply,
    call: impl FnOnce(&AgentClient) -> Result<T, Error> + Send,
) -> Result<T, String> {
    let (client, mut agent) = client();
    let result = thread::scope(|scope| {
        let calling = scope.spawn(|| call(&client));
        let mut decoder = Decoder::new();
        let id = loop {
            if let HostMessage::Request { id, .. } = message(&mut agent, &mut decoder) {
                break id;
            }
        };
        let answer = encode(&GuestMessage::Response { id, result: Ok(reply) }).unwrap();
        agent.write_all(&answer).unwrap();
        calling.join().unwrap()
    });
    result.map_err(|error| error.to_string())
}

#[test]
fn statistics_have_no_more_files_and_process_numbers_than_an_agent_tells() {
    let stats = |files: usize, pids: usize| {
        let stats = RootStats { files: vec![Default::default(); files], pids: vec![1; pids] };
        answered(Reply::RootStats(stats), |client| client.root_stats("c")).map(|stats| stats.files.len())
    };
    let (files, pids) = (limits::MAX_STAT_FILES, limits::MAX_STAT_PIDS);
    assert_eq!(stats(files, pids), Ok(files));
    let text = "the guest's agent answered with 65 files of statistics, and may with at most 64";
    assert_eq!(stats(files + 1, 0).unwrap_err(), text);
    let text = "the guest's agent answered with 4097 process numbers, and may with at most 4096";
    assert_eq!(stats(0, pids + 1).unwrap_err(), text);
}

#[test]
fn a_part_has_no_more_bytes_or_names_than_one_may() {
    let get = |content: GotContent| {
        let got = Got { mode: 0, uid: 0, gid: 0, size: 0, content };
        let get = Get { place: Place::Root("c".to_owned()), path: "x".to_owned(), offset: 0 };
        answered(Reply::Got(got), |client| client.get(get)).map(drop)
    };
    let names = |count| get(GotContent::Directory(vec![String::new(); count]));
    assert_eq!(names(limits::MAX_PART_NAMES), Ok(()));
    let text = "the guest's agent answered with 262145 names, and may with at most 262144";
    assert_eq!(names(limits::MAX_PART_NAMES + 1).unwrap_err(), text);
    assert_eq!(get(GotContent::File(vec![0; limits::MAX_PART])), Ok(()));
    let text = "the guest's agent answered with 524289 bytes of a file, and may with at most 524288";
    assert_eq!(get(GotContent::File(vec![0; limits::MAX_PART + 1])).unwrap_err(), text);
}

#[test]
fn a_guest_lists_no_more_processes_than_it_may_have() {
    let list = |count| {
        let entries = vec![ProcessEntry { process: 1, pid: 1, exited: None }; count];
        answered(Reply::Processes(entries), AgentClient::list).map(|entries| entries.len())
    };
    assert_eq!(list(limits::MAX_PROCESSES), Ok(limits::MAX_PROCESSES));
    let text = "the guest's agent answered with 257 processes, and may with at most 256";
    assert_eq!(list(limits::MAX_PROCESSES + 1).unwrap_err(), text);
}
