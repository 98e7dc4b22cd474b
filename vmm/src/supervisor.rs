//! The main thread of a running machine: control socket, signals, serial input, and the end.

mod pause;
mod requests;
mod snapshot;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use mvm_devices::serial::INPUT_SIZE;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::config::MachineConfig;
use crate::control::server::Server;
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::machine::Machine;
use crate::vcpu::Running;
use requests::Subject;

/// How often serial input that the guest has not read is offered again.
const INPUT_INTERVAL: u8 = 10;

const FINISHED: u64 = 0;
const SIGNAL: u64 = 1;
const SERIAL_INPUT: u64 = 2;
const ORPHANED: u64 = 3;
const CONTROL: u64 = 4;

/// Waits on everything that can happen to a running machine.
#[derive(Debug)]
pub(crate) struct Supervisor<'a> {
    subject: Subject<'a>,
    epoll: Epoll,
    signals: SignalFd,
    control: Option<Server>,
    /// Serial input that was read and not yet taken by the port.
    pending_input: Vec<u8>,
}

/// Blocks the signals that stop a machine: they are read, not delivered. Before any thread starts.
pub(crate) fn block_signals() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(Error::system("block signals"))?;
    Ok(signals)
}

impl<'a> Supervisor<'a> {
    /// Takes over `machine`, whose `vcpus` run.
    pub(crate) fn new(
        config: &'a MachineConfig,
        machine: Machine,
        vcpus: Vec<Running>,
        signals: &SigSet,
        control: Option<OwnedFd>,
    ) -> Result<Self> {
        let failed = || Error::system::<Errno>("watch for events");
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed())?;
        let signals =
            SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(failed())?;
        let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        epoll.add(machine.gate.finished(), readable(FINISHED)).map_err(failed())?;
        epoll.add(signals.as_fd(), readable(SIGNAL)).map_err(failed())?;
        machine.bus.status.watch_reader(&epoll, ORPHANED);
        if let Some(input) = &machine.serial_input {
            // A regular file cannot be watched; it has no input worth waiting for.
            let _ = epoll.add(input.as_fd(), readable(SERIAL_INPUT));
        }
        let control = control
            .map(|socket| Server::new(socket, &epoll, CONTROL))
            .transpose()
            .map_err(Error::system("listen on the control socket"))?;
        let subject = Subject { config, machine, vcpus };
        Ok(Self { subject, epoll, signals, control, pending_input: Vec::new() })
    }

    /// Serves events until the machine has ended.
    pub(crate) fn run(&mut self) -> Exit {
        let mut events = [EpollEvent::empty(); 8];
        loop {
            if let Some(exit) = self.subject.machine.gate.exit() {
                return exit;
            }
            let timeout = if self.pending_input.is_empty() {
                EpollTimeout::NONE
            } else {
                EpollTimeout::from(INPUT_INTERVAL)
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    return Exit::InternalError { detail: format!("cannot wait for events: {error}") };
                }
            };
            for event in events.iter().take(count) {
                self.ready(event.data());
            }
            self.offer_input();
        }
    }

    fn ready(&mut self, token: u64) {
        match token {
            FINISHED => {} // seen at the top of the loop
            SIGNAL => {
                if matches!(self.signals.read_signal(), Ok(Some(_))) {
                    self.subject.machine.gate.finish(Exit::Stopped);
                }
            }
            // Whoever started the machine is gone, and with it whatever the machine was for.
            ORPHANED => self.subject.machine.gate.finish(Exit::Stopped),
            SERIAL_INPUT => self.read_input(),
            _ => {
                if let Some(control) = &mut self.control {
                    let subject = &mut self.subject;
                    control.ready(token, &self.epoll, |request, files| subject.answer(&request, files));
                }
            }
        }
    }

    fn read_input(&mut self) {
        let Some(input) = &mut self.subject.machine.serial_input else { return };
        let mut bytes = [0; INPUT_SIZE];
        match read_some(input, &mut bytes) {
            // What the guest does not read must not pile up: one buffer of it waits at most.
            Some(count) if self.pending_input.len() < INPUT_SIZE => {
                self.pending_input.extend(bytes.iter().take(count));
            }
            Some(_) => {}
            None => {
                let _ = self.epoll.delete(input.as_fd());
                self.subject.machine.serial_input = None;
            }
        }
    }

    fn offer_input(&mut self) {
        if let (Some(serial), false) = (&self.subject.machine.bus.serial, self.pending_input.is_empty()) {
            // A vCPU that has it may wait for the host's file; there is a next time.
            let Ok(mut port) = serial.port.try_lock() else { return };
            let taken = port.push_input(&self.pending_input);
            self.pending_input.drain(..taken);
        }
    }
}

/// Bytes read, or `None` at the end of the input or on an error.
fn read_some(input: &mut File, bytes: &mut [u8]) -> Option<usize> {
    match input.read(bytes) {
        Ok(0) => None,
        Ok(count) => Some(count),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Some(0),
        Err(_) => None,
    }
}
