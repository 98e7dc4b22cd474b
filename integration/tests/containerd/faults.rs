//! What breaks: every fault ends in one exit that is told once, a delete that succeeds, and nothing left behind.

use std::process::{Command, Stdio};

use mvm_integration::containerd::Runtime;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::context::{Context, Task, Test};

pub(crate) const TESTS: &[Test] = &[
    ("tasks_survive_a_restart_of_containerd", restarted),
    ("tasks_survive_the_death_of_containerd", died),
    ("a_shim_that_is_killed_takes_its_task_along", shim_killed),
    ("a_task_whose_process_is_killed_ends", process_killed),
    ("deleting_twice_says_that_nothing_is_there", twice),
    ("a_shim_deletes_what_is_not_there", nothing),
];

/// Those that only a machine can have.
pub(crate) const OURS: &[Test] =
    &[("a_guest_that_hangs_is_killed", hung), ("a_full_disk_is_the_containers_trouble", disk_full)];

/// Ends a task whose exit must be told now, once, as that of a kill.
fn ends_once(context: &Context, task: Task<'_>) {
    let id = task.id.clone();
    assert_eq!(task.ended().exit_status(), 137);
    assert_eq!(task.delete(), 137);
    told_once(context, &id);
}

fn told_once(context: &Context, id: &str) {
    let events = context.daemon.events().of(id);
    let exits =
        events.iter().filter(|event| event.topic == "/tasks/exit" && event.process().is_none()).count();
    assert_eq!(exits, 1, "{events:?}");
}

fn restarted(context: &Context) {
    restart(context, Signal::SIGTERM);
}

fn died(context: &Context) {
    restart(context, Signal::SIGKILL);
}

fn restart(context: &Context, signal: Signal) {
    let task = context.start(&[], "echo > /here; exec sleep 1000");
    task.sh("while ! test -e /here; do sleep 0.1; done");
    context.daemon.restart(signal);
    assert_eq!(task.status(), "RUNNING");
    assert_eq!(task.sh("ls /here; cat /proc/1/cmdline | tr '\\0' ' '"), "/here\nsleep 1000 ");
    task.kill("SIGKILL");
    ends_once(context, task);
}

fn shim_killed(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    let shim = shim_of(context, &task.id);
    kill(shim, Signal::SIGKILL).expect("it is ours");
    let id = task.id.clone();
    assert_eq!(task.ended().exit_status(), 137);
    // Newer generations delete such a task themselves, sooner or later.
    let output = context.ctr.call(&["task", "delete", &id]);
    assert!(output.code == Some(0) || output.stderr.contains("not found"), "{}", output.stderr);
    context.ctr.must(&["containers", "rm", &id]);
    told_once(context, &id);
}

fn process_killed(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    kill(task.pid(), Signal::SIGKILL).expect("it is ours");
    ends_once(context, task);
}

fn hung(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    kill(task.pid(), Signal::SIGSTOP).expect("it is ours");
    task.kill("SIGKILL");
    ends_once(context, task);
}

fn disk_full(context: &Context) {
    let script = "dd if=/dev/zero of=/big bs=1M 2>&1; rm /big; echo more > /small && echo alive";
    let text = context.sh(&["--annotation", "io.mvm.upper_size=64M"], script);
    assert!(text.contains("No space left on device") && text.ends_with("alive\n"), "{text}");
}

fn twice(context: &Context) {
    let task = context.start(&[], "exit 0");
    let id = task.id.clone();
    task.ended();
    assert_eq!(task.delete(), 0);
    for words in [["task", "delete", &id], ["containers", "rm", &id]] {
        let output = context.ctr.call(&words);
        assert!(output.stderr.contains("not found"), "{words:?}: {}", output.stderr);
    }
}

/// containerd calls the program this way when a shim is gone; a second call finds nothing at all.
fn nothing(context: &Context) {
    let bundle = tempfile::tempdir().expect("a directory");
    let installation = &context.daemon.installation;
    let dir = match context.runtime {
        Runtime::Runc => installation.programs.clone(),
        Runtime::Mvm => crate::programs().join("bin"),
    };
    let program = dir.join(context.runtime.shim());
    let path = std::env::join_paths([installation.runc.as_path(), "/bin".as_ref(), "/usr/bin".as_ref()])
        .expect("a path");
    let mut command = Command::new(program);
    command.args(["-namespace", "default", "-id", "nothing", "-bundle"]).arg(bundle.path());
    command.arg("-address").arg(context.daemon.socket()).args(["-publish-binary", "/bin/true", "delete"]);
    let output =
        command.env("PATH", path).current_dir(&bundle).stdin(Stdio::null()).output().expect("it runs");
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    // runc's shim wants a bundle that is filled; ours must not.
    if context.runtime == Runtime::Mvm {
        assert!(output.status.success(), "{complaint}");
        assert!(!output.stdout.is_empty(), "no answer: {complaint}");
    }
}

/// The shim that containerd started for a container.
pub(crate) fn shim_of(context: &Context, id: &str) -> Pid {
    Pid::from_raw(context.runtime.shim_of(id).expect("a running shim"))
}
