//! Pods: a sandbox that makes the machine and containers that join it.

use containerd_shim_protos::api::{StatsRequest, Status};
use containerd_shim_protos::ttrpc::Code;
use nix::libc::{SIGKILL, SIGTERM};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bundles::{in_pod, shell};
use crate::containerd::Containerd;
use crate::fifos::Streams;
use crate::host::is_alive;
use crate::wire::{answer, code, context};

/// A pod with its sandbox running; the machine's process.
pub(crate) fn pod() -> (Containerd, i32) {
    let containerd = Containerd::with_shim("pod", &in_pod(shell("no program"), "sandbox", "pod"));
    let pid = containerd.create("pod", &Streams::default()).unwrap();
    assert_eq!(containerd.run("pod", "").unwrap(), pid);
    (containerd, i32::try_from(pid).unwrap())
}

pub(crate) fn join(containerd: &Containerd, id: &str, script: &str) {
    containerd.bundle(id, &in_pod(shell(script), "container", "pod"));
    assert_eq!(containerd.start(id), containerd.address, "one shim serves the pod");
    containerd.create(id, &Streams::default()).unwrap();
    containerd.run(id, "").unwrap();
}

#[test]
fn containers_join_the_pods_machine_and_leave_it_running() {
    let (mut containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    join(&containerd, "b", "exit 4");
    assert_eq!(containerd.wait("b", "").unwrap().exit_status, 4);
    containerd.delete("b", "").unwrap();
    assert_eq!(containerd.delete_binary("b").exit_status, 137);
    containerd.shutdown("b").unwrap();
    for id in ["a", "pod"] {
        assert_eq!(containerd.state(id, "").unwrap().status.unwrap(), Status::RUNNING);
    }
    assert!(is_alive(machine), "the machine is the pod's");
    containerd.kill("a", "", SIGKILL).unwrap();
    containerd.wait("a", "").unwrap();
    containerd.delete("a", "").unwrap();
    containerd.kill("pod", "", SIGTERM).unwrap();
    assert_eq!(containerd.wait("pod", "").unwrap().exit_status, 0, "as a pause program ends");
    containerd.delete("pod", "").unwrap();
    assert!(!is_alive(machine));
    let events = containerd.end("pod");
    assert_eq!(events[..2], ["create pod", "start pod"]);
    assert_eq!(events[events.len() - 2..], ["exit pod/pod 0", "delete pod 0"]);
}

#[test]
fn a_pods_sandbox_runs_nothing() {
    let (containerd, _) = pod();
    let exec = containerd.exec("pod", "e", "true", &Streams::default());
    assert_eq!(code(exec), Code::FAILED_PRECONDITION);
    let stats = StatsRequest { id: "pod".to_owned(), ..Default::default() };
    answer(containerd.client().stats(context(), &stats)).unwrap();
    containerd.kill("pod", "", nix::libc::SIGCHLD).unwrap();
    assert_eq!(containerd.state("pod", "").unwrap().status.unwrap(), Status::RUNNING);
    containerd.kill("pod", "", SIGKILL).unwrap();
    assert_eq!(containerd.wait("pod", "").unwrap().exit_status, 137);
}

#[test]
fn a_sandbox_that_is_killed_takes_its_containers_along() {
    let (mut containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    containerd.kill("pod", "", SIGKILL).unwrap();
    assert_eq!(containerd.wait("a", "").unwrap().exit_status, 137);
    assert!(!is_alive(machine));
    assert_eq!(code(containerd.kill("a", "", SIGKILL)), Code::NOT_FOUND);
    containerd.bundle("late", &in_pod(shell("true"), "container", "pod"));
    assert_eq!(code(containerd.create("late", &Streams::default())), Code::FAILED_PRECONDITION);
    containerd.delete("a", "").unwrap();
    containerd.delete("pod", "").unwrap();
    let events = containerd.end("pod");
    let exits: Vec<_> = events.iter().filter(|event| event.starts_with("exit")).collect();
    assert_eq!(exits, ["exit a/a 137", "exit pod/pod 137"]);
}

#[test]
fn the_loss_of_the_machine_ends_every_task_once_with_137() {
    let (mut containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    join(&containerd, "b", "exec sleep 1000");
    containerd.exec("a", "e", "exec sleep 1000", &Streams::default()).unwrap();
    containerd.run("a", "e").unwrap();
    containerd.bundle("c", &in_pod(shell("true"), "container", "pod"));
    containerd.create("c", &Streams::default()).unwrap();
    kill(Pid::from_raw(machine), Signal::SIGKILL).unwrap();
    for (id, exec) in [("a", "e"), ("a", ""), ("b", ""), ("c", ""), ("pod", "")] {
        assert_eq!(containerd.wait(id, exec).unwrap().exit_status, 137, "{id} {exec}");
    }
    for id in ["a", "b", "c", "pod"] {
        assert_eq!(containerd.delete(id, "").unwrap().exit_status, 137);
    }
    let events = containerd.end("pod");
    let mut exits: Vec<_> = events.iter().filter(|event| event.starts_with("exit")).collect();
    assert_eq!(exits.last().unwrap().as_str(), "exit pod/pod 137", "the sandbox is over last");
    exits.sort();
    let expected = ["exit a/a 137", "exit a/e 137", "exit b/b 137", "exit c/c 137", "exit pod/pod 137"];
    assert_eq!(exits, expected);
}
