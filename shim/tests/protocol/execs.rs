//! More processes in a container.

use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;
use nix::libc::{SIGKILL, SIGTERM};

use crate::bundles::shell;
use crate::containerd::Containerd;
use crate::fifos::{Streams, fifo, read_all};
use crate::wire::code;

fn running() -> Containerd {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    containerd
}

fn end(mut containerd: Containerd) -> Vec<String> {
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    containerd.end("one")
}

#[test]
fn an_exec_is_added_started_and_ends_with_its_own_code() {
    let containerd = running();
    let none = Streams::default();
    containerd.exec("one", "e1", "exit 3", &none).unwrap();
    assert_eq!(code(containerd.exec("one", "e1", "exit 3", &none)), Code::ALREADY_EXISTS);
    assert_eq!(containerd.state("one", "e1").unwrap().status.unwrap(), Status::CREATED);
    assert_eq!(code(containerd.kill("one", "e1", SIGTERM)), Code::FAILED_PRECONDITION);
    containerd.run("one", "e1").unwrap();
    assert_eq!(containerd.wait("one", "e1").unwrap().exit_status, 3);
    let state = containerd.state("one", "e1").unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status, state.id.as_str()), (Status::STOPPED, 3, "e1"));
    assert_eq!(code(containerd.kill("one", "e1", SIGTERM)), Code::NOT_FOUND);
    assert_eq!(containerd.delete("one", "e1").unwrap().exit_status, 3);
    assert_eq!(code(containerd.state("one", "e1")), Code::NOT_FOUND);
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
    let events = end(containerd);
    assert_eq!(events[2..5], ["exec-added one/e1", "exec-started one/e1", "exit one/e1 3"]);
    assert_eq!(events[5..], ["exit one/one 137", "delete one 137"]);
}

#[test]
fn an_exec_is_signalled_alone() {
    let containerd = running();
    containerd.exec("one", "e1", "exec sleep 1000", &Streams::default()).unwrap();
    containerd.run("one", "e1").unwrap();
    assert_eq!(code(containerd.delete("one", "e1")), Code::FAILED_PRECONDITION);
    containerd.kill("one", "e1", SIGTERM).unwrap();
    assert_eq!(containerd.wait("one", "e1").unwrap().exit_status, 143);
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
    end(containerd);
}

#[test]
fn the_end_of_an_init_is_told_after_that_of_its_execs() {
    let containerd = running();
    for exec in ["a", "b", "c"] {
        containerd.exec("one", exec, "exec sleep 1000", &Streams::default()).unwrap();
        containerd.run("one", exec).unwrap();
    }
    containerd.exec("one", "never", "true", &Streams::default()).unwrap();
    let events = end(containerd);
    let mut exits: Vec<_> = events.iter().filter(|event| event.starts_with("exit")).cloned().collect();
    assert_eq!(exits.pop().unwrap(), "exit one/one 137");
    exits.sort();
    assert_eq!(exits, ["exit one/a 137", "exit one/b 137", "exit one/c 137"]);
}

#[test]
fn nothing_is_executed_in_a_container_that_does_not_run() {
    let containerd = Containerd::with_shim("one", &shell("true"));
    let none = Streams::default();
    assert_eq!(code(containerd.exec("one", "e", "true", &none)), Code::NOT_FOUND);
    containerd.create("one", &none).unwrap();
    assert_eq!(code(containerd.exec("one", "e", "true", &none)), Code::FAILED_PRECONDITION);
    containerd.run("one", "").unwrap();
    containerd.wait("one", "").unwrap();
    assert_eq!(code(containerd.exec("one", "e", "true", &none)), Code::FAILED_PRECONDITION);
}

#[test]
fn an_exec_whose_stream_is_missing_does_not_start_and_can_be_deleted() {
    let containerd = running();
    let stdio = Streams { stdout: "/no/such/fifo".to_owned(), ..Streams::default() };
    containerd.exec("one", "e", "true", &stdio).unwrap();
    assert_eq!(code(containerd.run("one", "e")), Code::NOT_FOUND);
    containerd.delete("one", "e").unwrap();
    end(containerd);
}

#[test]
fn many_execs_at_once_each_get_their_own_output_and_code() {
    let containerd = running();
    std::thread::scope(|scope| {
        for number in 1..=20 {
            let containerd = &containerd;
            scope.spawn(move || {
                let exec = format!("e{number}");
                let stdout = fifo(containerd, &exec);
                let output = read_all(&stdout);
                let stdio = Streams { stdout, ..Streams::default() };
                containerd.exec("one", &exec, &format!("echo {number}; exit {number}"), &stdio).unwrap();
                containerd.run("one", &exec).unwrap();
                assert_eq!(containerd.wait("one", &exec).unwrap().exit_status, number);
                containerd.delete("one", &exec).unwrap();
                assert_eq!(output.join().unwrap(), format!("{number}\n").into_bytes());
            });
        }
    });
    end(containerd);
}
