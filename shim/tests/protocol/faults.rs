//! What is left when something dies, and who is told.

use std::fs;
use std::path::Path;

use containerd_shim_protos::ttrpc::Code;
use nix::libc::SIGKILL;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bundles::shell;
use crate::containerd::Containerd;
use crate::fifos::{Streams, fifo, read_all};
use crate::host::{children, is_alive, wait_gone, wait_until};
use crate::wire::code;

fn running() -> (Containerd, i32) {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    let machine = containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    (containerd, i32::try_from(machine).unwrap())
}

#[test]
fn a_machine_that_dies_ends_its_task_once_with_137() {
    let (mut containerd, machine) = running();
    kill(Pid::from_raw(machine), Signal::SIGKILL).unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
    assert_eq!(code(containerd.kill("one", "", SIGKILL)), Code::NOT_FOUND);
    assert_eq!(containerd.delete("one", "").unwrap().exit_status, 137);
    assert_eq!(code(containerd.delete("one", "")), Code::NOT_FOUND);
    let events = containerd.end("one");
    assert_eq!(events, ["create one", "start one", "exit one/one 137", "delete one 137"]);
}

#[test]
fn output_is_not_lost_with_the_machine() {
    let containerd = Containerd::with_shim("one", &shell("echo said; exec sleep 1000"));
    let stdio = Streams { stdout: fifo(&containerd, "out"), ..Streams::default() };
    let out = read_all(&stdio.stdout);
    let machine = containerd.create("one", &stdio).unwrap();
    containerd.run("one", "").unwrap();
    kill(Pid::from_raw(i32::try_from(machine).unwrap()), Signal::SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    let said = out.join().unwrap();
    assert!(said.is_empty() || said == b"said\n", "{said:?}");
}

#[test]
fn what_a_killed_shim_leaves_is_removed_by_delete_however_often() {
    let (containerd, machine) = running();
    let shim = containerd.shim_pid();
    let socket = containerd.address.trim_start_matches("unix://").to_owned();
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    wait_gone(shim);
    for _ in 0..2 {
        let response = containerd.delete_binary("one");
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.is_some());
        assert!(!is_alive(machine), "the machine is left");
        assert!(!Path::new(&socket).exists(), "the socket is left");
        assert!(!Path::new("/run/mvm").join(&containerd.namespace).exists(), "the directory is left");
    }
}

#[test]
fn a_shim_that_containerd_could_not_reach_goes_with_its_task() {
    let (containerd, machine) = running();
    let shim = containerd.shim_pid();
    assert_eq!(containerd.delete_binary("one").exit_status, 137);
    assert!(!is_alive(shim) && !is_alive(machine));
    assert!(!Path::new(containerd.address.trim_start_matches("unix://")).exists(), "the socket is left");
    assert!(!Path::new("/run/mvm").join(&containerd.namespace).exists(), "the directory is left");
}

#[test]
fn a_shim_without_a_task_goes_with_its_bundle() {
    let containerd = Containerd::with_shim("one", &shell("true"));
    containerd.delete_binary("one");
    assert!(!is_alive(containerd.shim_pid()));
}

#[test]
fn delete_of_what_never_was_succeeds() {
    let containerd = Containerd::new();
    containerd.bundle("one", &shell("true"));
    assert_eq!(containerd.delete_binary("one").exit_status, 137);
    fs::write(containerd.path("one").join("mvm.json"), "{ no record").unwrap();
    assert_eq!(containerd.delete_binary("one").exit_status, 137);
}

#[test]
fn delete_touches_no_directory_that_is_no_machines() {
    let containerd = Containerd::new();
    containerd.bundle("one", &shell("true"));
    let precious = containerd.path("precious");
    fs::create_dir(&precious).unwrap();
    let sneaky = format!("/run/mvm/../..{}", precious.display());
    for directory in [precious.display().to_string(), sneaky] {
        let record = serde_json::json!({"directory": directory, "socket": "/x",
            "daemon": {"pid": 0, "started": 0}, "machine": null});
        fs::write(containerd.path("one").join("mvm.json"), record.to_string()).unwrap();
        containerd.delete_binary("one");
        assert!(precious.exists(), "{directory}");
    }
}

#[test]
fn events_wait_for_a_containerd_that_is_down_and_keep_their_order() {
    let (mut containerd, _) = running();
    containerd.events(2);
    containerd.go_down();
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    containerd.take_events();
    let events = containerd.events(4);
    assert_eq!(events[2..], ["exit one/one 137", "delete one 137"]);
    containerd.end("one");
}

#[test]
fn an_orphan_is_reaped() {
    let (containerd, _) = running();
    // The shell ends first: its child becomes the shim's, which must not keep the corpse.
    let shim = containerd.shim_pid();
    let before = children(shim);
    assert_eq!(before.len(), 2, "the machine and the task");
    containerd.exec("one", "e", "sleep 1000 & exit 0", &Streams::default()).unwrap();
    containerd.run("one", "e").unwrap();
    containerd.wait("one", "e").unwrap();
    let new: Vec<_> = children(shim).into_iter().filter(|pid| !before.contains(pid)).collect();
    let [orphan] = new[..] else { panic!("the orphan alone is new: {new:?}") };
    kill(Pid::from_raw(orphan), Signal::SIGKILL).unwrap();
    wait_until("the orphan is gone", || !children(shim).contains(&orphan));
}

#[test]
fn a_containerd_that_hangs_holds_up_nothing_but_its_events() {
    let (mut containerd, _) = running();
    containerd.events(2);
    containerd.go_down();
    let hung = containerd.hang();
    // Long enough for the shim to have found out.
    for number in 0..20 {
        let exec = format!("e{number}");
        containerd.exec("one", &exec, "exit 4", &Streams::default()).unwrap();
        containerd.run("one", &exec).unwrap();
        assert_eq!(containerd.wait("one", &exec).unwrap().exit_status, 4);
        containerd.delete("one", &exec).unwrap();
    }
    drop(hung);
    containerd.take_events();
    let events = containerd.events(2 + 20 * 3);
    for (number, events) in events[2..].chunks(3).enumerate() {
        let exec = format!("one/e{number}");
        let told = [format!("exec-added {exec}"), format!("exec-started {exec}"), format!("exit {exec} 4")];
        assert_eq!(events, told);
    }
}
