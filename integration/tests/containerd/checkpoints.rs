//! Tasks that are saved while they run, and others that go on from there.
//!
//! Ours alone: runc needs a program for it that not every distribution has.

use std::fs;

use mvm_integration::containerd::daemon::GATEWAY;

use crate::context::{Context, Task, Test};
use crate::network::Wired;

pub(crate) const OURS: &[Test] = &[
    ("a_container_goes_on_from_a_checkpoint_with_its_memory_and_its_writes", go_on),
    ("a_container_that_goes_on_has_the_link_that_is_there_then_and_no_execs", network),
];

/// Most bytes that the checkpoint of a shell in a machine of 128 MiB with a disk of 8 GiB takes.
const MOST_BYTES: u64 = 64 << 20;

/// What a shell knows in its memory alone, on demand.
fn secret(task: &Task<'_>) -> String {
    task.kill("SIGUSR1");
    task.sh("while ! test -s /said; do sleep 0.1; done; cat /said; rm /said")
}

fn go_on(context: &Context) {
    let script = "secret=$(cat /proc/sys/kernel/random/uuid); trap 'echo $secret >/said' USR1; \
                  echo kept >/written; echo >/ready; while :; do sleep 0.1; done";
    let task = context.start(&[], script);
    task.sh("while ! test -e /ready; do sleep 0.1; done");
    let known = secret(&task);
    assert_eq!(known.len(), 37, "{known}");

    let name = format!("localhost/mvm/checkpoint:{}", task.id);
    // By another way first, which gives it a name of its own. Not every generation stores the same content twice.
    let other = context.ctr.must(&["task", "checkpoint", &task.id]);
    context.ctr.must(&["images", "rm", "--sync", other.trim()]);
    context.ctr.must(&["containers", "checkpoint", "--task", &task.id, &name]);
    assert_eq!(task.status(), "RUNNING");
    assert_eq!(secret(&task), known, "it goes on");
    task.sh("echo later >/later");
    let id = task.id.clone();
    task.end();
    let told = context.daemon.events().of(&id).into_iter();
    assert_eq!(told.filter(|event| event.topic == "/tasks/checkpointed").count(), 2, "once each");
    let stored = context.daemon.dir.join("root/io.containerd.content.v1.content/blobs/sha256");
    let blobs = fs::read_dir(&stored).expect("the daemon stores content").flatten();
    let largest = blobs.filter_map(|blob| Some(blob.metadata().ok()?.len())).max();
    assert!(largest.is_some_and(|bytes| (1 << 20..MOST_BYTES).contains(&bytes)), "{largest:?} bytes");

    let restored = context.task(context.id());
    context.ctr.must(&["containers", "restore", "--live", &restored.id, &name]);
    assert_eq!(restored.status(), "RUNNING");
    assert_eq!(restored.sh("cat /written; test -e /later || echo nothing"), "kept\nnothing\n");
    assert_eq!(secret(&restored), known);
    restored.end();
    context.ctr.must(&["images", "rm", "--sync", &name]);
    sweep();
}

fn network(context: &Context) {
    let mut wired = Wired::new(context);
    let namespace = format!("network:{}", wired.path());
    let task = context.start(&["--with-ns", &namespace], "while :; do sleep 1; done");
    let addresses = "ip -4 -o addr | awk '$2 != \"lo\" { print $4 }' | cut -d/ -f1";
    assert_eq!(task.sh(addresses), format!("{}\n", wired.address));
    let mut exec = context.ctr.command(&["task", "exec", "--exec-id", "left", &task.id, "sleep", "1000"]);
    let mut exec = exec.spawn().expect("coreutils");
    task.sh("while ! ps | grep 'sleep 100[0]'; do sleep 0.1; done");
    let name = format!("localhost/mvm/checkpoint:{}", task.id);
    context.ctr.must(&["containers", "checkpoint", "--task", &task.id, &name]);
    task.sh(&format!("ping -c 1 {GATEWAY}"));
    task.sh("ps | grep 'sleep 100[0]'");
    task.end();
    exec.wait().expect("it ends with the task");
    let former = wired.address.clone();
    wired.renew();
    assert_ne!(wired.address, former);

    let restored = context.task(context.id());
    context.ctr.must(&["containers", "restore", "--live", &restored.id, &name]);
    assert_eq!(restored.sh(addresses), format!("{}\n", wired.address));
    restored.sh(&format!("ping -c 1 {GATEWAY}"));
    assert_eq!(restored.sh("ps | grep 'sleep 100[0]' || echo none"), "none\n", "nobody is there for it");
    restored.end();
    context.ctr.must(&["images", "rm", "--sync", &name]);
    sweep();
}

/// Removes what containerd itself leaves of a checkpoint that it has unpacked.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir()).expect("a directory for what is temporary").flatten() {
        if entry.file_name().to_string_lossy().starts_with("ctrd-checkpoint") {
            fs::remove_dir_all(entry.path()).expect("it can be removed");
        }
    }
}
