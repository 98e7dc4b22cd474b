//! Checkpoints: tasks that are saved, and tasks that go on from what was saved.

use std::fs;

use containerd_shim_protos::api::{CheckpointTaskRequest, PauseRequest, ResumeRequest, Status};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::ttrpc::{self, Code};
use nix::libc::{SIGKILL, SIGTERM};

use crate::bundles::shell;
use crate::containerd::Containerd;
use crate::fifos::{Streams, fifo, read_all};
use crate::host::wait_until;
use crate::pods::{join, pod};
use crate::wire::{answer, code, context};

/// A directory for a checkpoint.
fn place(containerd: &Containerd, name: &str) -> String {
    let path = containerd.directory.path().join(name);
    fs::create_dir(&path).unwrap();
    path.display().to_string()
}

fn checkpoint(containerd: &Containerd, id: &str, path: &str, exit: bool) -> ttrpc::Result<Empty> {
    let options = CheckpointOptions { exit, file_locks: true, ..Default::default() };
    let options = Any {
        type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
        value: options.write_to_bytes().unwrap(),
        ..Default::default()
    };
    request(containerd, id, path, Some(options))
}

fn request(containerd: &Containerd, id: &str, path: &str, options: Option<Any>) -> ttrpc::Result<Empty> {
    let request = CheckpointTaskRequest {
        id: id.to_owned(),
        path: path.to_owned(),
        options: options.map_or_else(MessageField::none, MessageField::some),
        ..Default::default()
    };
    answer(containerd.client().checkpoint(context(), &request))
}

fn running(script: &str) -> Containerd {
    let containerd = Containerd::with_shim("one", &shell(script));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    containerd
}

fn status(containerd: &Containerd) -> Status {
    containerd.state("one", "").unwrap().status.unwrap()
}

fn note(path: &str) -> String {
    fs::read_to_string(format!("{path}/note")).unwrap()
}

#[test]
fn a_task_is_saved_goes_on_and_that_is_told() {
    let mut containerd = running("exec sleep 1000");
    let path = place(&containerd, "c");
    request(&containerd, "one", &path, None).unwrap();
    assert_eq!(
        (note(&path), status(&containerd)),
        ("one paused=false terminal=false".into(), Status::RUNNING)
    );
    containerd.kill("one", "", SIGTERM).unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 143);
    containerd.delete("one", "").unwrap();
    let told = format!("checkpointed one to {path}");
    assert_eq!(
        containerd.end("one"),
        ["create one", "start one", &told, "exit one/one 143", "delete one 143"]
    );
}

#[test]
fn a_paused_task_is_saved_and_stays_paused_until_it_is_resumed() {
    let containerd = running("exec sleep 1000");
    let path = place(&containerd, "c");
    let pause = PauseRequest { id: "one".to_owned(), ..Default::default() };
    answer(containerd.client().pause(context(), &pause)).unwrap();
    checkpoint(&containerd, "one", &path, false).unwrap();
    assert_eq!((note(&path), status(&containerd)), ("one paused=true terminal=false".into(), Status::PAUSED));
    let resume = ResumeRequest { id: "one".to_owned(), ..Default::default() };
    answer(containerd.client().resume(context(), &resume)).unwrap();
    assert_eq!(status(&containerd), Status::RUNNING);
}

#[test]
fn a_task_that_is_to_end_with_its_checkpoint_is_stopped_for_it_and_does_not_go_on() {
    let containerd = running("exec sleep 1000");
    let path = place(&containerd, "c");
    checkpoint(&containerd, "one", &path, true).unwrap();
    assert_eq!(note(&path), "one paused=true terminal=false");
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
    let told = format!("checkpointed one to {path}");
    assert_eq!(containerd.events(4), ["create one", "start one", &told, "exit one/one 137"]);
}

#[test]
fn what_does_not_run_is_in_a_pod_or_has_nowhere_to_go_is_refused() {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    let path = place(&containerd, "c");
    let refused = |id: &str, path: &str| code(checkpoint(&containerd, id, path, false));
    assert_eq!(refused("one", &path), Code::NOT_FOUND);
    containerd.create("one", &Streams::default()).unwrap();
    assert_eq!(refused("one", &path), Code::FAILED_PRECONDITION);
    containerd.run("one", "").unwrap();
    for nowhere in ["", "c", "/nonexistent", "/etc/passwd"] {
        assert_eq!(refused("one", nowhere), Code::INVALID_ARGUMENT, "{nowhere}");
    }
    let options = Any { type_url: "containerd.runc.v1.Options".to_owned(), ..Default::default() };
    assert_eq!(code(request(&containerd, "one", &path, Some(options))), Code::INVALID_ARGUMENT);
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    assert_eq!(refused("one", &path), Code::FAILED_PRECONDITION);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);

    let (containerd, _) = pod();
    join(&containerd, "a", "exec sleep 1000");
    let path = place(&containerd, "c");
    for id in ["pod", "a"] {
        let error = checkpoint(&containerd, id, &path, false).unwrap_err();
        assert!(error.to_string().contains("shares its pod's machine"), "{error}");
        assert_eq!(code::<()>(Err(error)), Code::FAILED_PRECONDITION);
    }
}

#[test]
fn a_task_that_cannot_be_saved_goes_on_even_if_it_was_to_end() {
    let containerd = running("exec sleep 1000");
    let path = place(&containerd, "c");
    let fault = format!("/run/mvm/{}/one/checkpoint.fault", containerd.namespace);
    fs::write(&fault, "fail").unwrap();
    for exit in [false, true] {
        assert_eq!(code(checkpoint(&containerd, "one", &path, exit)), Code::UNKNOWN);
        assert_eq!(status(&containerd), Status::RUNNING);
    }
    // It does run, and hears of this.
    containerd.kill("one", "", SIGTERM).unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 143);
    assert_eq!(containerd.events(3), ["create one", "start one", "exit one/one 143"]);
}

#[test]
fn what_a_guest_would_refuse_while_it_is_saved_waits_and_who_kills_does_not() {
    for killed in [false, true] {
        let containerd = running("trap 'exit 5' TERM; while :; do sleep 0.01; done");
        let path = place(&containerd, "c");
        let directory = format!("/run/mvm/{}/one", containerd.namespace);
        let fault = format!("{directory}/checkpoint.fault");
        fs::write(&fault, "wait").unwrap();
        std::thread::scope(|scope| {
            let saving = scope.spawn(|| checkpoint(&containerd, "one", &path, false));
            let waits = format!("{directory}/checkpoint.waits");
            wait_until("the checkpoint is under way", || fs::exists(&waits).unwrap());
            if killed {
                containerd.kill("one", "", SIGKILL).unwrap();
                assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
                let _ = fs::remove_file(&fault);
                let _ = saving.join().unwrap();
                return;
            }
            let sent = scope.spawn(|| containerd.kill("one", "", SIGTERM));
            assert_eq!(status(&containerd), Status::RUNNING);
            fs::remove_file(&fault).unwrap();
            saving.join().unwrap().unwrap();
            sent.join().unwrap().unwrap();
            assert_eq!(containerd.wait("one", "").unwrap().exit_status, 5);
            let events = containerd.events(4);
            assert!(events[2].starts_with("checkpointed"), "{events:?}");
        });
    }
}

#[test]
fn a_task_goes_on_from_a_checkpoint_when_it_is_started() {
    let containerd = running("exec sleep 1000");
    let path = place(&containerd, "c");
    checkpoint(&containerd, "one", &path, false).unwrap();

    let mut other = Containerd::with_shim("two", &shell("echo from $RESTORED_FROM; exit 6"));
    let streams = Streams { stdout: fifo(&other, "out"), ..Default::default() };
    let output = read_all(&streams.stdout);
    let pid = other.restore("two", &streams, &path).unwrap();
    let state = other.state("two", "").unwrap();
    assert_eq!((state.status.unwrap(), state.pid), (Status::CREATED, pid));
    assert_eq!(other.run("two", "").unwrap(), pid);
    assert_eq!(other.wait("two", "").unwrap().exit_status, 6);
    other.delete("two", "").unwrap();
    assert_eq!(output.join().unwrap(), b"from one paused=false terminal=false\n");
    assert_eq!(other.end("two"), ["create two", "start two", "exit two/two 6", "delete two 6"]);
}

#[test]
fn a_restored_task_that_is_never_started_can_be_killed_or_just_deleted() {
    let origin = running("exec sleep 1000");
    let path = place(&origin, "c");
    checkpoint(&origin, "one", &path, false).unwrap();
    for killed in [true, false] {
        let mut containerd = Containerd::with_shim("two", &shell("exit 0"));
        containerd.restore("two", &Streams::default(), &path).unwrap();
        if killed {
            containerd.kill("two", "", SIGKILL).unwrap();
            assert_eq!(containerd.wait("two", "").unwrap().exit_status, 137);
        }
        assert_eq!(containerd.delete("two", "").unwrap().exit_status, 137);
        containerd.end("two");
    }
}

#[test]
fn a_checkpoint_that_is_none_or_does_not_fit_makes_no_task_and_leaves_nothing() {
    let mut containerd = Containerd::with_shim("one", &shell("exit 0"));
    let path = place(&containerd, "c");
    assert_eq!(code(containerd.restore("one", &Streams::default(), &path)), Code::UNKNOWN);
    fs::write(format!("{path}/note"), "elsewhere").unwrap();
    let error = containerd.restore("one", &Streams::default(), &path).unwrap_err();
    assert!(error.to_string().contains("another processor"), "{error}");
    assert_eq!(code::<()>(Err(error)), Code::FAILED_PRECONDITION);
    assert_eq!(code(containerd.state("one", "")), Code::NOT_FOUND);
    // It may be tried again.
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 0);
    containerd.delete("one", "").unwrap();
    assert_eq!(containerd.end("one").len(), 4);

    let (containerd, _) = pod();
    containerd.bundle("a", &crate::bundles::in_pod(shell("exit 0"), "container", "pod"));
    let refused = containerd.restore("a", &Streams::default(), &path);
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
}
