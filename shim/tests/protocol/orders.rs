//! What containerd asks in an order that is not the plain one.

use std::fs;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, Status};
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::ttrpc::context::with_duration;
use nix::libc::{SIGKILL, SIGTERM};

use crate::bundles::{in_pod, shell};
use crate::containerd::Containerd;
use crate::fifos::Streams;
use crate::host::{children, is_alive, wait_gone, wait_until};
use crate::pods::{join, pod};
use crate::wire::{answer, code};

#[test]
fn an_end_that_was_asked_for_too_early_comes_with_the_last_task() {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    containerd.shutdown("one").unwrap();
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    assert_eq!(containerd.delete("one", "").unwrap().exit_status, 137, "it is answered before the end");
    wait_gone(containerd.shim_pid());
    assert_eq!(containerd.events(4), ["create one", "start one", "exit one/one 137", "delete one 137"]);
}

/// Asks for a creation that waits, has its task deleted, and lets it go on.
fn delete_while_created(containerd: &Containerd, id: &str, group: &str) {
    let directory = format!("/run/mvm/{}/{group}", containerd.namespace);
    fs::create_dir_all(&directory).unwrap();
    let fault = format!("{directory}/create.fault");
    fs::write(&fault, "wait").unwrap();
    thread::scope(|scope| {
        let creation = scope.spawn(|| containerd.create(id, &Streams::default()));
        wait_until("it is being made", || fs::exists(format!("{directory}/create.waits")).unwrap());
        let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
        let early = answer(containerd.client().delete(with_duration(Duration::from_millis(500)), &request));
        assert!(early.is_err(), "nothing is deleted before it is made");
        fs::remove_file(fault).unwrap();
        assert_eq!(code(creation.join().unwrap()), Code::UNKNOWN);
    });
    assert_eq!(code(containerd.state(id, "")), Code::NOT_FOUND);
}

#[test]
fn a_task_that_is_deleted_while_it_is_made_leaves_nothing_and_may_be_made_again() {
    let mut containerd = Containerd::with_shim("one", &shell("exit 3"));
    let shim = containerd.shim_pid();
    delete_while_created(&containerd, "one", "one");
    assert!(children(shim).is_empty(), "the machine is left");
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 3);
    containerd.delete("one", "").unwrap();
    assert_eq!(containerd.end("one"), ["create one", "start one", "exit one/one 3", "delete one 3"]);
}

#[test]
fn a_task_whose_machine_waits_for_others_is_deleted_at_once() {
    let mut config = shell("true");
    config["annotations"] = serde_json::json!({"io.mvm.fake.boot": "wait"});
    let mut containerd = Containerd::with_shim("one", &config);
    thread::scope(|scope| {
        let creation = scope.spawn(|| containerd.create("one", &Streams::default()));
        let waits = format!("/run/mvm/{}/one/boot.waits", containerd.namespace);
        wait_until("it waits", || fs::exists(&waits).unwrap());
        assert_eq!(code(containerd.delete("one", "")), Code::NOT_FOUND, "it was never made");
        assert_eq!(code(creation.join().unwrap()), Code::UNKNOWN);
    });
    fs::write(containerd.path("one").join("config.json"), shell("true").to_string()).unwrap();
    containerd.create("one", &Streams::default()).unwrap();
    containerd.delete("one", "").unwrap();
    assert_eq!(containerd.end("one"), ["create one", "delete one 137"]);
}

#[test]
fn a_container_that_is_deleted_while_it_is_made_does_not_end_its_pod() {
    let (containerd, machine) = pod();
    join(&containerd, "a", "exec sleep 1000");
    containerd.bundle("b", &in_pod(shell("exit 5"), "container", "pod"));
    delete_while_created(&containerd, "b", "pod");
    assert!(is_alive(machine));
    assert_eq!(containerd.state("a", "").unwrap().status.unwrap(), Status::RUNNING);
    containerd.create("b", &Streams::default()).unwrap();
    containerd.run("b", "").unwrap();
    assert_eq!(containerd.wait("b", "").unwrap().exit_status, 5);
}

#[test]
fn a_sandbox_that_is_deleted_first_leaves_the_daemon_to_its_containers() {
    let (mut containerd, _) = pod();
    join(&containerd, "a", "exec sleep 1000");
    join(&containerd, "b", "exec sleep 1000");
    containerd.kill("pod", "", SIGKILL).unwrap();
    containerd.wait("pod", "").unwrap();
    containerd.delete("pod", "").unwrap();
    containerd.shutdown("pod").unwrap();
    // What names the daemon has gone from this bundle to one of a container's: nobody is waited for, or ended.
    assert!(!containerd.path("pod").join("mvm.json").exists(), "it would wait for the daemon");
    containerd.delete_binary("pod");
    assert!(is_alive(containerd.shim_pid()));
    for id in ["a", "b"] {
        assert_eq!(containerd.wait(id, "").unwrap().exit_status, 137);
        assert_eq!(containerd.delete(id, "").unwrap().exit_status, 137);
        containerd.delete_binary(id);
    }
    let events = containerd.end("b");
    let mut exits: Vec<_> = events.iter().filter(|event| event.starts_with("exit")).collect();
    assert_eq!(exits.pop().unwrap(), "exit pod/pod 137", "a sandbox is over last");
    exits.sort();
    assert_eq!(exits, ["exit a/a 137", "exit b/b 137"]);
    assert_eq!(events.iter().filter(|event| event.starts_with("delete")).count(), 3);
}

#[test]
fn who_keeps_a_daemon_after_its_sandbox_can_end_it() {
    let (containerd, _) = pod();
    join(&containerd, "a", "exec sleep 1000");
    containerd.kill("pod", "", SIGKILL).unwrap();
    containerd.wait("pod", "").unwrap();
    containerd.delete("pod", "").unwrap();
    containerd.delete_binary("pod");
    assert!(is_alive(containerd.shim_pid()));
    containerd.delete_binary("a");
    assert!(!is_alive(containerd.shim_pid()), "containerd could not reach it");
}

#[test]
fn a_sandbox_gives_its_containers_the_time_to_end_by_themselves() {
    let (mut containerd, _) = pod();
    join(&containerd, "a", "exec sleep 1000");
    containerd.kill("pod", "", SIGTERM).unwrap();
    containerd.kill("a", "", SIGTERM).unwrap();
    assert_eq!(containerd.wait("a", "").unwrap().exit_status, 143);
    assert_eq!(containerd.wait("pod", "").unwrap().exit_status, 0);
    containerd.delete("a", "").unwrap();
    containerd.delete("pod", "").unwrap();
    let events = containerd.end("pod");
    assert_eq!(events[4..6], ["exit a/a 143", "exit pod/pod 0"]);
}

#[test]
fn a_daemon_that_still_answers_gets_the_time_to_end_by_itself() {
    let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    // From here on it has two seconds.
    let bundle = containerd.path("one");
    let mut program = containerd.command("one", &["-bundle", bundle.to_str().unwrap(), "delete"]);
    let mut program = program.stdout(std::process::Stdio::null()).spawn().unwrap();
    containerd.delete("one", "").unwrap();
    let events = containerd.end("one");
    assert_eq!(events, ["create one", "start one", "exit one/one 137", "delete one 137"]);
    assert!(program.wait().unwrap().success());
}
