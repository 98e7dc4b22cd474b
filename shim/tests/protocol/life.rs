//! One task from creation to deletion.

use std::fs;

use containerd_shim_protos::api::{
    PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, StatsRequest, Status, UpdateTaskRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::Code;
use nix::libc::{SIGCONT, SIGKILL, SIGTERM};

use crate::bundles::shell;
use crate::containerd::Containerd;
use crate::fifos::Streams;
use crate::host::{is_alive, wait_gone, wait_until};
use crate::wire::{answer, code, context};

#[test]
fn a_task_is_created_runs_and_is_deleted_and_each_step_is_told() {
    let mut containerd = Containerd::with_shim("one", &shell("exit 7"));
    let none = Streams::default();
    let pid = containerd.create("one", &none).unwrap();
    assert!(is_alive(i32::try_from(pid).unwrap()), "the number is a process's");
    let state = containerd.state("one", "").unwrap();
    assert_eq!((state.status.unwrap(), state.pid), (Status::CREATED, pid));
    assert_eq!(containerd.run("one", "").unwrap(), pid);
    let exit = containerd.wait("one", "").unwrap();
    assert_eq!(exit.exit_status, 7);
    assert!(exit.exited_at.is_some());
    let state = containerd.state("one", "").unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 7));
    assert_eq!(state.exited_at, exit.exited_at);
    let deleted = containerd.delete("one", "").unwrap();
    assert_eq!((deleted.exit_status, deleted.pid, deleted.exited_at), (7, pid, exit.exited_at));
    assert!(!is_alive(i32::try_from(pid).unwrap()), "the machine goes with its container");
    let events = containerd.end("one");
    assert_eq!(events, ["create one", "start one", "exit one/one 7", "delete one 7"]);
}

#[test]
fn signals_end_a_task_with_128_and_their_number() {
    let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    assert_eq!(code(containerd.delete("one", "")), Code::FAILED_PRECONDITION);
    assert_eq!(code(containerd.run("one", "")), Code::FAILED_PRECONDITION);
    assert_eq!(code(containerd.kill("one", "", 100)), Code::INVALID_ARGUMENT);
    containerd.kill("one", "", SIGTERM).unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 143);
    assert_eq!(code(containerd.kill("one", "", SIGKILL)), Code::NOT_FOUND);
    assert_eq!(code(containerd.run("one", "")), Code::FAILED_PRECONDITION);
    containerd.delete("one", "").unwrap();
    containerd.end("one");
}

#[test]
fn everybody_who_waits_is_told() {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..8).map(|_| scope.spawn(|| containerd.wait("one", "").unwrap())).collect();
        containerd.kill("one", "", SIGKILL).unwrap();
        for wait in waits {
            assert_eq!(wait.join().unwrap().exit_status, 137);
        }
    });
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
}

#[test]
fn what_is_unknown_is_not_found_and_what_is_there_is_not_made_again() {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    assert_eq!(code(containerd.state("one", "")), Code::NOT_FOUND);
    assert_eq!(code(containerd.wait("one", "")), Code::NOT_FOUND);
    assert_eq!(code(containerd.kill("one", "", SIGKILL)), Code::NOT_FOUND);
    assert_eq!(code(containerd.delete("one", "")), Code::NOT_FOUND);
    containerd.create("one", &Streams::default()).unwrap();
    assert_eq!(code(containerd.create("one", &Streams::default())), Code::ALREADY_EXISTS);
    assert_eq!(code(containerd.state("one", "nope")), Code::NOT_FOUND);
    containerd.bundle("two", &shell("true"));
    assert_eq!(code(containerd.create("two", &Streams::default())), Code::FAILED_PRECONDITION);
    assert_eq!(containerd.events(1), ["create one"]);
}

#[test]
fn a_task_that_never_started_can_be_killed_or_just_deleted() {
    for killed in [true, false] {
        let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
        containerd.create("one", &Streams::default()).unwrap();
        let expected: &[&str] = if killed {
            containerd.kill("one", "", SIGCONT).unwrap();
            assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::CREATED);
            containerd.kill("one", "", SIGKILL).unwrap();
            assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
            &["create one", "exit one/one 137", "delete one 137"]
        } else {
            &["create one", "delete one 137"]
        };
        let deleted = containerd.delete("one", "").unwrap();
        assert_eq!(deleted.exit_status, 137);
        assert!(deleted.exited_at.is_some());
        assert_eq!(containerd.end("one"), expected);
    }
}

#[test]
fn a_paused_task_runs_on_when_it_is_resumed() {
    let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    let pause = PauseRequest { id: "one".to_owned(), ..Default::default() };
    let resume = ResumeRequest { id: "one".to_owned(), ..Default::default() };
    containerd.create("one", &Streams::default()).unwrap();
    assert_eq!(code(answer(containerd.client().pause(context(), &pause))), Code::FAILED_PRECONDITION);
    containerd.run("one", "").unwrap();
    assert_eq!(code(answer(containerd.client().resume(context(), &resume))), Code::FAILED_PRECONDITION);
    answer(containerd.client().pause(context(), &pause)).unwrap();
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::PAUSED);
    assert_eq!(code(answer(containerd.client().pause(context(), &pause))), Code::FAILED_PRECONDITION);
    assert_eq!(code(containerd.delete("one", "")), Code::FAILED_PRECONDITION);
    assert_eq!(code(containerd.exec("one", "e", "true", &Streams::default())), Code::FAILED_PRECONDITION);
    answer(containerd.client().resume(context(), &resume)).unwrap();
    assert_eq!(containerd.state("one", "").unwrap().status.unwrap(), Status::RUNNING);
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    let events = containerd.end("one");
    assert_eq!(events[1..4], ["start one", "paused one", "resumed one"]);
}

#[test]
fn figures_limits_sizes_and_numbers_are_answered() {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    let pid = containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    let client = containerd.client();
    let stats = StatsRequest { id: "one".to_owned(), ..Default::default() };
    let stats = answer(client.stats(context(), &stats)).unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    assert_eq!(Metrics::parse_from_bytes(&stats.value).unwrap().memory.usage, 4096);
    let pids = PidsRequest { id: "one".to_owned(), ..Default::default() };
    let pids = answer(client.pids(context(), &pids)).unwrap().processes;
    assert_eq!(pids.iter().map(|process| process.pid).collect::<Vec<_>>(), [pid]);
    let update = |json: &str| {
        let resources = Any { value: json.as_bytes().to_vec(), ..Default::default() };
        let resources = MessageField::some(resources);
        UpdateTaskRequest { id: "one".to_owned(), resources, ..Default::default() }
    };
    answer(client.update(context(), &update(r#"{"memory":{"limit":67108864}}"#))).unwrap();
    let noted = format!("/run/mvm/{}/one/one.limits", containerd.namespace);
    assert!(fs::read_to_string(noted).unwrap().contains("67108864"));
    assert_eq!(code(answer(client.update(context(), &update("{")))), Code::INVALID_ARGUMENT);
    let resize = ResizePtyRequest { id: "one".to_owned(), width: 80, height: 24, ..Default::default() };
    assert_eq!(code(answer(client.resize_pty(context(), &resize))), Code::FAILED_PRECONDITION);
}

#[test]
fn a_kill_for_want_of_memory_is_told_before_the_exit() {
    let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    fs::write(format!("/run/mvm/{}/one/one.kills", containerd.namespace), "2").unwrap();
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    let events = containerd.end("one");
    assert_eq!(events, ["create one", "start one", "oom one", "exit one/one 137", "delete one 137"]);
}

#[test]
fn a_machine_that_does_not_boot_leaves_nothing_and_may_be_tried_again() {
    let mut config = shell("true");
    config["annotations"] = serde_json::json!({"io.mvm.fake.boot": "fail"});
    let mut containerd = Containerd::with_shim("one", &config);
    assert_eq!(code(containerd.create("one", &Streams::default())), Code::UNKNOWN);
    assert_eq!(code(containerd.state("one", "")), Code::NOT_FOUND);
    fs::write(containerd.path("one").join("config.json"), shell("true").to_string()).unwrap();
    containerd.create("one", &Streams::default()).unwrap();
    containerd.delete("one", "").unwrap();
    assert_eq!(containerd.end("one"), ["create one", "delete one 137"]);
}

#[test]
fn a_program_that_is_missing_or_none_fails_the_creation_and_leaves_nothing() {
    let mut containerd = Containerd::with_shim("one", &shell(""));
    for (program, words) in [
        ("no-such-program", "executable file not found in $PATH"),
        ("/no/such/program", "stat /no/such/program: no such file or directory"),
        ("/etc/passwd", "permission denied"),
        ("/etc", "permission denied"),
    ] {
        let mut config = shell("");
        config["process"]["args"] = serde_json::json!([program]);
        fs::write(containerd.path("one").join("config.json"), config.to_string()).unwrap();
        let error = containerd.create("one", &Streams::default()).unwrap_err().to_string();
        assert!(error.contains(program) && error.contains(words), "{error}");
        assert_eq!(code(containerd.state("one", "")), Code::NOT_FOUND);
    }
    assert!(containerd.end("one").is_empty());
}

#[test]
fn a_task_that_cannot_be_started_is_over_and_its_machine_too() {
    let containerd = Containerd::with_shim("one", &shell("true"));
    let stdio = Streams { stdin: "/no/such/fifo".to_owned(), ..Streams::default() };
    let machine = containerd.create("one", &stdio).unwrap();
    assert_eq!(code(containerd.run("one", "")), Code::NOT_FOUND);
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 128);
    assert_eq!(code(containerd.kill("one", "", SIGKILL)), Code::NOT_FOUND);
    // A client that forgets it is left with a record, not with a machine.
    wait_gone(i32::try_from(machine).unwrap());
    containerd.delete("one", "").unwrap();
    assert_eq!(containerd.events(2), ["create one", "delete one 128"]);
}

#[test]
fn two_hundred_tasks_leave_no_descriptor_and_no_thread_behind() {
    let mut containerd = Containerd::with_shim("one", &shell("true"));
    let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", containerd.shim_pid())).unwrap().count();
    let task = || {
        containerd.create("one", &Streams::default()).unwrap();
        containerd.run("one", "").unwrap();
        containerd.wait("one", "").unwrap();
        containerd.delete("one", "").unwrap();
    };
    task();
    let before = count("fd");
    for _ in 0..200 {
        task();
    }
    wait_until("the descriptors are as many as before", || count("fd") <= before);
    wait_until("the threads without work have ended", || count("task") == 1);
    assert_eq!(containerd.events(804).len(), 804);
    containerd.end("one");
}
