//! The programs that are compared: each starts a machine of 128 MiB whose guest reports its first instruction
//! and halts.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use mvm_vmm::config::{Boot, MachineConfig, Start};
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Files, Launch};
use mvm_vmm::status::{Event, now};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::pvh;

/// Processes that run, for [`kill_all`].
static ALIVE: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// A program under comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// mvm-vmm.
    Mvm,
    /// The least that KVM asks for.
    Floor,
    /// QEMU's machine for this purpose, with all that can be switched off switched off.
    Qemu,
}

/// What the programs are started with.
#[derive(Debug)]
pub(super) struct Setup {
    vmm: PathBuf,
    floor: PathBuf,
    flat: PathBuf,
    pvh: PathBuf,
    _dir: tempfile::TempDir,
}

impl Setup {
    /// Finds the programs beside this one and writes the guests.
    pub(super) fn new() -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let (flat, pvh) = (dir.path().join("flat"), dir.path().join("pvh"));
        fs::write(&flat, Program::Halt.image())?;
        fs::write(&pvh, pvh::image())?;
        let floor = crate::bench::beside("floor")?;
        let vmm = mvm_vmm::launch::find_program().map_err(io::Error::other)?;
        Ok(Self { vmm, floor, flat, pvh, _dir: dir })
    }
}

/// A machine that runs. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Running {
    pid: Pid,
    ended: bool,
    /// Spawn to first instruction, by the program's own stamp; QEMU has none.
    pub own_ns: Option<u64>,
    /// Spawn to the moment this process had read the report.
    pub seen_ns: u64,
    /// Ends the program when closed: the floor's input, the report that ours writes.
    held: Option<OwnedFd>,
}

impl Subject {
    pub(super) fn start(self, setup: &Setup) -> io::Result<Running> {
        let began = now();
        match self {
            Self::Mvm => mvm(setup, began),
            Self::Floor => {
                let mut command = Command::new(&setup.floor);
                command.stdin(Stdio::piped());
                with_report(command, began, 32, |text| text.trim_ascii().parse_u64())
            }
            Self::Qemu => with_report(qemu(&setup.pvh), began, 1, |_| None),
        }
    }
}

trait ParseNumber {
    fn parse_u64(&self) -> Option<u64>;
}

impl ParseNumber for [u8] {
    fn parse_u64(&self) -> Option<u64> {
        std::str::from_utf8(self).ok()?.parse().ok()
    }
}

fn mvm(setup: &Setup, began: u64) -> io::Result<Running> {
    let mut files = Files::default();
    let config = MachineConfig {
        memory: 128.try_into().map_err(io::Error::other)?,
        ..MachineConfig::new(
            "bench".parse().map_err(io::Error::other)?,
            files.add(File::options().read(true).write(true).open("/dev/kvm")?),
            Start::Boot(Boot::new(files.add(File::open(&setup.flat)?))),
        )
    };
    let launch = Launch { config, files, stderr: None };
    let mut child = launch.spawn_program(&setup.vmm).map_err(io::Error::other)?;
    let mut running = Running::new(child.pid, Some(child.events.as_fd().try_clone_to_owned()?));
    for event in child.events.by_ref() {
        match event? {
            Event::GuestFirstInstruction { ns } => {
                running.seen_ns = now() - began;
                running.own_ns = Some(ns - began);
                return Ok(running);
            }
            Event::Error { message, .. } => return Err(io::Error::other(message)),
            _ => {}
        }
    }
    Err(io::Error::other("the machine ended before its first instruction"))
}

/// Runs a command that reports the first instruction on standard output.
fn with_report(
    mut command: Command,
    began: u64,
    most: usize,
    stamp: impl Fn(&[u8]) -> Option<u64>,
) -> io::Result<Running> {
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let mut running = Running::new(pid, child.stdin.take().map(OwnedFd::from));
    let mut report = vec![0; most];
    let count = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?.read(&mut report)?;
    running.seen_ns = now() - began;
    if count == 0 {
        return Err(io::Error::other(format!("{command:?} ended before its first instruction")));
    }
    running.own_ns = stamp(&report[..count]).map(|at| at - began);
    Ok(running)
}

/// As QEMU's documentation of the machine recommends for the least: no firmware tables, no legacy devices.
fn qemu(guest: &Path) -> Command {
    let machine = "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off,\
        auto-kernel-cmdline=off";
    let port = pvh::PORT;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", machine, "-m", "128M", "-smp", "1", "-nodefaults", "-no-user-config"]);
    // The machines this is made on refuse to set the feature MSR that arch-capabilities announces.
    command.args(["-cpu", "host,-arch-capabilities", "-display", "none", "-no-reboot"]);
    command.args(["-chardev", "file,id=report,path=/proc/self/fd/1"]);
    command.args(["-device", &format!("isa-debugcon,iobase={port:#x},chardev=report")]);
    command.arg("-kernel").arg(guest).stdin(Stdio::null());
    command
}

impl Running {
    fn new(pid: Pid, held: Option<OwnedFd>) -> Self {
        ALIVE.lock().unwrap_or_else(PoisonError::into_inner).push(pid.as_raw());
        Self { pid, ended: false, own_ns: None, seen_ns: 0, held }
    }

    /// Its process.
    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// What ends the program when it is closed, for somebody else to keep.
    pub(super) fn give_up(&mut self) -> Option<OwnedFd> {
        self.held.take()
    }

    /// Asks the process to end and waits until it is gone. Returns how long that took, in nanoseconds.
    pub(super) fn end(mut self) -> io::Result<u64> {
        let began = now();
        self.reap(Signal::SIGTERM)?;
        Ok(now() - began)
    }

    fn reap(&mut self, signal: Signal) -> io::Result<()> {
        kill(self.pid, signal)?;
        waitpid(self.pid, None)?;
        self.ended = true;
        ALIVE.lock().unwrap_or_else(PoisonError::into_inner).retain(|pid| *pid != self.pid.as_raw());
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            // It is our child and not reaped yet.
            let _ = self.reap(Signal::SIGKILL);
        }
    }
}

/// Kills every machine: for a run that takes too long.
pub(super) fn kill_all() {
    for pid in ALIVE.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
