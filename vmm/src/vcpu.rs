//! Virtual CPUs: one thread each, that enters the guest and serves its exits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::gate::{Gate, Pass};
use crate::kvm::{Vm, failure};
use crate::metrics::Counters;
use crate::status::{Event, now};

/// Stack of a vCPU thread: exits are served without recursion or large arrays.
const STACK_SIZE: usize = 128 * 1024;

/// A virtual CPU that has not started.
#[derive(Debug)]
pub(crate) struct Vcpu {
    /// Number, and APIC identifier.
    pub id: u8,
    /// KVM's descriptor.
    pub fd: VcpuFd,
    /// The machine, whose memory the guest runs in.
    pub _vm: Arc<Vm>,
    /// Where its accesses go.
    pub bus: Arc<Bus>,
    /// Lets it pass, or holds it.
    pub gate: Arc<Gate>,
}

/// The signal that makes a vCPU leave the guest.
pub(crate) fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Makes [`kick_signal`] interrupt system calls and do nothing else.
pub(crate) fn install_kick_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), nothing).map_err(|error| Error::System {
        operation: "install a signal handler",
        source: io::Error::from_raw_os_error(error.errno()),
    })
}

/// A running vCPU thread.
#[derive(Debug)]
pub(crate) struct Running(JoinHandle<()>);

impl Running {
    /// Makes the vCPU leave the guest soon. A kick that comes just before it enters is lost: repeat until seen.
    pub(crate) fn kick(&self) {
        // Fails only if the thread has ended, which is what a kick is for.
        let _ = self.0.kill(kick_signal());
    }
}

impl Vcpu {
    /// Starts the thread. It ends by itself once the machine has an [`Exit`].
    pub(crate) fn start(self) -> Result<Running> {
        let name = format!("vcpu{}", self.id);
        std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_SIZE)
            .spawn(move || self.run())
            .map(Running)
            .map_err(Error::system("start a vCPU thread"))
    }

    fn run(mut self) {
        let first = AtomicBool::new(self.id == 0);
        loop {
            match self.gate.pass() {
                Pass::On => {}
                // Keeps the guest's watchdogs quiet. Fails in guests without the clock, which have none.
                Pass::Resumed => drop(self.fd.kvmclock_ctrl()),
                Pass::End => return,
            }
            let run_ns = if first.load(Ordering::Relaxed) { now() } else { 0 };
            let exit = self.enter();
            if first.swap(false, Ordering::Relaxed) {
                self.bus.status.send(&Event::FirstExit { run_ns, ns: now() });
            }
            if let Some(exit) = exit {
                self.gate.finish(exit);
                return;
            }
        }
    }

    /// Runs the guest up to its next exit and serves that.
    fn enter(&mut self) -> Option<Exit> {
        let bus = &self.bus;
        match self.fd.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => bus.write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.read(address, data),
            Ok(VcpuExit::IoOut(port, data)) => return bus.port_out(port, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
            Ok(VcpuExit::Shutdown) => return Some(Exit::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => return Some(system_event(kind)),
            Ok(VcpuExit::FailEntry(reason, _)) => return Some(failure::entry(reason)),
            Ok(VcpuExit::InternalError) => return Some(failure::internal(&mut self.fd)),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => return Some(failure::memory(gpa)),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::IoapicEoi(_)) => {
                Counters::add(&bus.counters.other);
            }
            Ok(exit) => {
                return Some(Exit::InternalError {
                    detail: format!("KVM gave an exit this machine does not know: {exit:?}"),
                });
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                Counters::add(&bus.counters.interrupted);
            }
            Err(error) => return Some(Exit::InternalError { detail: format!("KVM_RUN failed: {error}") }),
        }
        None
    }
}

fn system_event(kind: u32) -> Exit {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Exit::Shutdown,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Exit::Reboot,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Exit::GuestPanic,
        _ => Exit::InternalError {
            detail: format!("KVM gave system event {kind}, which this machine does not know"),
        },
    }
}
