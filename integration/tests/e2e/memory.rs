//! Memory that is given to a machine while it runs, and taken back.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use mvm_integration::vm::{PATIENCE, initrd, scratch, state};
use mvm_runtime::machine::{Disk, Snapshot};
use mvm_runtime::sandbox::MachineLauncher;
use mvm_runtime::snapshot::{Going, SavedMachine};
use mvm_runtime::template::{Choice, Maker};
use mvm_vmm::control::{Answer, Client, Memory, Request};
use nix::unistd::{Whence, lseek};
use serde_json::json;

use crate::sandbox::{Fixture, PIPES, bundle, shell, unwrap};
use crate::{Test, mvm, programs};

pub(crate) const TESTS: &[Test] = &[
    ("a_machine_is_given_memory_that_its_guest_uses_and_gives_back", plugged_and_unplugged),
    ("a_machines_memory_follows_the_limit_of_its_container", follows),
    ("a_machine_goes_on_with_the_memory_that_it_was_given_and_is_given_more", goes_on),
];

/// Lines of a console become commands.
const SHELL: &str = "stty -echo; echo up; while read -r line; do eval \"$line\"; echo \"done $?\"; done";
/// Kibibytes of a mebibyte.
const MIB: u64 = 1024;

/// A machine of 128 MiB, and 1024 more at most, whose console is a shell.
struct Machine {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    control: Client,
}

impl Machine {
    fn boot(sockets: &Path) -> Self {
        let mut command = mvm();
        command.arg("boot").arg("--kernel").arg(programs().join("share/mvm/vmlinux"));
        command.arg("--initrd").arg(initrd("memory", SHELL)).arg("--console").arg("--sockets").arg(sockets);
        let cmdline = format!("{} panic=-1", mvm_runtime::container::CMDLINE);
        command.args(["--device", r#"{"type":"mem","size_mib":1024}"#, "--cmdline", &cmdline]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("mvm is built");
        let input = child.stdin.take().expect("asked for");
        let mut output = BufReader::new(child.stdout.take().expect("asked for"));
        let mut line = String::new();
        while line.trim() != "up" {
            line.clear();
            assert_ne!(output.read_line(&mut line).expect("a console"), 0, "it comes up");
        }
        let control = Client::connect(&sockets.join("control.sock")).expect("the machine listens");
        Self { child, input, output, control }
    }

    /// What a shell command prints; it must succeed.
    fn sh(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").expect("it listens");
        let mut text = String::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).expect("a console"), 0, "it lives: {text}");
            match line.trim_end().strip_prefix("done ") {
                Some(code) => {
                    assert_eq!(code, "0", "{command}: {text}");
                    return text;
                }
                None => text.push_str(&line),
            }
        }
    }

    /// MiB that `free` shows.
    fn total(&mut self) -> u64 {
        let text = self.sh("free -m | grep Mem | awk '{print $2}'");
        text.trim().parse().unwrap_or_else(|_| panic!("{text:?}"))
    }

    /// Waits until `free` shows so many: Linux plugs memory first and puts it to use then.
    fn wait_for_total(&mut self, mib: u64) {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.total() {
                total if total == mib => return,
                total => assert!(Instant::now() < end, "{total} and not {mib} MiB"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn memory(&mut self, size_mib: Option<u64>) -> Memory {
        match self.control.call(&Request::Memory { size_mib }).expect("the machine answers") {
            Answer::Memory(memory) => memory,
            other => panic!("{other:?}"),
        }
    }

    /// Has the machine have so much, once its driver is through.
    fn resize(&mut self, size_mib: u64) {
        self.memory(Some(size_mib));
        let end = Instant::now() + PATIENCE;
        loop {
            let now = self.memory(None);
            if now.plugged_mib == now.size_mib {
                return assert_eq!(now.size_mib, size_mib);
            }
            assert!(Instant::now() < end, "{now:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has the machine have so much, and waits until no more than `rest` MiB are left of what it is to give back: the
    /// kernel may have put something of its own there.
    fn give_back(&mut self, size_mib: u64, rest: u64) {
        self.memory(Some(size_mib));
        let end = Instant::now() + PATIENCE;
        while self.memory(None).plugged_mib > size_mib + rest {
            assert!(Instant::now() < end, "{:?}", self.memory(None));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// KiB that the machine's process has of its own.
    fn held(&mut self) -> u64 {
        match self.control.call(&Request::Info).expect("the machine answers") {
            Answer::Info(info) => held_by(info.pid),
            other => panic!("{other:?}"),
        }
    }
}

/// KiB that a process has of its own.
fn held_by(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a figure");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn plugged_and_unplugged() {
    let sockets = scratch().join("memory");
    std::fs::create_dir_all(&sockets).expect("a directory");
    let mut machine = Machine::boot(&sockets);
    let booted = machine.total();
    assert!((90..128).contains(&booted), "{booted} MiB");

    // Part of a block of Linux: the rest of it stays out of use.
    machine.resize(128 + 130);
    machine.wait_for_total(booted + 130);
    machine.resize(128 + 512);
    machine.wait_for_total(booted + 512);
    let before = machine.held();
    assert!(before < 60 * MIB, "what is plugged costs nothing but its page structures: {before} KiB");
    machine.sh("mkdir /m && mount -t tmpfs -o size=450m full /m && dd if=/dev/urandom of=/m/x bs=1M count=1");
    machine.sh("for n in $(seq 400); do cat /m/x; done >/m/y && rm /m/x && stat -c %s /m/y | grep 419430400");
    let full = machine.held();
    assert!(full - before >= 400 * MIB, "{before} to {full} KiB");
    machine.sh("rm /m/y && umount /m");

    machine.give_back(128, 512 / 10);
    let after = machine.held();
    assert!(full.saturating_sub(after) * 10 >= (full - before) * 9, "{before}, {full} and {after} KiB");
    machine.resize(128 + 1024);
    machine.wait_for_total(booted + 1024);
    let refused = machine.control.call(&Request::Memory { size_mib: Some(128 + 1025) });
    assert!(refused.unwrap_err().to_string().contains("at most 1152 MiB"));
    writeln!(machine.input, "poweroff -f").expect("it listens");
    assert_eq!(machine.child.wait().expect("it ends").code(), Some(0));
}

/// Machines that boot, and those of a template, are 128 MiB large and have no device for more until they need it.
fn follows() {
    for (name, template) in [("follows-booted", Choice::Never), ("follows-cloned", Choice::Always)] {
        let (bundle, spec) = bundle(name, |spec| {
            spec["annotations"] = json!({"io.mvm.upper_size": "0"});
            spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        });
        let launcher =
            MachineLauncher { state: state(), template, maker: Maker::Thread, ..Default::default() };
        let fixture = Fixture::launch(&launcher, &spec, false);
        fixture.create("c", &bundle, &spec);
        unwrap(fixture.sandbox.start("c", &shell(&spec, "exec sleep 10000"), PIPES));
        let limit = |bytes: u64| {
            let limit = serde_json::from_value(json!({"memory": {"limit": bytes}})).expect("resources");
            fixture.sandbox.update("c", &limit)
        };
        let hog = "busybox dd if=/dev/zero of=/dev/null bs=400M count=1 2> /dev/null && echo whole";
        let hog = || fixture.run("c", &shell(&spec, hog)).1.trim() == "whole";
        assert!(!hog(), "the limit holds");
        unwrap(limit(512 << 20));
        assert!(hog(), "the machine has as much");
        let held = held_by(fixture.sandbox.pid());
        assert!(held > 400 * MIB, "{held} KiB");
        let refused = limit(1 << 40).expect_err("no host has so much");
        assert!(refused.report().contains("this host has no more"), "{}", refused.report());
        unwrap(limit(64 << 20));
        assert!(!hog(), "the limit holds again");
        let end = Instant::now() + PATIENCE;
        while held_by(fixture.sandbox.pid()) > 140 * MIB {
            assert!(Instant::now() < end, "{} KiB", held_by(fixture.sandbox.pid()));
            std::thread::sleep(Duration::from_millis(20));
        }
        // Up again, by an odd number of pages and of MiB.
        unwrap(limit((451 << 20) + 4096));
        assert!(hog(), "it has it again");
        fixture.end();
    }
}

/// Writes 4 MB into memory alone, no two pages of which are the same, and tells their digest.
const WRITE: &str = "busybox dd if=/dev/urandom of=/data bs=1M count=4 2> /dev/null; busybox md5sum /data";

/// What was hot-plugged is on a bus otherwise than what was there at boot; the latter's order is a matter of plans.
fn goes_on() {
    let of = |limit_mib: u64| {
        bundle("goes-on", |spec| {
            spec["annotations"] = json!({"io.mvm.upper_size": "0"});
            spec["linux"]["resources"]["memory"] = json!({"limit": limit_mib << 20});
        })
    };
    let (bundle, spec) = of(64);
    let launcher = MachineLauncher {
        state: state(),
        template: Choice::Always,
        maker: Maker::Thread,
        ..Default::default()
    };
    let limit = |fixture: &Fixture, mib: u64| {
        let limit = serde_json::from_value(json!({"memory": {"limit": mib << 20}})).expect("resources");
        unwrap(fixture.sandbox.update("c", &limit));
    };
    let run = |fixture: &Fixture, script: &str| fixture.run("c", &shell(&spec, script)).1;
    let first = Fixture::launch(&launcher, &spec, false);
    first.create("c", &bundle, &spec);
    let init = unwrap(first.sandbox.start("c", &shell(&spec, "exec sleep 10000"), PIPES));
    limit(&first, 192);
    let digest = run(&first, WRITE);
    assert!(digest.trim().ends_with("  /data"), "{digest}");

    let directory = scratch().join("goes-on-saved");
    std::fs::create_dir_all(directory.join("again")).expect("a directory");
    let going = saved(&first, &directory, init.id);
    let usable = |machine: &SavedMachine| machine.growth.expect("it was given some").usable_mib;
    assert_eq!((going.machine.memory_mib.mib(), usable(&going.machine)), (128, 128));
    // Linux uses what has the highest addresses first.
    assert!(data_behind(&going.snapshot.memory, 128 << 20) >= 4 << 20, "the data are in what was plugged");
    first.end();

    let (grown, _process) = Fixture::restore(&launcher, ("c", &bundle, &of(192).1), &going);
    assert_eq!(run(&grown, "busybox md5sum /data"), digest);
    limit(&grown, 320);
    assert_eq!(usable(&unwrap(grown.sandbox.save("c", &directory.join("again"), None))), 256);
    assert_eq!(run(&grown, "busybox md5sum /data"), digest, "it goes on after that");
    grown.end();
    std::fs::remove_dir_all(&directory).expect("a directory");
}

/// How many bytes from `start` on are no hole in a file.
fn data_behind(file: &Path, start: i64) -> i64 {
    let (file, mut at, mut bytes) = (std::fs::File::open(file).expect("a file"), start, 0);
    while let Ok(data) = lseek(&file, at, Whence::SeekData) {
        at = lseek(&file, data, Whence::SeekHole).expect("there is one at the end");
        bytes += at - data;
    }
    bytes
}

/// The machine of a fixture's container in `directory`, with the container's process of this number in it.
fn saved(fixture: &Fixture, directory: &Path, process: u64) -> Going {
    let machine = unwrap(fixture.sandbox.save("c", directory, None));
    let disks = machine.disks.iter().zip(0..).map(|(disk, number)| Disk {
        path: directory.join(format!("disk-{number}")),
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        throwaway: false,
    });
    let snapshot = Snapshot {
        state: directory.join("state"),
        memory: directory.join("memory"),
        base: None,
        source: None,
        working_set: None,
        contents: machine.contents.clone(),
    };
    Going { disks: disks.collect(), machine, snapshot, process, stdio: PIPES, hostname: None, record: None }
}
