//! Guests that do not do what they are told, or do not say so.

use std::fs;

use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;
use nix::libc::{SIGCONT, SIGKILL};

use crate::bundles::shell;
use crate::containerd::Containerd;
use crate::fifos::Streams;
use crate::host::{is_alive, threads, wait_gone, wait_until};
use crate::pods::{join, pod};
use crate::wire::code;

/// Has a call of the machine of `group` go wrong, until the file is removed.
fn fault(containerd: &Containerd, group: &str, call: &str, what: &str) -> String {
    let path = format!("/run/mvm/{}/{group}/{call}.fault", containerd.namespace);
    fs::write(&path, what).unwrap();
    path
}

fn running() -> (Containerd, i32) {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    let machine = containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    (containerd, i32::try_from(machine).unwrap())
}

/// How often the end of a process was told.
fn exits(events: &[String], process: &str) -> usize {
    events.iter().filter(|event| event.starts_with(&format!("exit {process} "))).count()
}

#[test]
fn a_task_whose_guest_never_says_that_it_ended_is_over_in_time_once() {
    let (mut containerd, machine) = running();
    let fault = fault(&containerd, "one", "signal", "ignore");
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.kill("one", "", SIGKILL).unwrap();
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
    wait_gone(machine);
    assert_eq!(containerd.delete("one", "").unwrap().exit_status, 137);
    assert!(!fs::exists(fault).unwrap());
    assert_eq!(containerd.end("one"), ["create one", "start one", "exit one/one 137", "delete one 137"]);
}

#[test]
fn a_container_whose_guest_never_says_that_it_ended_is_over_in_time_and_its_pod_goes_on() {
    let (mut containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    join(&containerd, "b", "exec sleep 1000");
    let fault = fault(&containerd, "pod", "signal", "ignore");
    containerd.kill("a", "", SIGKILL).unwrap();
    assert_eq!(containerd.wait("a", "").unwrap().exit_status, 137);
    containerd.delete("a", "").unwrap();
    assert!(is_alive(machine));
    assert_eq!(containerd.state("b", "").unwrap().status.unwrap(), Status::RUNNING);
    fs::remove_file(fault).unwrap();
    containerd.kill("b", "", SIGKILL).unwrap();
    containerd.wait("b", "").unwrap();
    containerd.delete("b", "").unwrap();
    containerd.kill("pod", "", SIGKILL).unwrap();
    containerd.wait("pod", "").unwrap();
    containerd.delete("pod", "").unwrap();
    let events = containerd.end("pod");
    assert_eq!((exits(&events, "a/a"), exits(&events, "b/b")), (1, 1));
}

#[test]
fn nobody_waits_for_the_end_of_what_was_given_up() {
    /// Each process that is waited for has one.
    const THREAD: &str = "process";
    let (containerd, _) = pod();
    for id in ["a", "b"] {
        join(&containerd, id, "exec sleep 1000");
    }
    let (shim, execs) = (containerd.shim_pid(), [("a", "own"), ("b", "with-init")]);
    for (id, exec) in execs {
        containerd.exec(id, exec, "exec sleep 1000", &Streams::default()).unwrap();
        containerd.run(id, exec).unwrap();
    }
    wait_until("each has one", || threads(shim, THREAD) == 4);
    for call in ["signal", "remove"] {
        fault(&containerd, "pod", call, "ignore");
    }
    containerd.kill("a", "own", SIGKILL).unwrap();
    containerd.kill("b", "", SIGKILL).unwrap();
    for (id, exec) in [("a", "own"), ("b", "with-init"), ("b", "")] {
        assert_eq!(containerd.wait(id, exec).unwrap().exit_status, 137, "{id} {exec}");
    }
    wait_until("what runs is waited for alone", || threads(shim, THREAD) == 1);
    assert_eq!(containerd.state("a", "").unwrap().status.unwrap(), Status::RUNNING);
}

#[test]
fn a_pod_whose_guest_answers_nothing_at_all_is_over_in_time_every_task_once() {
    let (mut containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    join(&containerd, "b", "exec sleep 1000");
    for call in ["signal", "answer", "remove"] {
        fault(&containerd, "pod", call, "silent");
    }
    assert_eq!(code(containerd.kill("a", "", SIGKILL)), Code::UNKNOWN);
    assert!(is_alive(machine), "one that does not answer once may do so later");
    for id in ["a", "b", "pod"] {
        assert_eq!(containerd.wait(id, "").unwrap().exit_status, 137, "{id}");
        assert_eq!(containerd.delete(id, "").unwrap().exit_status, 137, "{id}");
    }
    assert!(!is_alive(machine));
    let events = containerd.end("pod");
    for process in ["a/a", "b/b", "pod/pod"] {
        assert_eq!(exits(&events, process), 1, "{process}");
    }
}

#[test]
fn a_machine_ends_in_time_however_many_calls_its_guest_holds_up() {
    /// More than the shim has threads for.
    const CALLS: usize = 70;
    /// Those threads, and two that watch the machine and its process: they are named after who started them.
    const THREADS: usize = 64 + 2;
    let (containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    let shim = containerd.shim_pid();
    fault(&containerd, "pod", "signal", "wait");
    std::thread::scope(|scope| {
        for _ in 0..CALLS {
            scope.spawn(|| containerd.kill("a", "", SIGCONT));
        }
        wait_until("every thread for calls has one", || threads(shim, "call") == THREADS);
        containerd.kill("pod", "", SIGKILL).unwrap();
        assert_eq!(containerd.wait("pod", "").unwrap().exit_status, 137);
    });
    wait_gone(machine);
    assert_eq!(containerd.delete("a", "").unwrap().exit_status, 137);
    containerd.delete("pod", "").unwrap();
}

#[test]
fn a_kill_that_is_refused_ends_nobody_elses_machine() {
    let (containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    containerd.exec("a", "e", "exec sleep 1000", &Streams::default()).unwrap();
    containerd.run("a", "e").unwrap();
    let fault = fault(&containerd, "pod", "signal", "fail");
    for exec in ["e", ""] {
        let error = containerd.kill("a", exec, SIGKILL).unwrap_err().to_string();
        assert!(error.contains("the guest refuses"), "{error}");
        assert_eq!(containerd.state("a", exec).unwrap().status.unwrap(), Status::RUNNING);
    }
    assert!(is_alive(machine));
    fs::remove_file(fault).unwrap();
    containerd.kill("a", "", SIGKILL).unwrap();
    assert_eq!(containerd.wait("a", "").unwrap().exit_status, 137);
    assert!(is_alive(machine));
}

#[test]
fn a_kill_that_is_refused_ends_the_machine_of_a_task_alone_but_not_for_an_exec() {
    let (mut containerd, machine) = running();
    containerd.exec("one", "e", "exec sleep 1000", &Streams::default()).unwrap();
    containerd.run("one", "e").unwrap();
    fault(&containerd, "one", "signal", "fail");
    assert_eq!(code(containerd.kill("one", "e", SIGKILL)), Code::UNKNOWN);
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
    assert!(is_alive(machine));
    containerd.kill("one", "", SIGKILL).unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
    containerd.delete("one", "").unwrap();
    let events = containerd.end("one");
    assert_eq!((exits(&events, "one/e"), exits(&events, "one/one")), (1, 1));
}

#[test]
fn an_exec_that_was_given_up_while_it_was_started_stays_over() {
    let (containerd, _) = running();
    fault(&containerd, "one", "start", "wait");
    containerd.exec("one", "e", "true", &Streams::default()).unwrap();
    std::thread::scope(|scope| {
        let start = scope.spawn(|| containerd.run("one", "e"));
        wait_until("it is being started", || {
            // Until then it is refused because nothing is to be killed.
            containerd.kill("one", "e", 0).is_err_and(|error| error.to_string().contains("being started"))
        });
        containerd.kill("one", "", SIGKILL).unwrap();
        containerd.wait("one", "").unwrap();
        assert!(start.join().unwrap().is_err());
    });
    let state = containerd.state("one", "e").unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 137));
    containerd.delete("one", "").unwrap();
}

#[test]
fn a_kill_for_want_of_memory_is_told_when_it_happens() {
    let (containerd, _) = running();
    fs::write(format!("/run/mvm/{}/one/one.kills", containerd.namespace), "1").unwrap();
    // The guest speaks of it at its next chance.
    containerd.kill("one", "", SIGCONT).unwrap();
    assert_eq!(containerd.events(3), ["create one", "start one", "oom one"]);
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
}
