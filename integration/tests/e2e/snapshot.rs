//! Linux guests that are saved and go on, as themselves and as others.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mvm_integration::vm::{PATIENCE, TestVm, Vm, drain, image, scratch, spec, state};
use mvm_protocol::{ExitStatus, Identity, ShutdownMode};
use mvm_runtime::agent::{AgentClient, StdioSpec};
use mvm_runtime::container::{devices, root_file_system};
use mvm_runtime::failure::Failure;
use mvm_runtime::machine::{ConsoleKind, Disk, Machine, Origin, Plan, Saved, Snapshot, prepare};
use mvm_vmm::control::{Answer, Balloon, Request};
use mvm_vmm::exit::Exit;

use crate::Test;
use crate::files::ext4_disk;
use crate::network::pings;

#[path = "../../../vmm/examples/memory_source/handler.rs"]
mod handler;

pub(crate) const TESTS: &[Test] = &[
    ("a_saved_guest_goes_on_and_its_agent_calls_again", goes_on),
    ("every_device_goes_on_after_a_snapshot_under_load", every_device),
    ("a_guest_goes_on_with_memory_that_is_elsewhere_and_gives_some_of_it_back", elsewhere),
    ("guests_of_one_snapshot_go_their_own_ways_while_the_saved_one_lives", clones),
];

/// The standard streams of a process that is left alone.
const NOWHERE: StdioSpec = StdioSpec::Pipes { stdin: false, stdout: false, stderr: false };
/// What is in these machines.
const CONTENTS: &str = "busybox";

/// A machine that goes on from a snapshot, and its agent.
struct Again {
    agent: AgentClient,
    /// After the agent's connection.
    machine: Machine,
}

fn save(vm: &Vm, name: &str, resume: bool) -> (Snapshot, Saved) {
    let path = |what: &str| scratch().join(format!("{name}.{what}"));
    let (state, memory) = (path("state"), path("memory"));
    let make = |path: &PathBuf| File::create(path).expect("a file");
    let (to, ram) = (make(&state), make(&memory));
    let control = vm.container.machine.control();
    let saved = done(control.snapshot(to.as_fd(), ram.as_fd(), CONTENTS, resume));
    (
        Snapshot {
            state,
            memory,
            source: None,
            base: None,
            working_set: None,
            contents: CONTENTS.to_owned(),
        },
        saved,
    )
}

/// A machine as [`TestVm`] makes them, that goes on from `saved`.
fn restore(saved: &Snapshot, name: &str, cpus: u64) -> Again {
    start(name, &plan(saved, name, cpus))
}

fn plan(saved: &Snapshot, name: &str, cpus: u64) -> Plan {
    let root = done(root_file_system(&image().display().to_string(), &state(), &mut ()));
    Plan {
        cpus: cpus.try_into().expect("a number of CPUs"),
        disks: vec![disk(&root.path, "root", true)],
        devices: devices(),
        ..Plan::new(name.parse().expect("a name"), Origin::Saved(saved.clone()))
    }
}

fn start(name: &str, plan: &Plan) -> Again {
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().ok();
    let mut machine = done(prepare(plan).and_then(|prepared| prepared.start(stderr)));
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall_clock_ns = u64::try_from(wall.as_nanos()).unwrap_or(0);
    let identity = Identity { hostname: name.to_owned(), machine_id: 0, wall_clock_ns, entropy: [7; 32] };
    Again { agent: done(machine.agent(identity, PATIENCE)), machine }
}

fn disk(path: &Path, serial: &str, read_only: bool) -> Disk {
    Disk { path: path.to_path_buf(), read_only, serial: serial.to_owned(), throwaway: false }
}

fn done<T>(result: Result<T, Failure>) -> T {
    result.unwrap_or_else(|failure| panic!("{}", failure.report()))
}

impl Again {
    /// What a shell command prints; it must succeed.
    fn sh(&self, script: &str) -> String {
        let stdio = StdioSpec::Pipes { stdin: false, stdout: true, stderr: false };
        let process = self.agent.start(spec(&["sh", "-c", script], stdio)).expect("it starts");
        let output = drain(process.stdout.expect("asked for"));
        let status = self.agent.wait(process.id, Some(PATIENCE)).expect("it ends");
        assert_eq!(status, ExitStatus::Code(0), "{script}");
        String::from_utf8(output.join().expect("no panic")).expect("text")
    }
}

/// Both CPUs' timers, and a read of the disk that no cache has.
const ALIVE: &str = "for cpu in 0 1; do taskset $((cpu + 1)) sleep 0.1 || exit 1; done; \
     mount -o remount,rw /proc/sys 2>/dev/null; echo 7 > /proc/sys/vm/drop_caches; busybox true && nproc";

fn goes_on() {
    let mut vm = TestVm::new().cpus(2).boot();
    vm.sh("echo badger > /tmp/word; dmesg -c > /dev/null");
    let before: f64 = uptime(&vm.sh("cat /proc/uptime"));
    let (saved, figures) = save(&vm, "goes-on", false);
    assert!(figures.memory_bytes < 64 << 20, "{figures:?}");
    drop(vm);

    let again = restore(&saved, "goes-on", 2);
    assert_eq!(again.sh("cat /tmp/word"), "badger\n");
    assert_eq!(again.sh(ALIVE), "2\n");
    let after = uptime(&again.sh("cat /proc/uptime"));
    assert!(after > before, "{before} and {after}");
    // Long enough for the kernel to compare its clocks a few times.
    let said = again.sh("sleep 3; dmesg");
    let complaints: Vec<_> = said.lines().filter(|line| complains(line)).collect();
    assert!(complaints.is_empty(), "{said}");
}

/// Whether a line of the kernel's log is about its clocks, or about what should not be.
fn complains(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    let words = ["clocksource", "tsc", "lockup", "stall", "hung", "warning", "bug", "call trace", "error"];
    words.iter().any(|word| line.contains(word))
}

fn clones() {
    let mut vm = TestVm::new().boot();
    vm.sh("echo 1 > /tmp/word");
    let (saved, _) = save(&vm, "clones", true);
    assert_eq!(vm.sh("cat /tmp/word; echo 2 > /tmp/word"), "1\n");
    let (first, second) = (restore(&saved, "first", 1), restore(&saved, "second", 1));
    assert_eq!(first.sh("cat /tmp/word; echo 3 > /tmp/word"), "1\n");
    assert_eq!(second.sh("cat /tmp/word"), "1\n");
    assert_eq!(first.sh("cat /tmp/word"), "3\n");
    assert_eq!(vm.sh("cat /tmp/word"), "2\n");
    assert_eq!(first.sh("nproc"), "1\n");
}

fn elsewhere() {
    let mut vm = TestVm::new().boot();
    vm.sh("head -c 8M /dev/urandom > /tmp/file; sha256sum < /tmp/file > /tmp/sum");
    let (saved, _) = save(&vm, "elsewhere", false);
    drop(vm);
    let away = scratch().join("elsewhere.away");
    std::fs::rename(&saved.memory, &away).expect("it is ours");
    let path = scratch().join("elsewhere.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let source = Some(format!("unix:{}", path.display()).parse().expect("an address"));
    let saved = Snapshot { source, ..saved };
    let serving = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("a machine");
        let mut machine = handler::Machine::meet(socket).expect("it says what it needs");
        machine.serve(&File::open(away).expect("a file")).expect("it is served");
        machine
    });
    let mut again = restore(&saved, "elsewhere", 1);
    assert_eq!(again.sh("sha256sum < /tmp/file | cmp - /tmp/sum && echo same"), "same\n");
    // What goes to the balloon or is freed is reported, and is not what was saved when it comes back.
    again.sh("rm /tmp/file");
    let balloon = |target_mib| {
        let request = Request::Balloon { target_mib };
        let end = Instant::now() + PATIENCE;
        let asked = || again.machine.control().call(&request, &[]).expect("a balloon");
        while asked() != Answer::Balloon(Balloon { target_mib, actual_mib: target_mib }) {
            assert!(Instant::now() < end, "{:?}", asked());
        }
    };
    balloon(48);
    balloon(0);
    let script = "head -c 24M /dev/zero | tee /tmp/zeroes | sha256sum > /tmp/sum; sha256sum < /tmp/zeroes | cmp - /tmp/sum && echo same";
    assert_eq!(again.sh(script), "same\n");
    again.agent.shut_down(ShutdownMode::PowerOff, Duration::from_secs(2)).expect("it shuts down");
    assert_eq!(done(again.machine.wait()), Exit::Shutdown);
    let machine = serving.join().expect("no panic");
    assert!(
        machine.removed.len() > 1000 && machine.brought > 1000,
        "{} pages were brought and {} given back",
        machine.brought,
        machine.removed.len()
    );
}

/// Counts on a disk, for as long as it is let.
const COUNT: &str = "i=0; while :; do i=$((i + 1)); echo $i > /count.new; mv /count.new /count; sync; done";

fn every_device() {
    tap("mvmsnap", "10.77.9.1/24");
    let upper = ext4_disk("snapshot.ext4", 64);
    let net = "tap=mvmsnap,ip=10.77.9.2/24,gateway=10.77.9.1";
    let mut vm = TestVm::new().cpus(2).upper_disk(&upper).net(net).boot();
    let attach = |text: &str, files: &[BorrowedFd<'_>]| {
        let device = serde_json::from_str(text).expect("a device");
        vm.container.machine.control().call(&Request::Attach { device }, files).expect("it is attached");
    };
    let terminal = tempfile::tempfile().expect("a file");
    attach(r#"{"type":"rng"}"#, &[]);
    attach(r#"{"type":"console","output":0}"#, &[terminal.as_fd()]);
    vm.sh("mount -o remount,rw /sys; mount -t devtmpfs dev /dev; echo 1 > /sys/bus/pci/rescan");
    vm.sh("echo kept > /kept; head -c 8 /dev/hwrng > /dev/null; echo before > /dev/hvc0");
    vm.start(&["sh", "-c", COUNT], NOWHERE);
    vm.start(&["ping", "-q", "-i", "0.01", "10.77.9.1"], NOWHERE);
    vm.sh("until test -s /count; do sleep 0.1; done");
    let (saved, _) = save(&vm, "every-device", false);
    drop(vm);

    let mut plan = plan(&saved, "every-device", 2);
    plan.disks.push(disk(&upper, "upper", false));
    plan.nets = vec!["tap=mvmsnap".parse().expect("a network")];
    plan.devices.push(serde_json::from_str(r#"{"type":"rng"}"#).expect("a device"));
    plan.console = Some(ConsoleKind::Virtio);
    let mut again = start("every-device", &plan);
    assert_eq!(again.sh("cat /kept; head -c 8 /dev/hwrng | wc -c"), "kept\n8\n");
    let grows = "i=$(cat /count); until test $(cat /count) -gt $((i + 2)); do sleep 0.1; done; echo grows";
    assert_eq!(again.sh(grows), "grows\n");
    assert_eq!(again.sh(&pings("10.77.9.1")).matches("1 packets received").count(), 3);
    again.sh("echo after > /dev/hvc0");
    let console = again.machine.console.take().expect("asked for");
    let mut line = String::new();
    BufReader::new(console.from_guest).read_line(&mut line).expect("it speaks");
    assert_eq!(line.trim_end(), "after");
    let balloon =
        || again.machine.control().call(&Request::Balloon { target_mib: 16 }, &[]).expect("a balloon");
    let end = Instant::now() + PATIENCE;
    while balloon() != Answer::Balloon(Balloon { target_mib: 16, actual_mib: 16 }) {
        assert!(Instant::now() < end, "{:?}", balloon());
    }
    again.agent.shut_down(ShutdownMode::PowerOff, Duration::from_secs(2)).expect("it shuts down");
    assert_eq!(done(again.machine.wait()), Exit::Shutdown);
    let clean = Command::new("e2fsck").arg("-fn").arg(&upper).output().expect("e2fsprogs");
    assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stdout));
}

/// Makes a tap with an address.
fn tap(name: &str, address: &str) {
    let make = ["tuntap", "add", name, "mode", "tap", "vnet_hdr"];
    for arguments in [&make[..], &["addr", "add", address, "dev", name], &["link", "set", name, "up"]] {
        let done = Command::new("ip").args(arguments).status().expect("iproute2");
        assert!(done.success(), "ip {arguments:?}");
    }
}

/// The first number of /proc/uptime.
fn uptime(text: &str) -> f64 {
    text.split_whitespace().next().and_then(|seconds| seconds.parse().ok()).expect("a number")
}
