//! Virtual CPUs: one thread each, that enters the guest and serves its exits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::gate::{Gate, Pass};
use crate::jail::{self, Thread};
use crate::kvm::{Vm, failure};
use crate::metrics::Counters;
use crate::snapshot::vcpu::{SaveVcpu, VcpuState};
use crate::status::{Event, now};

/// Stack of a vCPU thread: exits are served without recursion or large arrays.
const STACK_SIZE: usize = 128 * 1024;

/// Most accesses that one instruction may still have to make when its CPU is held.
const MAX_UNFINISHED: usize = 4096;

/// What a virtual CPU that is held is sent for. Whoever waits for it gets the CPU's number along.
#[derive(Clone, Debug)]
pub(crate) enum Errand {
    /// To complete the instruction it is in the middle of.
    Settle(Sender<(u8, Result<()>)>),
    /// Its state, once all have settled.
    Save(Arc<SaveVcpu>, Sender<(u8, Result<VcpuState>)>),
}

/// What KVM made of an entry.
enum Entered {
    /// An exit was served.
    Served,
    /// A signal, or the wish not to enter at all, came first.
    Interrupted,
    /// The machine has ended.
    End(Exit),
}

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
pub(crate) struct Running {
    thread: JoinHandle<()>,
    errands: Sender<Errand>,
}

impl Running {
    /// Makes the vCPU leave the guest soon. A kick that comes just before it enters is lost: repeat until seen.
    pub(crate) fn kick(&self) {
        // Fails only if the thread has ended, which is what a kick is for.
        let _ = self.thread.kill(kick_signal());
    }

    /// Leaves `errand` for the vCPU, which goes on it once the gate sends it.
    pub(crate) fn leave(&self, errand: Errand) {
        // A thread that has ended answers nobody.
        let _ = self.errands.send(errand);
    }
}

impl Vcpu {
    /// Starts the thread. It ends by itself once the machine has an [`Exit`].
    pub(crate) fn start(self) -> Result<Running> {
        let name = format!("vcpu{}", self.id);
        let (errands, received) = mpsc::channel();
        std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_SIZE)
            .spawn(move || self.run(&received))
            .map(|thread| Running { thread, errands })
            .map_err(Error::system("start a vCPU thread"))
    }

    fn run(mut self, received: &Receiver<Errand>) {
        if let Err(error) = jail::confine(Thread::Vcpu) {
            let detail = format!("cannot confine the thread of a virtual CPU: {error}");
            return self.gate.finish(Exit::InternalError { detail });
        }
        let first = AtomicBool::new(self.id == 0);
        let mut errands = 0;
        loop {
            match self.gate.pass(&mut errands) {
                Pass::On => {}
                Pass::Errand => {
                    while let Ok(errand) = received.try_recv() {
                        self.go(errand);
                    }
                    continue;
                }
                // Keeps the guest's watchdogs quiet. Fails in guests without the clock, which have none.
                Pass::Resumed => drop(self.fd.kvmclock_ctrl()),
                Pass::End => return,
            }
            let run_ns = if first.load(Ordering::Relaxed) { now() } else { 0 };
            let entered = self.enter();
            if first.swap(false, Ordering::Relaxed) {
                self.bus.status.send(&Event::FirstExit { run_ns, ns: now() });
            }
            if let Entered::End(exit) = entered {
                self.gate.finish(exit);
                return;
            }
        }
    }

    fn go(&mut self, errand: Errand) {
        // Nobody listens if it took too long.
        match errand {
            Errand::Settle(to) => drop(to.send((self.id, self.settle()))),
            Errand::Save(save, to) => drop(to.send((self.id, save.save(&self.fd)))),
        }
    }

    /// Brings the CPU between two instructions.
    fn settle(&mut self) -> Result<()> {
        self.fd.set_kvm_immediate_exit(1);
        // What the last exit began is only completed by entering once more, which may bring the next part of it.
        let settled = (0..MAX_UNFINISHED).find_map(|_| match self.enter() {
            Entered::Served => None,
            Entered::Interrupted => Some(true),
            Entered::End(exit) => {
                self.gate.finish(exit);
                Some(false)
            }
        });
        self.fd.set_kvm_immediate_exit(0);
        match settled {
            Some(true) => Ok(()),
            Some(false) => Err(Error::Ended),
            None => Err(Error::Unfinished(self.id)),
        }
    }

    /// Runs the guest up to its next exit and serves that.
    fn enter(&mut self) -> Entered {
        match self.serve() {
            Ok(served) => served.map_or(Entered::Served, Entered::End),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                Counters::add(&self.bus.counters.interrupted);
                Entered::Interrupted
            }
            Err(error) => Entered::End(Exit::InternalError { detail: format!("KVM_RUN failed: {error}") }),
        }
    }

    fn serve(&mut self) -> Result<Option<Exit>, kvm_ioctls::Error> {
        let bus = &self.bus;
        let end = match self.fd.run()? {
            VcpuExit::MmioWrite(address, data) => {
                bus.write(address, data);
                None
            }
            VcpuExit::MmioRead(address, data) => {
                bus.read(address, data);
                None
            }
            VcpuExit::IoOut(port, data) => bus.port_out(port, data),
            VcpuExit::IoIn(port, data) => {
                bus.port_in(port, data);
                None
            }
            VcpuExit::Shutdown => Some(Exit::TripleFault),
            VcpuExit::SystemEvent(kind, _) => Some(system_event(kind)),
            VcpuExit::FailEntry(reason, _) => Some(failure::entry(reason)),
            VcpuExit::InternalError => Some(failure::internal(&mut self.fd)),
            VcpuExit::MemoryFault { gpa, .. } => Some(failure::memory(gpa)),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::IoapicEoi(_) => {
                Counters::add(&bus.counters.other);
                None
            }
            exit => Some(Exit::InternalError {
                detail: format!("KVM gave an exit this machine does not know: {exit:?}"),
            }),
        };
        Ok(end)
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
