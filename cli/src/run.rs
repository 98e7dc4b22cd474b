//! `mvm run`: a container in a machine of its own, on this terminal, with its exit code as ours.

mod progress;
mod stdio;

use std::io::IsTerminal;

use mvm_runtime::agent::StdioSpec;
use mvm_runtime::container::{
    Container, Cost, NotRunnable, Overrides, Request, Upper, root_file_system, state_dir,
};
use mvm_runtime::failure::{Context, Failure};
use mvm_vmm::config::MachineId;
use nix::sys::signal::Signal;

use crate::args::Run;
use crate::terminal::{block_signals, size};
use crate::{say, terminal};

/// Signals that go to the container instead of ending `mvm`.
const FORWARDED: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

pub(crate) fn run(options: Run) -> Result<u8, Failure> {
    if options.tty && !std::io::stdin().is_terminal() {
        return Err(
            Failure::new("cannot give the container a terminal: standard input is none").help("leave -t out")
        );
    }
    let state = state_dir();
    let image = root_file_system(&options.image, &state, &mut progress::Bar::default())?;
    let request = request(&options)?;
    let overrides = overrides(&options);
    // What is wrong with the command is said before a machine is booted for it.
    let spec = overrides.process(&image.config, stdio(&options))?;
    // Before any thread starts, so that all of them leave these to the one that passes them on.
    let signals = block_signals(&FORWARDED).context(|| "cannot block signals".to_owned())?;

    let mut container = Container::boot(&request, &image, &state)?;
    let process = container.start(spec)?;
    let raw = if options.tty {
        Some(terminal::RawMode::enter().context(|| "cannot use this terminal".to_owned())?)
    } else {
        None
    };
    let status = stdio::serve(&container, process, signals);
    drop(raw);
    let status = status?;
    container.timeline.reach("process has ended");
    if options.stats {
        report(&container, request.memory.bytes());
    }
    container.end()?;
    Ok(status.shell_code())
}

/// The exit code a failure stands for, if it is about the container's program.
pub(crate) fn exit_code(failure: &Failure) -> Option<u8> {
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        if let Some(program) = error.downcast_ref::<NotRunnable>() {
            return Some(program.exit_code);
        }
        cause = error.source();
    }
    None
}

fn request(options: &Run) -> Result<Request, Failure> {
    let id = match &options.name {
        Some(name) => name.clone(),
        None => generated_name()?,
    };
    Ok(Request {
        id,
        cpus: options.shape.cpus,
        memory: options.shape.memory,
        net: options.net.clone(),
        read_only: options.read_only,
        upper: Upper::Memory,
        sockets: None,
    })
}

/// Twelve hex digits, as docker names a container.
fn generated_name() -> Result<MachineId, Failure> {
    let mut bytes = [0; 6];
    mvm_devices::sys::random(&mut bytes).context(|| "cannot get random bytes".to_owned())?;
    let name: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    name.parse().context(|| "cannot name the machine".to_owned())
}

fn overrides(options: &Run) -> Overrides {
    let passed_on = |variable: &String| match variable.split_once('=') {
        Some(_) => Some(variable.clone()),
        None => std::env::var(variable).ok().map(|value| format!("{variable}={value}")),
    };
    Overrides {
        entrypoint: options.entrypoint.clone(),
        command: options.command.clone(),
        env: options.env.iter().filter_map(passed_on).collect(),
        cwd: options.workdir.clone(),
        user: options.user.clone(),
    }
}

fn stdio(options: &Run) -> StdioSpec {
    if options.tty {
        StdioSpec::Terminal(size())
    } else {
        StdioSpec::Pipes { stdin: options.interactive, stdout: true, stderr: true }
    }
}

fn report(container: &Container, memory: u64) {
    say(container.timeline.to_string().trim_end());
    match Cost::of(container.machine.pid(), memory) {
        Ok(cost) => say(&format!(
            "memory: {} KiB = guest {} private + {} shared, VMM {}",
            cost.total_kib(),
            cost.guest_private_kib,
            cost.guest_shared_kib,
            cost.vmm_kib
        )),
        Err(error) => say(&format!("memory: unknown: {error}")),
    }
}
