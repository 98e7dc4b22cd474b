//! `mvm run` and processes in containers.

use std::io::Write;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mvm_integration::vm::{PATIENCE, TestVm, drain, image};
use mvm_protocol::{ExitStatus, SignalTarget, WindowSize};
use mvm_runtime::agent::StdioSpec;
use mvm_runtime::container::Cost;
use sha2::{Digest, Sha256};

use crate::{Test, mvm};

/// Bytes of the bulk that goes through standard input and output.
const BULK: usize = 20 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("run_prints_what_the_container_prints_and_exits_with_its_code", output_and_code),
    ("run_gives_the_images_environment_directory_and_user", environment),
    ("run_passes_20_mib_through_stdin_and_stdout_unchanged", bulk),
    ("run_passes_signals_on_and_exits_with_128_plus_the_signal", signals),
    ("run_refuses_writes_with_read_only", read_only),
    ("run_reports_stages_and_memory_with_stats", stats),
    ("a_fast_exit_keeps_its_last_bytes", fast_exit),
    ("a_terminal_has_its_size_and_follows_a_resize", terminal),
    ("three_cpus_are_three_cpus", smp),
    ("processes_are_killed_by_signals_and_orphans_are_reaped", reaping),
    ("a_machine_survives_a_process_that_takes_all_memory", memory_hog),
    ("memory_that_a_guest_frees_is_the_hosts_again", memory_comes_back),
];

fn run(arguments: &[&str]) -> Output {
    let mut command = mvm();
    command.arg("run").args(&arguments[..arguments.len() - 1]).arg(image());
    command.args(["--", "sh", "-c", arguments[arguments.len() - 1]]);
    command.stdin(Stdio::null()).output().expect("mvm is built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn output_and_code() {
    let output = run(&["echo to stdout; echo to stderr >&2; exit 7"]);
    assert_eq!(text(&output.stdout), "to stdout\n");
    assert!(text(&output.stderr).contains("to stderr\n"), "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(7));
}

fn environment() {
    let script = "echo $GREETING $(pwd) $(id -u):$(id -g) $(id -G) $(hostname)";
    let output =
        run(&["--env", "GREETING=hello", "--workdir", "/work", "--user", "app", "--name", "otter", script]);
    assert_eq!(text(&output.stdout), "hello /work 1000:1000 1000 2000 otter\n", "{}", text(&output.stderr));
}

fn bulk() {
    let data: Vec<u8> = (0..BULK as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut command = mvm();
    command.args(["run", "-i"]).arg(image()).args(["--", "cat"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("mvm is built");
    let mut stdin = child.stdin.take().expect("piped");
    let sent = Sha256::digest(&data);
    let feeder = thread::spawn(move || stdin.write_all(&data));
    let received = drain(child.stdout.take().expect("piped")).join().expect("no panic");
    feeder.join().expect("no panic").expect("the container reads it all");
    assert!(child.wait().expect("it ends").success());
    assert_eq!(received.len(), BULK);
    assert_eq!(Sha256::digest(&received), sent);
}

fn signals() {
    let mut command = mvm();
    command.arg("run").arg(image()).args([
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 1; done",
    ]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("mvm is built");
    let mut stdout = std::io::BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stdout, &mut line).expect("it says ready");
    assert_eq!(line, "ready\n");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it is there");
    assert_eq!(text(&drain(stdout).join().expect("no panic")), "caught\n");
    assert_eq!(child.wait().expect("it ends").code(), Some(3));

    stubborn();
    let output = run(&["kill -9 $$"]);
    // The shell is the first process of its name space and cannot kill itself so; its child can be killed.
    let killed = run(&["sh -c 'kill -9 $$'; echo $?"]);
    assert_eq!(text(&killed.stdout).trim(), "137");
    assert!(matches!(output.status.code(), Some(0 | 137)), "{:?}", output.status);
}

/// A container that ignores every request to end goes with its machine at the third.
fn stubborn() {
    let mut command = mvm();
    let script = "trap 'echo no' TERM; echo ready; while :; do sleep 1; done";
    command.arg("run").arg(image()).args(["--", "sh", "-c", script]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mvm is built");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
    assert_eq!(lines.next().expect("a line").expect("text"), "ready");
    for _ in 0..2 {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it is there");
        assert_eq!(lines.next().expect("a line").expect("text"), "no");
    }
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it is there");
    let stderr = drain(child.stderr.take().expect("piped")).join().expect("no panic");
    assert_eq!(child.wait().expect("it ends").code(), Some(125), "{}", text(&stderr));
}

fn read_only() {
    let output = run(&["--read-only", "touch /new && echo written"]);
    assert_eq!(text(&output.stdout), "");
    assert!(text(&output.stderr).contains("Read-only file system"), "{}", text(&output.stderr));
    let output = run(&["touch /new && echo written"]);
    assert_eq!(text(&output.stdout), "written\n");
}

fn stats() {
    let output = run(&["--stats", "true"]);
    let report = text(&output.stderr);
    for stage in ["spawn mvm-vmm", "run guest", "greet agent", "start process", "memory: "] {
        assert!(report.contains(stage), "no {stage:?} in {report}");
    }
}

fn fast_exit() {
    let mut vm = TestVm::new().boot();
    for i in 0..30 {
        assert_eq!(
            vm.sh(&format!("echo {i}; echo the last bytes of {i}")),
            format!("{i}\nthe last bytes of {i}\n")
        );
    }
}

fn terminal() {
    let mut vm = TestVm::new().boot();
    // The signal of a new size interrupts the wait, then the trap prints it.
    let script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 1; done";
    let process = vm.start_on_terminal(&["sh", "-c", script], 33, 111);
    let mut lines = std::io::BufReader::new(process.terminal.expect("asked for"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut lines, &mut line).expect("a size");
    assert_eq!(line.trim(), "33 111");
    vm.container.agent.resize(process.id, WindowSize { rows: 44, columns: 99 }).expect("it resizes");
    line.clear();
    std::io::BufRead::read_line(&mut lines, &mut line).expect("a size");
    assert_eq!(line.trim(), "44 99");
    assert_eq!(vm.container.agent.wait(process.id, Some(PATIENCE)).expect("it ends"), ExitStatus::Code(0));
}

fn smp() {
    let mut vm = TestVm::new().cpus(3).boot();
    assert_eq!(vm.sh("nproc"), "3\n");
    assert_eq!(vm.sh("for c in 0 1 2; do taskset -c $c true && echo $c; done"), "0\n1\n2\n");
}

fn reaping() {
    let mut vm = TestVm::new().boot();
    let process =
        vm.start(&["sleep", "1000"], StdioSpec::Pipes { stdin: false, stdout: false, stderr: false });
    vm.container.agent.signal(process.id, 9, SignalTarget::Process).expect("it is there");
    assert_eq!(vm.container.agent.wait(process.id, Some(PATIENCE)).expect("it ends"), ExitStatus::Signal(9));
    vm.sh("for i in $(seq 20); do (sleep 0 &); done");
    assert!(vm.container.agent.list().expect("it answers").iter().all(|entry| entry.exited.is_none()));
}

fn memory_comes_back() {
    let mut vm = TestVm::new().memory_mib(256).boot();
    let pid = vm.container.machine.pid();
    let used = || Cost::of(pid, 256 << 20).expect("it runs").guest_private_kib;
    vm.sh("dd if=/dev/zero of=/tmp/fill bs=1M count=100 2>/dev/null");
    let full = used();
    vm.sh("rm /tmp/fill");
    // The guest waits two seconds before it tells; nothing tells the host's user when it has.
    let deadline = Instant::now() + PATIENCE;
    while full.saturating_sub(used()) < 90 << 10 {
        assert!(Instant::now() < deadline, "of {full} KiB there still are {}", used());
        thread::sleep(Duration::from_millis(50));
    }
}

fn memory_hog() {
    let mut vm = TestVm::new().boot();
    let output = vm.output("tail /dev/zero", b"");
    assert_ne!(output.status, ExitStatus::Code(0));
    assert_eq!(vm.sh("echo alive"), "alive\n");
}
