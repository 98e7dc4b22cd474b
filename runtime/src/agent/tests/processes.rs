//! Processes: exit codes, signals, users, orphans, what cannot be executed.

use std::{
    fs,
    io::Read,
    time::{Duration, Instant},
};

use mvm_protocol::{ExitStatus, FailureKind, ShutdownMode, SignalTarget, User};

use super::guest::{Guest, SOON, shell};
use crate::agent::{Error, Process, ProcessSpec};

fn read_all(process: &mut Process) -> String {
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// The output and end of a script.
fn run(guest: &Guest, spec: ProcessSpec) -> (String, ExitStatus) {
    let mut process = guest.client.start(spec).unwrap();
    let text = read_all(&mut process);
    (text, guest.client.wait(process.id, Some(SOON)).unwrap())
}

#[test]
fn a_program_runs_and_its_output_and_exit_code_arrive() {
    let guest = Guest::new();
    assert_eq!(run(&guest, shell("echo hello; exit 7")), ("hello\n".to_owned(), ExitStatus::Code(7)));
}

#[test]
fn the_hello_names_version_kernel_and_stages_in_order() {
    let guest = Guest::new();
    let hello = guest.client.hello();
    assert_eq!(hello.agent_version, env!("CARGO_PKG_VERSION"));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(hello.kernel_release, kernel.trim());
    assert_eq!(hello.connection, 0);
    let stages = hello.stages;
    let times = [stages.agent_start, stages.mounts_done, stages.dialled].map(|it| it.monotonic_ns);
    assert!(times[0] > 0 && times.is_sorted(), "{times:?}");
}

#[test]
fn stdout_and_stderr_are_streams_of_their_own() {
    let guest = Guest::new();
    let mut process = guest.sh("echo out; echo err >&2");
    let mut error = String::new();
    process.stderr.as_mut().unwrap().read_to_string(&mut error).unwrap();
    assert_eq!((read_all(&mut process).as_str(), error.as_str()), ("out\n", "err\n"));
}

#[test]
fn a_signal_kills_and_the_status_says_which() {
    let guest = Guest::new();
    let process = guest.sh("exec sleep 1000");
    guest.client.signal(process.id, libc::SIGTERM, SignalTarget::Process).unwrap();
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(15));
    let gone = guest.client.signal(process.id, libc::SIGTERM, SignalTarget::Process).unwrap_err();
    assert!(matches!(gone, Error::Refused { kind: FailureKind::NotFound, .. }), "{gone}");
}

#[test]
fn a_real_time_signal_kills_and_is_reported_too() {
    let guest = Guest::new();
    let process = guest.sh("exec sleep 1000");
    guest.client.signal(process.id, 40, SignalTarget::Process).unwrap();
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(40));
}

#[test]
fn a_signal_to_the_group_reaches_the_children() {
    let guest = Guest::new();
    let mut process = guest.sh("sleep 1000 & echo $!; wait");
    let mut line = [0; 16];
    let count = process.stdout.as_mut().unwrap().read(&mut line).unwrap();
    let child = String::from_utf8_lossy(&line[..count]).trim().to_owned();
    assert!(fs::exists(format!("/proc/{child}")).unwrap());
    guest.client.signal(process.id, libc::SIGKILL, SignalTarget::Group).unwrap();
    // The output ends only when the last of the group is gone.
    assert_eq!(read_all(&mut process), "");
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
}

#[test]
fn a_signal_that_does_not_exist_is_refused() {
    let guest = Guest::new();
    let process = guest.sh("exec sleep 1000");
    for signal in [-1, 65, i32::MAX] {
        let error = guest.client.signal(process.id, signal, SignalTarget::Process).unwrap_err();
        assert!(matches!(error, Error::Refused { kind: FailureKind::Invalid, .. }), "{error}");
    }
}

#[test]
fn a_command_that_is_missing_is_127_and_one_that_may_not_run_126() {
    let guest = Guest::new();
    for (program, errno, code) in [
        ("no-such-program", libc::ENOENT, 127),
        ("/no/such/file", libc::ENOENT, 127),
        ("/etc/passwd", libc::EACCES, 126),
    ] {
        let error = guest.client.start(ProcessSpec::new([program])).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot execute {program}"));
        assert!(matches!(error, Error::Refused { errno: it, .. } if it == errno), "{error:?}");
        assert_eq!(error.exec_exit_code(), Some(code));
    }
    assert_eq!(run(&guest, shell("exit 0")).1, ExitStatus::Code(0), "the agent goes on");
}

#[test]
fn the_working_directory_is_made_if_it_is_missing() {
    let guest = Guest::new();
    let path = guest.dir.path().join("a/b/c").to_str().unwrap().to_owned();
    let mut spec = shell("pwd");
    spec.cwd = path.clone();
    assert_eq!(run(&guest, spec).0, format!("{path}\n"));
}

#[test]
fn a_process_runs_as_the_user_it_is_given_with_that_users_home() {
    let guest = Guest::new();
    let mut spec = shell("id -u; id -g; echo $HOME");
    spec.user = User::Named("nobody".to_owned());
    assert_eq!(run(&guest, spec).0, "65534\n65534\n/nonexistent\n");
    let mut spec = shell("id -u; id -g; id -G");
    spec.user = User::Ids { uid: 12, gid: 34, groups: vec![56, 78] };
    assert_eq!(run(&guest, spec).0, "12\n34\n34 56 78\n");
}

#[test]
fn a_user_can_reopen_its_own_standard_output() {
    let guest = Guest::new();
    let mut spec = shell("echo again > /proc/self/fd/1");
    spec.user = User::Named("nobody".to_owned());
    assert_eq!(run(&guest, spec), ("again\n".to_owned(), ExitStatus::Code(0)));
}

#[test]
fn a_process_inherits_no_descriptor_no_blocked_signal_and_no_environment() {
    let guest = Guest::new();
    let mut spec = shell("ls /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status; env | sort");
    spec.env.push("A=1".to_owned());
    let (text, _) = run(&guest, spec);
    let lines: Vec<&str> = text.lines().collect();
    // ls itself holds 0, 1, 2 and the directory it lists.
    assert_eq!(lines[0], "4");
    assert!(lines[1].ends_with("0000000000000000") && lines[2].ends_with("0000000000000000"), "{text}");
    assert_eq!(lines[3..], ["A=1", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PWD=/"]);
}

#[test]
fn a_working_directory_cannot_lead_to_a_descriptor_of_the_agents() {
    let guest = Guest::new();
    for fd in 3..40 {
        let mut spec = shell("true");
        spec.cwd = format!("/proc/self/fd/{fd}");
        let error = guest.client.start(spec).unwrap_err();
        assert!(error.to_string().starts_with("cannot enter working directory"), "{fd}: {error}");
    }
}

#[test]
fn orphans_are_reaped() {
    let guest = Guest::new();
    let script = "i=0; while [ $i -lt 200 ]; do (sleep 0 &) ; i=$((i+1)); done";
    assert_eq!(run(&guest, shell(script)).1, ExitStatus::Code(0));
    // The agent reaps before it reads the next request, and every orphan has ended before its pipe did.
    guest.client.ping().unwrap();
    let agent = guest.agent_pid().to_string();
    let is_zombie = |stat: &str| {
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[0] == "Z" && fields[1] == agent
    };
    let deadline = Instant::now() + SOON;
    loop {
        let stats = fs::read_dir("/proc").unwrap().flatten();
        let stats = stats.filter_map(|it| fs::read_to_string(it.path().join("stat")).ok());
        let zombies = stats.filter(|stat| stat.contains(')') && is_zombie(stat)).count();
        if zombies == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{zombies} zombies");
    }
}

#[test]
fn processes_are_listed_until_their_exit_was_fetched() {
    let guest = Guest::new();
    let process = guest.sh("exit 3");
    let running = guest.sh("exec sleep 1000");
    assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Code(3));
    let listed: Vec<_> = guest.client.list().unwrap().iter().map(|it| (it.process, it.exited)).collect();
    assert_eq!(listed, [(running.id, None)]);
}

#[test]
fn a_process_that_was_given_up_and_ended_is_forgotten_with_the_next_start() {
    let guest = Guest::new();
    let stubborn = guest.sh("exec sleep 1000");
    guest.client.abandon(stubborn.id);
    assert!(matches!(guest.client.wait(stubborn.id, None), Err(Error::Abandoned)));
    guest.client.signal(stubborn.id, libc::SIGKILL, SignalTarget::Process).unwrap();
    let deadline = Instant::now() + SOON;
    while guest.client.shared.over().is_empty() {
        assert!(Instant::now() < deadline, "its end was not reported");
        guest.client.ping().unwrap();
    }
    assert_eq!(guest.client.list().unwrap().len(), 1);
    assert_eq!(run(&guest, shell("true")).1, ExitStatus::Code(0));
    assert_eq!(guest.client.list().unwrap(), []);
    assert!(guest.client.shared.over().is_empty());
}

#[test]
fn stats_and_sync_are_answered_while_processes_run() {
    let guest = Guest::new();
    let _running = guest.sh("exec sleep 1000");
    let stats = guest.client.stats().unwrap();
    assert!(stats.memory_total > stats.memory_available && stats.memory_available > 0, "{stats:?}");
    assert_eq!(stats.processes, 1);
    guest.client.sync().unwrap();
}

#[test]
fn shutdown_terms_then_kills_and_reports_both() {
    let guest = Guest::new();
    let polite = guest.sh("exec sleep 1000");
    let mut stubborn = guest.sh("trap '' TERM; echo ready; while :; do sleep 1000; done");
    let mut ready = [0; 6];
    stubborn.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    guest.client.shut_down(ShutdownMode::PowerOff, Duration::from_millis(300)).unwrap();
    assert_eq!(guest.client.wait(polite.id, Some(SOON)).unwrap(), ExitStatus::Signal(15));
    assert_eq!(guest.client.wait(stubborn.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
    let after = guest.client.start(shell("true")).unwrap_err();
    assert!(
        matches!(
            after,
            Error::Refused { kind: FailureKind::Busy, .. } | Error::Lost { .. } | Error::Io { .. }
        ),
        "{after}"
    );
}
