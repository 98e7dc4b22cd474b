//! Signals, pauses, figures and events.

use mvm_integration::containerd::Runtime;
use serde_json::Value;

use crate::context::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    ("a_signal_reaches_the_process", signal),
    ("kill_ends_a_process_that_ignores_the_rest", kill),
    ("killing_what_has_ended_says_so", kill_twice),
    ("a_paused_container_stands_still_until_it_is_resumed", pause),
    ("metrics_tell_memory_and_processes", metrics),
    ("events_come_in_order_and_once", events),
    ("a_limit_of_memory_ends_a_container_and_is_published", out_of_memory),
    ("a_container_that_ended_can_be_asked_until_it_is_deleted", ended),
];

fn signal(context: &Context) {
    let task = context.start(&[], "trap 'exit 9' USR1; echo > /ready; while :; do sleep 0.1; done");
    task.sh("while ! test -e /ready; do sleep 0.1; done");
    task.kill("SIGUSR1");
    assert_eq!(task.ended().exit_status(), 9);
    assert_eq!(task.delete(), 9);
}

fn kill(context: &Context) {
    let task = context.start(&[], "trap '' TERM; while :; do sleep 1; done");
    task.kill("SIGTERM");
    assert_eq!(task.status(), "RUNNING");
    task.kill("SIGKILL");
    assert_eq!(task.ended().exit_status(), 137);
    assert_eq!(task.delete(), 137);
}

fn kill_twice(context: &Context) {
    let task = context.start(&[], "exit 0");
    task.ended();
    let output = context.ctr.call(&["task", "kill", "-s", "SIGKILL", &task.id]);
    assert!(
        output.stderr.contains("not found") || output.stderr.contains("already finished"),
        "{}",
        output.stderr
    );
    assert_eq!(task.delete(), 0);
}

fn pause(context: &Context) {
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("log");
    let uri = format!("file://{}", log.display());
    let task = context.start_with(&["--log-uri", &uri], "while :; do echo tick; sleep 0.05; done");
    context.ctr.must(&["task", "pause", &task.id]);
    task.event("/tasks/paused");
    assert_eq!(task.status(), "PAUSED");
    let length = || std::fs::metadata(&log).map_or(0, |metadata| metadata.len());
    // Another container's whole life is time enough: first for what was written before to arrive, then to write.
    context.sh(&[], "true");
    let before = length();
    context.sh(&[], "sleep 1");
    assert_eq!(length(), before, "it ran on");
    context.ctr.must(&["task", "resume", &task.id]);
    task.event("/tasks/resumed");
    assert_eq!(task.status(), "RUNNING");
    context.sh(&[], "sleep 1");
    assert!(length() > before, "it still stands");
    task.end();
}

fn metrics(context: &Context) {
    let task = context.start(&[], "sleep 1000 & echo > /ready; exec sleep 1001");
    task.sh("while ! test -e /ready; do sleep 0.1; done");
    let text = context.ctr.must(&["task", "metrics", "--format", "json", &task.id]);
    let figures: Value = serde_json::from_str(&text).expect("JSON");
    let at_least = |path: &str, least: u64| {
        let value = figures.pointer(path).unwrap_or_else(|| panic!("no {path}: {text}"));
        let number = value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0);
        assert!(number >= least, "{path} is {value}");
    };
    at_least("/pids/current", 2);
    at_least("/memory/usage", 4096);
    at_least("/cpu/usage_usec", 1);
    task.end();
}

fn events(context: &Context) {
    // Not ended by a process beside it, which would be killed with it if it were still there.
    let task = context.start(&[], "trap 'exit 2' USR1; echo > /ready; while :; do sleep 0.1; done");
    task.sh("while ! test -e /ready; do sleep 0.1; done");
    task.sh("exit 0");
    task.kill("SIGUSR1");
    task.ended();
    let id = task.id.clone();
    assert_eq!(task.delete(), 2);
    let seen: Vec<_> = context
        .daemon
        .events()
        .of(&id)
        .into_iter()
        .map(|event| {
            let whose = if event.process().is_some() { " exec" } else { "" };
            format!("{}{whose}", event.topic)
        })
        .filter(|topic| topic.starts_with("/tasks/"))
        .collect();
    let exec = ["/tasks/exec-added exec", "/tasks/exec-started exec", "/tasks/exit exec"];
    let mut expected = vec!["/tasks/create", "/tasks/start"];
    expected.extend([exec, exec].concat());
    expected.push("/tasks/exit");
    // Deleting an exec is told by some generations only, and runc's shim may end before it has told its own end.
    let seen: Vec<_> =
        seen.iter().map(String::as_str).filter(|topic| *topic != "/tasks/delete exec").collect();
    if context.runtime == Runtime::Mvm || seen.last() == Some(&"/tasks/delete") {
        expected.push("/tasks/delete");
    }
    assert_eq!(seen, expected);
}

fn out_of_memory(context: &Context) {
    // What `tail` keeps of zeroes has no end.
    let task = context.start(&["--memory-limit", "33554432"], "tail /dev/zero; exit 0");
    task.event("/tasks/oom");
    task.ended();
    // The kernel picks the shell or what it started.
    let status = task.delete();
    assert!(status == 0 || status == 137, "{status}");
}

fn ended(context: &Context) {
    let task = context.start(&[], "exit 12");
    task.ended();
    assert_eq!(task.status(), "STOPPED");
    let info: Value =
        serde_json::from_str(&context.ctr.must(&["containers", "info", &task.id])).expect("JSON");
    assert_eq!(info["Runtime"]["Name"], context.runtime.id());
    let output = task.exec(&["true"]);
    assert_ne!(output.code, Some(0), "a process joined a container that has ended");
    assert_eq!(task.delete(), 12);
}
