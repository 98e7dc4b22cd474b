//! Containers that are left running: one from its start to its removal, and many.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use mvm_integration::vm::{image, scratch};
use serde_json::{Value, json};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_container_that_is_left_running_is_listed_executed_in_stopped_and_removed", detached),
    ("a_herd_is_started_measured_drawn_and_removed", herd),
    ("a_herd_that_cannot_start_says_why", refused),
];

/// The `mvm` under test, whose containers no other test lists.
fn command(home: &str) -> Command {
    let mut command = crate::mvm();
    command.env("MVM_RUN", scratch().join(home));
    command
}

fn herd() {
    let plot = scratch().join("herd.svg");
    let counted = ["density", "--count", "4", "--parallel", "2", "--hold", "1", "--format", "json", "--plot"];
    let output = command("herd-run").args(counted).arg(&plot).output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["asked"], &report["started"]), (&4.into(), &4.into()), "{report}");
    let numbers: Vec<_> =
        report["starts"].as_array().expect("a list").iter().map(|it| &it["number"]).collect();
    assert_eq!(numbers, [1, 2, 3, 4], "{report}");
    assert_eq!(report["left"], json!([]), "{report}");
    let own = report["memory"]["guest_private_kib"].as_f64().expect("a number");
    assert!(own > 1000.0 && own < 20_000.0, "machines made of a template: {report}");
    // Other tests use this host's memory at the same time: what all of it holds and keeps says nothing here.
    let tables = &report["memory"]["kernel"]["page_tables_kib"];
    assert!(tables.is_number() && report["kept_kib"].is_i64(), "{report}");
    let drawn = std::fs::read_to_string(plot).expect("a drawing");
    assert_eq!(drawn.matches("<circle").count(), 8);
    let listed = command("herd-run").args(["ps", "--all", "--format", "json"]).output().expect("it starts");
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!(listed, json!([]), "nothing of the herd is left");
}

fn refused() {
    let none = ["density", "--count", "2", "--image", "/no/such/image"];
    let output = command("herd-run").args(none).output().expect("it starts");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/no/such/image") && said.contains("because:"), "{said}");
}

/// The life of a container that is left running, command by command.
fn detached() {
    let mvm = |args: &[&str]| {
        let output = command("detached-run").args(args).output().expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let root = image().display().to_string();
    let script = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let (code, id, said) =
        mvm(&["run", "--detach", "--name", "left", "--label", "a=b", &root, "--", "sh", "-c", script]);
    assert_eq!((code, id.trim().len()), (Some(0), 12), "{said}");
    let (_, listed, _) = mvm(&["ps", "--format", "json"]);
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!((&listed[0]["name"], &listed[0]["labels"]["a"]), (&"left".into(), &"b".into()), "{listed}");
    assert_eq!(mvm(&["exec", "left", "--", "sh", "-c", "hostname; exit 3"]).0, Some(3));
    ready("left");
    // Time enough to end by itself on any host: a process that is made to end has another code.
    assert_eq!(mvm(&["stop", "--time", "120", "left"]).0, Some(0));
    let (_, found, _) = mvm(&["inspect", "left"]);
    let found: Value = serde_json::from_str(&found).expect("JSON");
    assert_eq!(
        (&found[0]["condition"]["state"], &found[0]["condition"]["code"]),
        (&"exited".into(), &7.into())
    );
    assert_eq!(mvm(&["logs", "left"]).1, "ready\nasked\n");
    assert_eq!(mvm(&["rm", "left"]).0, Some(0));
    assert_eq!(mvm(&["inspect", "left"]).0, Some(125));
}

/// Waits until the container says that it is ready.
fn ready(name: &str) {
    let follow = command("detached-run").args(["logs", "--follow", name]).stdout(Stdio::piped()).spawn();
    let mut follow = follow.expect("it starts");
    let mut line = String::new();
    BufReader::new(follow.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    assert_eq!(line, "ready\n");
    follow.kill().and_then(|()| follow.wait()).expect("it follows still");
}
