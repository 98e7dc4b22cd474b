//! What breaks: every fault ends in one exit that is told once, a delete that succeeds, and nothing left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mvm_integration::containerd::{BUSYBOX, Runtime};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
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
pub(crate) const OURS: &[Test] = &[
    ("a_guest_that_hangs_is_killed", hung),
    ("a_full_disk_is_the_containers_trouble", disk_full),
    ("a_full_disk_of_the_host_is_the_containers_trouble", host_full),
];

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
    let before = shim_sockets();
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
    // With runc, containerd leaves the socket of a shim that was killed. Ours must be gone.
    if context.runtime == Runtime::Runc {
        shim_sockets().difference(&before).for_each(|path| drop(fs::remove_file(path)));
    }
}

/// Sockets of containerd's own shims.
fn shim_sockets() -> BTreeSet<PathBuf> {
    fs::read_dir("/run/containerd/s").into_iter().flatten().flatten().map(|entry| entry.path()).collect()
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

/// The disk that a container writes to is a file of the host's, which holds less than it seems to.
fn host_full(context: &Context) {
    let id = context.id();
    context.ctr.must(&[
        "containers",
        "create",
        "--runtime",
        context.runtime.id(),
        BUSYBOX,
        &id,
        "sleep",
        "1000",
    ]);
    let mounts = context.ctr.must(&["snapshots", "mounts", "/nowhere", &id]);
    let upper = mounts.split([',', ' ']).find_map(|word| word.strip_prefix("upperdir=")).expect("an overlay");
    let directory = Path::new(upper).parent().expect("a snapshot's directory");
    let _small = SmallDisk::over(directory, &["fs", "work"]);
    context.ctr.must(&["task", "start", "-d", "--null-io", &id]);
    let task = context.task(id);
    let output = task.exec(&["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=64", "conv=fsync"]);
    assert_ne!(output.code, Some(0), "the host had no room for it");
    assert_eq!(task.sh("echo alive"), "alive\n");
    assert_eq!(context.sh(&[], "echo > /file && echo others do"), "others do\n");
    task.kill("SIGKILL");
    ends_once(context, task);
}

/// A directory with little room, until it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn over(directory: &Path, inside: &[&str]) -> Self {
        mount(Some("mvm-test"), directory, Some("tmpfs"), MsFlags::empty(), Some("size=24m"))
            .expect("root's");
        inside.iter().for_each(|name| fs::create_dir(directory.join(name)).expect("there is room"));
        Self(directory.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
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
