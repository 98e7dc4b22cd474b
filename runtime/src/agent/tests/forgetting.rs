//! Records the guest is to drop: told with the next request, and none is left over.

use std::{io::Write, os::unix::net::UnixStream, thread};

use mvm_protocol::*;

use super::{
    guest::{Guest, SOON, shell},
    hostile::{client, message},
};

fn say(agent: &mut UnixStream, what: &GuestMessage) {
    agent.write_all(&encode(what).unwrap()).unwrap();
}

/// The next request the guest gets.
fn next_request(agent: &mut UnixStream, decoder: &mut Decoder) -> (u64, Request) {
    loop {
        if let HostMessage::Request { id, request } = message(agent, decoder) {
            return (id, request);
        }
    }
}

/// The guest says that these processes have ended.
fn end(agent: &mut UnixStream, processes: impl IntoIterator<Item = u64>) {
    for process in processes {
        let (status, at) = (ExitStatus::Code(0), Stamp::default());
        say(agent, &GuestMessage::Event(Event::Exited { process, status, at }));
    }
}

#[test]
fn an_exit_that_was_fetched_is_forgotten_with_the_next_request_and_not_before() {
    let (client, mut agent) = client();
    let mut decoder = Decoder::new();
    end(&mut agent, [7]);
    assert_eq!(client.wait(7, Some(SOON)).unwrap(), ExitStatus::Code(0));
    let pinged = thread::scope(|scope| {
        let pinging = scope.spawn(|| client.ping());
        let (_, first) = next_request(&mut agent, &mut decoder);
        assert_eq!(first, Request::Forget { process: 7 });
        let (id, second) = next_request(&mut agent, &mut decoder);
        assert_eq!(second, Request::Ping);
        say(&mut agent, &GuestMessage::Response { id, result: Ok(Reply::Done) });
        pinging.join().unwrap()
    });
    pinged.unwrap();
}

#[test]
fn many_are_forgotten_without_another_request() {
    let (client, mut agent) = client();
    let mut decoder = Decoder::new();
    end(&mut agent, 1..=16);
    for process in 1..=16 {
        client.wait(process, Some(SOON)).unwrap();
    }
    for process in 1..=16 {
        assert_eq!(next_request(&mut agent, &mut decoder).1, Request::Forget { process });
    }
}

#[test]
fn more_processes_than_there_may_be_at_once_run_one_after_the_other() {
    let guest = Guest::new();
    for _ in 0..limits::MAX_PROCESSES + 20 {
        let process = guest.client.start(shell("exit 0")).unwrap();
        guest.client.wait(process.id, Some(SOON)).unwrap();
    }
    assert_eq!(guest.client.list().unwrap(), []);
}
