//! How a shim is started, found again and told to end.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use containerd_shim_protos::api::{ConnectRequest, ConnectResponse};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::ttrpc::{Code, Request};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use nix::libc::SIGKILL;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bundles::{in_pod, shell};
use crate::containerd::{Containerd, SHIM};
use crate::fifos::Streams;
use crate::host::wait_gone;
use crate::wire::{answer, code};

#[test]
fn the_answer_is_an_address_and_nothing_else_and_the_bundle_knows_it() {
    let mut containerd = Containerd::new();
    containerd.bundle("one", &shell("true"));
    // `start` reads to the end of its output: a daemon that held it would hang here.
    containerd.start_shim("one");
    let path = containerd.address.strip_prefix("unix://").unwrap();
    assert!(path.len() < 108, "{path}");
    assert_eq!(fs::read_to_string(containerd.path("one").join("address")).unwrap(), containerd.address);
    containerd.end("one");
}

#[test]
fn the_daemon_is_on_its_own_and_holds_nobodys_streams() {
    let mut containerd = Containerd::with_shim("one", &shell("true"));
    let pid = containerd.shim_pid();
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(target.to_str().unwrap(), "/dev/null");
    }
    assert_eq!(nix::unistd::getsid(Some(Pid::from_raw(pid))).unwrap().as_raw(), pid);
    let score = |pid: &str| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    let ours: i32 = score("self").trim().parse().unwrap();
    assert_eq!(score(&pid.to_string()).trim(), (ours + 1).min(1000).to_string());
    containerd.end("one");
}

#[test]
fn options_of_the_runtime_are_read_and_change_no_answer() {
    let mut containerd = Containerd::new();
    containerd.bundle("one", &shell("true"));
    let options = Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value: b"\x0a\x03abc".to_vec(),
        ..Default::default()
    };
    let answer = start_with(&containerd, &options.write_to_bytes().unwrap());
    containerd.address = String::from_utf8(answer).unwrap();
    containerd.connect();
    containerd.end("one");
}

#[test]
fn bootstrap_parameters_get_a_result_and_say_where_events_go() {
    let mut containerd = Containerd::new();
    containerd.bundle("one", &shell("true"));
    let sockets = containerd.directory.path().join("s");
    let params = BootstrapParams {
        instance_id: "one".to_owned(),
        namespace: containerd.namespace.clone(),
        containerd_ttrpc_address: containerd.directory.path().join("ttrpc").display().to_string(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let answer = start_with(&containerd, &params.write_to_bytes().unwrap());
    let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert!(result.address.starts_with(&format!("unix://{}", sockets.display())), "{}", result.address);
    containerd.address = result.address;
    containerd.connect();
    containerd.create("one", &Streams::default()).unwrap();
    assert_eq!(containerd.events(1), ["create one"]);
    containerd.delete("one", "").unwrap();
    containerd.end("one");
}

/// Runs `start` with this input and no events address in its environment.
fn start_with(containerd: &Containerd, input: &[u8]) -> Vec<u8> {
    let mut command = containerd.command("one", &["start"]);
    command.env_remove("TTRPC_ADDRESS").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    output.stdout
}

#[test]
fn starts_of_one_pod_at_once_give_one_daemon() {
    let mut containerd = Containerd::new();
    containerd.bundle("pod", &in_pod(shell("true"), "sandbox", "pod"));
    for id in ["a", "b", "c", "d"] {
        containerd.bundle(id, &in_pod(shell("true"), "container", "pod"));
    }
    let addresses: Vec<String> = std::thread::scope(|scope| {
        let starts = ["pod", "a", "b", "c", "d"].map(|id| {
            let containerd = &containerd;
            scope.spawn(move || containerd.start(id))
        });
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert!(addresses.iter().all(|address| *address == addresses[0]), "{addresses:?}");
    containerd.address = addresses[0].clone();
    containerd.connect();
    containerd.end("pod");
}

#[test]
fn both_versions_of_the_task_service_are_served() {
    let mut containerd = Containerd::with_shim("one", &shell("true"));
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let client = answer(Client::connect(&containerd.address)).unwrap();
        let request = Request {
            service: service.to_owned(),
            method: "Connect".to_owned(),
            payload: ConnectRequest::default().write_to_bytes().unwrap(),
            timeout_nano: 5_000_000_000,
            ..Default::default()
        };
        let response = answer(client.request(request)).unwrap();
        let response = ConnectResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!(i32::try_from(response.shim_pid).unwrap(), containerd.shim_pid());
    }
    containerd.end("one");
}

#[test]
fn a_shim_ends_on_a_signal_only_without_containers() {
    let containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    let pid = containerd.shim_pid();
    containerd.create("one", &Streams::default()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
    containerd.run("one", "").unwrap();
    containerd.kill("one", "", SIGKILL).unwrap();
    containerd.wait("one", "").unwrap();
    containerd.delete("one", "").unwrap();
    // A signal that came too early is not kept, unlike a shutdown.
    assert_eq!(code(containerd.state("one", "")), Code::NOT_FOUND);
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    wait_gone(pid);
}

#[test]
fn a_new_start_of_the_same_task_gets_a_new_daemon_at_once() {
    let mut containerd = Containerd::with_shim("one", &shell("true"));
    for _ in 0..10 {
        let before = containerd.shim_pid();
        containerd.shutdown("one").unwrap();
        containerd.start_shim("one");
        assert_ne!(containerd.shim_pid(), before);
        wait_gone(before);
    }
    containerd.end("one");
}

#[test]
fn a_restarted_containerd_finds_its_task_by_the_address() {
    let mut containerd = Containerd::with_shim("one", &shell("exec sleep 1000"));
    containerd.create("one", &Streams::default()).unwrap();
    containerd.run("one", "").unwrap();
    containerd.client = None;
    containerd.go_down();
    containerd.take_events();
    containerd.address = fs::read_to_string(containerd.path("one").join("address")).unwrap();
    containerd.connect();
    containerd.kill("one", "", SIGKILL).unwrap();
    assert_eq!(containerd.wait("one", "").unwrap().exit_status, 137);
    containerd.delete("one", "").unwrap();
    let events = containerd.events(4);
    assert_eq!(events, ["create one", "start one", "exit one/one 137", "delete one 137"]);
    containerd.end("one");
}

#[test]
fn a_bundle_that_makes_no_sense_fails_the_start_with_a_reason() {
    let containerd = Containerd::new();
    let bundle = containerd.bundle("one", &shell("true"));
    fs::write(bundle.join("config.json"), "{").unwrap();
    let output = containerd.command("one", &["start"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("config.json"), "{output:?}");
}

#[test]
fn the_runtime_describes_itself() {
    let output = std::process::Command::new(SHIM).arg("-info").stdin(Stdio::null()).output().unwrap();
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.mvm.v2");
    assert_eq!(info.annotations["containerd.io/runtime-allow-mounts"], "mkdir/*,format/*,erofs");
    let output = std::process::Command::new(SHIM).arg("-v").output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains(env!("CARGO_PKG_VERSION")));
}
