//! The main thread of a running machine: control socket, signals, serial input, and the end.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use mvm_devices::serial::INPUT_SIZE;
use mvm_devices::transport::VirtioPci;
use mvm_devices::virtio::balloon;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::config::MachineConfig;
use crate::control::server::Server;
use crate::control::{Answer, Balloon, DeviceMetrics, Info, MachineState, Metrics, Reply, Request};
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::log;
use crate::machine::Machine;
use crate::vcpu::Running;

/// How long virtual CPUs may take to be held.
const PAUSE_TIME: Duration = Duration::from_secs(1);
/// Memory a balloon leaves to its guest, in MiB.
const LEAST_MIB: u64 = 32;
/// How often serial input that the guest has not read is offered again.
const INPUT_INTERVAL: u8 = 10;

const FINISHED: u64 = 0;
const SIGNAL: u64 = 1;
const SERIAL_INPUT: u64 = 2;
const CONTROL: u64 = 3;

/// Waits on everything that can happen to a running machine.
#[derive(Debug)]
pub(crate) struct Supervisor<'a> {
    config: &'a MachineConfig,
    machine: Machine,
    vcpus: Vec<Running>,
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
        if let Some(input) = &machine.serial_input {
            // A regular file cannot be watched; it has no input worth waiting for.
            let _ = epoll.add(input.as_fd(), readable(SERIAL_INPUT));
        }
        let control = control
            .map(|socket| Server::new(socket, &epoll, CONTROL))
            .transpose()
            .map_err(Error::system("listen on the control socket"))?;
        Ok(Self { config, machine, vcpus, epoll, signals, control, pending_input: Vec::new() })
    }

    /// Serves events until the machine has ended.
    pub(crate) fn run(&mut self) -> Exit {
        let mut events = [EpollEvent::empty(); 8];
        loop {
            if let Some(exit) = self.machine.gate.exit() {
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
                    self.machine.gate.finish(Exit::Stopped);
                }
            }
            SERIAL_INPUT => self.read_input(),
            _ => {
                // Taken out for the call, because answering needs the rest of `self`.
                if let Some(mut control) = self.control.take() {
                    control.ready(token, &self.epoll, |request| self.answer(&request));
                    self.control = Some(control);
                }
            }
        }
    }

    fn answer(&self, request: &Request) -> Reply {
        match request {
            Request::Info => Reply::Ok(Answer::Info(self.info())),
            Request::Metrics => Reply::Ok(Answer::Metrics(self.metrics())),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Stop => {
                self.machine.gate.finish(Exit::Stopped);
                Reply::Ok(Answer::Done {})
            }
            Request::Balloon { target_mib } => self.balloon(*target_mib),
        }
    }

    /// Sets the balloon's target and tells the driver; a guest keeps [`LEAST_MIB`] to live on.
    fn balloon(&self, target_mib: u64) -> Reply {
        let target_mib = target_mib.min(self.config.memory.mib().saturating_sub(LEAST_MIB));
        let pages_per_mib = (1 << 20) / balloon::PAGE_SIZE;
        let mut reply = Reply::Error("this machine has no balloon".to_owned());
        self.machine.bus.pci.for_each_virtio(|device| {
            if let ("balloon", Some(space)) = (device.kind().name, device.config_space()) {
                let pages = u32::try_from(target_mib * pages_per_mib).unwrap_or(u32::MAX);
                balloon::set_target(space, pages);
                let actual_mib = u64::from(balloon::actual(space)) / pages_per_mib;
                device.notify_config_changed();
                reply = Reply::Ok(Answer::Balloon(Balloon { target_mib, actual_mib }));
            }
        });
        reply
    }

    /// Holds the CPUs, then the devices: from then on nothing touches guest memory.
    fn pause(&self) -> Reply {
        let kick = || self.vcpus.iter().for_each(Running::kick);
        if !self.machine.gate.pause(self.vcpus.len(), Instant::now() + PAUSE_TIME, kick) {
            return Reply::Error("the virtual CPUs did not come to a halt in time; they will".to_owned());
        }
        self.each_device("hold", VirtioPci::pause)
    }

    fn resume(&self) -> Reply {
        let reply = self.each_device("let go on", VirtioPci::resume);
        self.machine.gate.resume();
        reply
    }

    fn each_device<E: std::error::Error>(
        &self,
        what: &str,
        action: impl Fn(&mut VirtioPci) -> Result<(), E>,
    ) -> Reply {
        let mut reply = Reply::Ok(Answer::Done {});
        self.machine.bus.pci.for_each_virtio(|device| {
            if let Err(error) = action(device) {
                reply = Reply::Error(format!("cannot {what} {}: {error}", device.kind().name));
            }
        });
        reply
    }

    fn info(&self) -> Info {
        Info {
            id: self.config.id.as_str().to_owned(),
            pid: std::process::id(),
            state: if self.machine.gate.is_paused() { MachineState::Paused } else { MachineState::Running },
            cpus: self.config.cpus.get(),
            memory_mib: self.config.memory.mib(),
        }
    }

    fn metrics(&self) -> Metrics {
        let bus = &self.machine.bus;
        let dropped =
            bus.serial.as_ref().map(|serial| serial.lock().unwrap_or_else(PoisonError::into_inner).dropped());
        Metrics {
            exits: bus.counters.exits(),
            devices: self.devices(),
            serial_dropped: dropped.unwrap_or(0),
            log_suppressed: log::suppressed(),
        }
    }

    fn devices(&self) -> Vec<DeviceMetrics> {
        let mut devices = Vec::new();
        self.machine.bus.pci.for_each_virtio(|device| {
            devices.push(DeviceMetrics {
                name: device.kind().name.to_owned(),
                driver_ready: device.driver_ready(),
                needs_reset: device.needs_reset(),
                counts: device
                    .counters()
                    .iter()
                    .map(|count| (count.name().to_owned(), count.get()))
                    .collect(),
            });
        });
        devices
    }

    fn read_input(&mut self) {
        let Some(input) = &mut self.machine.serial_input else { return };
        let mut bytes = [0; INPUT_SIZE];
        match read_some(input, &mut bytes) {
            // What the guest does not read must not pile up: one buffer of it waits at most.
            Some(count) if self.pending_input.len() < INPUT_SIZE => {
                self.pending_input.extend(bytes.iter().take(count));
            }
            Some(_) => {}
            None => {
                let _ = self.epoll.delete(input.as_fd());
                self.machine.serial_input = None;
            }
        }
    }

    fn offer_input(&mut self) {
        if let (Some(serial), false) = (&self.machine.bus.serial, self.pending_input.is_empty()) {
            let taken = serial.lock().unwrap_or_else(PoisonError::into_inner).push_input(&self.pending_input);
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
