//! `mvm boot`: a kernel in a machine, on this terminal or alone.

use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::machine::{Console, ConsoleKind, Kernel, Machine, Origin, Plan, describe, prepare};
use mvm_runtime::owner::FAILED;
use mvm_vmm::exit::Exit;
use mvm_vmm::kvm::probe::PVM;
use nix::sys::signal::Signal;

use crate::args::Boot;
use crate::say;
use crate::terminal::{RawMode, block_signals};

/// Control and right bracket: leaves the machine, as in telnet.
const ESCAPE: u8 = 0x1d;

pub(crate) fn boot(options: Boot) -> Result<u8, Failure> {
    let print = options.print_config;
    let plan = plan(options)?;
    if print {
        let text = serde_json::to_string_pretty(&describe(&plan)?)
            .context(|| "cannot print the configuration".to_owned())?;
        writeln!(stdout().lock(), "{text}").context(|| "cannot print the configuration".to_owned())?;
        return Ok(0);
    }
    let prepared = prepare(&plan)?;
    if mvm_vmm::kvm::probe::is_pvm() {
        // Not an error: kernels made for it, and flat guests, do run.
        say(&format!("mvm: warning: {PVM}"));
    }
    // Before any thread starts, so that all of them leave these to the one that waits for them.
    let signals = block_signals(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
        .context(|| "cannot block signals".to_owned())?;
    let stderr = std::io::stderr().lock();
    let stderr = std::os::fd::AsFd::as_fd(&stderr).try_clone_to_owned().ok();
    let mut machine = prepared.start(stderr)?;
    let pid = nix::unistd::Pid::from_raw(machine.pid());
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            // The machine ends in order and reports it.
            let _ = nix::sys::signal::kill(pid, Signal::SIGTERM);
        }
    });
    if let Some(calls) = machine.calls.take() {
        std::thread::spawn(move || calls.forward());
    }
    let left = Arc::new(AtomicBool::new(false));
    let raw = RawMode::enter().context(|| "cannot use this terminal".to_owned())?;
    let output = machine.console.take().map(|console| connect(console, pid, Arc::clone(&left)));
    let exit = machine.wait();
    if let Some(output) = output {
        // What the guest said last is printed before how it ended.
        let _ = output.join();
    }
    drop(raw);
    let exit = exit?;
    report(&machine, &exit, left.load(Ordering::Acquire));
    Ok(exit_code(&exit))
}

fn plan(options: Boot) -> Result<Plan, Failure> {
    let id = format!("boot-{}", std::process::id());
    let id = id.parse().context(|| "cannot name the machine".to_owned())?;
    let kernel = Kernel { image: options.kernel, initrd: options.initrd, cmdline: options.cmdline };
    Ok(Plan {
        cpus: options.shape.cpus,
        memory: options.shape.memory,
        disks: options.disk,
        nets: options.net,
        console: options.console.map(ConsoleKind::from),
        vsock: options.sockets.is_some(),
        devices: options.device,
        sockets: options.sockets,
        limits: (!options.limit.is_empty()).then_some(options.limit),
        ..Plan::new(id, Origin::Kernel(kernel))
    })
}

/// Pumps between this terminal and the machine's; the returned thread ends with the guest's output.
fn connect(
    console: Console,
    machine: nix::unistd::Pid,
    left: Arc<AtomicBool>,
) -> std::thread::JoinHandle<()> {
    let Console { mut to_guest, mut from_guest } = console;
    // In a file or a pipe the byte means itself.
    let typed_here = stdin().is_terminal();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stdin().lock().read(&mut bytes) {
            let typed = &bytes[..count];
            let escape = typed.iter().position(|byte| typed_here && *byte == ESCAPE);
            if to_guest.write_all(&typed[..escape.unwrap_or(count)]).is_err() {
                return;
            }
            if escape.is_some() {
                left.store(true, Ordering::Release);
                let _ = nix::sys::signal::kill(machine, Signal::SIGTERM);
                return;
            }
        }
    });
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from_guest.read(&mut bytes) {
            let mut out = stdout().lock();
            if out.write_all(&bytes[..count]).and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    })
}

fn report(machine: &Machine, exit: &Exit, left: bool) {
    let what = if left { "left with Ctrl-]".to_owned() } else { exit.to_string() };
    say(&format!("mvm: machine {}: {what}", machine.id()));
}

/// One code for each way a machine ends; listed in the help of `mvm boot`.
fn exit_code(exit: &Exit) -> u8 {
    match exit {
        Exit::Shutdown => 0,
        Exit::Reboot => 3,
        Exit::GuestPanic => 4,
        Exit::TripleFault => 5,
        Exit::Stopped => 6,
        Exit::InternalError { .. } | Exit::MemoryLost { .. } => FAILED,
    }
}
