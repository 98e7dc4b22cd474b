//! Whole machines on this host's KVM, with guests of a few instructions that run on any back end. Without
//! /dev/kvm they fail here and run in the lab, which `make unit` sees to.

mod jail;
mod memory;
mod snapshot;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_vmm::config::{Boot, FdSlot, MachineConfig, Start};
use mvm_vmm::control::{Answer, Attached, Client, DeviceName, MachineState, Request};
use mvm_vmm::exit::Exit;
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Child, Ended, Files, Launch};
use mvm_vmm::status::Event;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A machine and the client end of its control socket.
struct Vm {
    child: Child,
    control: Client,
}

fn launch(kernel: &[u8], change: impl FnOnce(&mut MachineConfig, &mut Files)) -> Vm {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.expect("/dev/kvm opens; where it does not, `make unit` runs these tests in the lab");
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(kernel).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();

    let mut files = Files::default();
    let mut config = MachineConfig {
        memory: 16.try_into().unwrap(),
        control: Some(files.add(listener)),
        ..MachineConfig::new(
            "native-test".parse().unwrap(),
            files.add(kvm),
            Start::Boot(Boot::new(files.add(image))),
        )
    };
    change(&mut config, &mut files);
    let program = Path::new(env!("CARGO_BIN_EXE_mvm-vmm"));
    let child = Launch { config, files, stderr: None }.spawn_program(program).unwrap();
    Vm { child, control: Client::new(stream) }
}

fn boot(config: &mut MachineConfig) -> &mut Boot {
    match &mut config.start {
        Start::Boot(boot) => boot,
        Start::Restore(restore) => panic!("{restore:?}"),
    }
}

fn run(program: Program) -> Vm {
    launch(&program.image(), |_, _| ())
}

impl Vm {
    /// Waits for the guest's first instruction.
    fn wait_for_guest(&mut self) {
        let first = self.child.events.by_ref().map(Result::unwrap);
        let found = first.into_iter().find(|event| matches!(event, Event::GuestFirstInstruction { .. }));
        assert!(found.is_some(), "the machine ended before its guest ran");
    }

    fn state(&mut self) -> MachineState {
        match self.control.call(&Request::Info).unwrap() {
            Answer::Info(info) => info.state,
            other => panic!("{other:?}"),
        }
    }

    fn port_reads(&mut self) -> u64 {
        match self.control.call(&Request::Metrics).unwrap() {
            Answer::Metrics(metrics) => metrics.exits.port_reads,
            other => panic!("{other:?}"),
        }
    }

    /// The last event, and how the process ended.
    fn end(self) -> (Event, Ended) {
        let ended = self.child.wait().unwrap();
        (self.child.events.map(Result::unwrap).last().unwrap(), ended)
    }
}

fn assert_ends_with(program: Program, expected: &Exit) {
    let vm = run(program);
    let (event, ended) = vm.end();
    assert!(matches!(&event, Event::Exit { exit, .. } if exit == expected), "{event:?}");
    assert_eq!(ended, Ended::Exit(expected.clone()));
}

#[test]
fn powering_off_is_a_shutdown() {
    assert_ends_with(Program::PowerOff, &Exit::Shutdown);
}

#[test]
fn a_reset_is_a_reboot() {
    assert_ends_with(Program::Reset, &Exit::Reboot);
}

#[test]
fn a_reported_panic_is_a_guest_panic() {
    assert_ends_with(Program::Panic, &Exit::GuestPanic);
}

#[test]
fn a_fault_that_nobody_handles_is_a_triple_fault() {
    assert_ends_with(Program::TripleFault, &Exit::TripleFault);
}

#[test]
fn sigterm_stops_a_guest_that_never_leaves() {
    let mut vm = run(Program::Spin);
    vm.wait_for_guest();
    kill(vm.child.pid, Signal::SIGTERM).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

#[test]
fn a_machine_ends_with_the_reader_of_its_events() {
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    drop(vm.child.events);
    let mut ended = [PollFd::new(vm.child.pidfd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ended, PollTimeout::from(20_000u16)).unwrap(), 1, "it lives on");
}

#[test]
fn stop_ends_an_idle_machine() {
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    assert_eq!(vm.control.call(&Request::Stop).unwrap(), Answer::Done {});
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let mut vm = run(Program::ReadPorts);
    vm.wait_for_guest();
    vm.control.call(&Request::Pause).unwrap();
    assert_eq!(vm.state(), MachineState::Paused);
    let before = vm.port_reads();
    assert_eq!(vm.port_reads(), before);
    vm.control.call(&Request::Resume).unwrap();
    assert_eq!(vm.state(), MachineState::Running);
    while vm.port_reads() == before {}
    vm.control.call(&Request::Pause).unwrap();
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

#[test]
fn guests_that_spin_and_halt_can_be_paused_again_and_again() {
    for program in [Program::Spin, Program::Halt] {
        let mut vm = launch(&program.image(), |config, _| config.cpus = 2.try_into().unwrap());
        vm.wait_for_guest();
        for _ in 0..50 {
            assert_eq!(vm.control.call(&Request::Pause).unwrap(), Answer::Done {});
            assert_eq!(vm.control.call(&Request::Resume).unwrap(), Answer::Done {});
        }
        vm.control.call(&Request::Stop).unwrap();
        assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
    }
}

#[test]
fn stages_come_in_order() {
    let mut vm = run(Program::PowerOff);
    let events: Vec<Event> = vm.child.events.by_ref().map(Result::unwrap).collect();
    let stages = events.iter().find_map(|event| match event {
        Event::Started { stages } => Some(*stages),
        _ => None,
    });
    let first_exit = events.iter().find_map(|event| match event {
        Event::FirstExit { run_ns, ns } => Some((*run_ns, *ns)),
        _ => None,
    });
    let (stages, (run, first)) = (stages.unwrap(), first_exit.unwrap());
    let order = [
        stages.entered_ns,
        stages.config_ns,
        stages.loaded_ns,
        stages.vm_ns,
        stages.devices_ns,
        stages.vcpus_ns,
        run,
        first,
    ];
    assert!(order.is_sorted(), "{order:?}");
    vm.end_quietly();
}

impl Vm {
    fn end_quietly(self) {
        assert_eq!(self.child.wait().unwrap(), Ended::Exit(Exit::Shutdown));
    }
}

#[test]
fn what_is_wrong_is_said_with_a_remedy() {
    let vm = launch(b"not a kernel", |_, _| ());
    let (event, ended) = vm.end();
    assert_eq!(ended, Ended::FailedToStart);
    let Event::Error { message, because, help } = event else { panic!("{event:?}") };
    assert_eq!(message, "cannot load the kernel");
    assert_eq!(because, ["the kernel is neither an ELF vmlinux nor a bzImage"]);
    assert!(help.unwrap().contains("vmlinux"));
}

#[test]
fn a_slot_that_was_not_passed_is_named() {
    let vm = launch(&Program::Halt.image(), |config, _| boot(config).initrd = Some(FdSlot(77)));
    let (event, _) = vm.end();
    let Event::Error { message, .. } = event else { panic!("{event:?}") };
    assert_eq!(message, "cannot use slot 77, named for the initial RAM disk");
}

#[test]
fn requests_that_are_none_are_answered_and_too_long_ones_end_the_connection() {
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    let error = vm.control.call(&Request::Balloon { target_mib: 1 }).unwrap_err();
    assert!(error.to_string().contains("no balloon"), "{error}");
    assert_eq!(vm.state(), MachineState::Running);
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

/// Clock ticks of CPU time that process `pid` has used.
fn cpu_time(pid: Pid) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// As the machine's own user: not every root may limit others.
fn limit_files(vm: &Vm, most: usize) {
    let (user, pid) = (vm.user().as_raw(), vm.child.pid.to_string());
    let mut limit = Command::new("prlimit");
    limit.args(["--pid", &pid, &format!("--nofile={most}:1024")]).uid(user).gid(user);
    assert!(limit.status().unwrap().success());
}

#[test]
fn a_client_there_is_no_file_for_waits_until_there_is_and_costs_nothing_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let mut vm = launch(&Program::Halt.image(), |config, files| config.control = Some(files.add(listener)));
    let connect = || {
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Client::new(stream)
    };
    vm.wait_for_guest();
    let pid = vm.child.pid;
    let mut first = connect();
    first.call(&Request::Info).unwrap();
    limit_files(&vm, std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count());
    let mut second = connect();
    first.call(&Request::Info).unwrap();
    let before = cpu_time(pid);
    std::thread::sleep(Duration::from_millis(500));
    assert!(cpu_time(pid) - before < 20, "it spins");
    limit_files(&vm, 1024);
    drop(first);
    second.call(&Request::Info).unwrap();
    second.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

/// A disk that `vm` is to attach, as the request's first file.
fn disk(serial: &str) -> Request {
    let text = format!(r#"{{"command":"attach","device":{{"type":"block","disk":0,"serial":"{serial}"}}}}"#);
    serde_json::from_str(&text).unwrap()
}

#[test]
fn devices_are_attached_with_their_files_up_to_a_full_bus_and_detached() {
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    let image = tempfile::tempfile().unwrap();
    image.set_len(1 << 20).unwrap();
    let error = vm.control.call(&disk("d")).unwrap_err().to_string();
    assert!(error.contains("no such file came with the request"), "{error}");
    for number in 1..32 {
        let attached = vm.control.call_with(&disk(&format!("d{number}")), &[image.as_fd()]).unwrap();
        assert_eq!(attached, Answer::Attached(Attached { device: number }));
    }
    let error = vm.control.call_with(&disk("more"), &[image.as_fd()]).unwrap_err().to_string();
    assert!(error.contains("the PCI bus is full"), "{error}");
    let detach = |device| Request::Detach { device, force: false };
    assert_eq!(vm.control.call(&detach(DeviceName::Serial("d7".into()))).unwrap(), Answer::Done {});
    assert_eq!(vm.control.call(&detach(DeviceName::Number(31))).unwrap(), Answer::Done {});
    for gone in [DeviceName::Serial("d7".into()), DeviceName::Number(31), DeviceName::Number(0)] {
        vm.control.call(&detach(gone)).unwrap_err();
    }
    let again = vm.control.call_with(&disk("d7"), &[image.as_fd()]).unwrap();
    assert_eq!(again, Answer::Attached(Attached { device: 7 }));
    vm.control.call(&Request::Pause).unwrap();
    vm.control.call(&Request::Resume).unwrap();
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

#[test]
fn a_machine_logs_at_the_level_of_the_one_that_starts_it() {
    log::set_max_level(log::LevelFilter::Debug);
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    let arguments = std::fs::read(format!("/proc/{}/cmdline", vm.child.pid)).unwrap();
    assert!(arguments.ends_with(b"\0DEBUG\0"), "{}", String::from_utf8_lossy(&arguments));
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

#[test]
fn a_connected_control_socket_needs_no_listener() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut vm = launch(&Program::Halt.image(), |config, files| config.control = Some(files.add(far)));
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut control = Client::new(near);
    vm.wait_for_guest();
    assert!(matches!(control.call(&Request::Info).unwrap(), Answer::Info(_)));
    control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

#[test]
fn a_machine_has_the_descriptors_it_was_given_and_no_environment() {
    // One that a careless caller would leak: not close-on-exec.
    let leak = File::open("/dev/zero").unwrap();
    nix::fcntl::fcntl(&leak, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    assert_eq!(vm.state(), MachineState::Running, "by now it has opened all it will");
    let process = Path::new("/proc").join(vm.child.pid.to_string());
    let mut links: Vec<String> = std::fs::read_dir(process.join("fd"))
        .unwrap()
        .map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned())
        .map(|link| link.split(":[").next().unwrap().to_owned())
        .collect();
    links.sort();
    let expected = [
        "/dev/kvm",
        "/dev/null",
        "/dev/null",
        "/dev/null",
        "anon_inode",
        "anon_inode",
        "anon_inode",
        "anon_inode",
        "anon_inode",
        "anon_inode",
        "anon_inode",
        "pipe",
        "socket",
        "socket",
    ];
    let kinds: Vec<&str> = links
        .iter()
        .map(|link| if link.starts_with("anon_inode") { "anon_inode" } else { link.as_str() })
        .collect();
    assert_eq!(
        kinds, expected,
        "machine, vCPU, event, epoll, signals, I/O loop and its event; status; control and its client"
    );
    assert_eq!(std::fs::read(process.join("environ")).unwrap(), b"");
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}
