//! Machines that are held to rates.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use mvm_integration::vm::{image, scratch};

use crate::Test;

pub(crate) const TESTS: &[Test] =
    &[("a_machine_is_held_to_its_limits_and_they_change_while_it_runs", limited)];

fn mvm(arguments: &[&str]) -> Command {
    let mut command = crate::mvm();
    command.env("MVM_RUN", scratch().join("limits-run")).args(arguments);
    command
}

fn done(mut command: Command) -> Output {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    output
}

/// Writes so much through to the disk of a container's writes.
fn write(kib: u32) -> Command {
    let script = format!("dd if=/dev/zero of=/written bs=64k count={} conv=fsync", kib / 64);
    mvm(&["exec", "limited", "--", "sh", "-c", &script])
}

fn limited() {
    let root = image().display().to_string();
    let run = [
        "run",
        "--detach",
        "--name",
        "limited",
        "--disk-size",
        "64M",
        "--limit",
        "disk-write=1M,net-send=5ops",
    ];
    done(mvm(&[&run[..], &[&root, "--", "sleep", "3600"]].concat()));
    done(write(64)); // what the file system writes for the first time
    done(mvm(&["update", "--limit", "disk-write=64K:64K", "limited"]));
    let begun = Instant::now();
    done(write(256));
    assert!(
        begun.elapsed() > Duration::from_secs(2),
        "256 KiB of which 64 are free took {:?}",
        begun.elapsed()
    );

    // At this rate it would take two minutes.
    let begun = Instant::now();
    let mut writing = write(8192).spawn().expect("it starts");
    done(mvm(&["update", "--limit", "disk-write=none", "limited"]));
    assert!(writing.wait().expect("it ends").success());
    assert!(begun.elapsed() < Duration::from_secs(100), "{:?}", begun.elapsed());

    done(mvm(&["rm", "--force", "limited"]));
    let gone = mvm(&["update", "--limit", "disk-write=none", "limited"]).output().expect("it starts");
    assert_eq!(gone.status.code(), Some(1), "{gone:?}");
}
