//! `mvm run`: a container in a machine of its own, on this terminal, with its exit code as ours.

mod progress;

use std::sync::Arc;

use mvm_protocol::{SignalTarget, WindowSize};
use mvm_runtime::agent::{AgentClient, StdioSpec};
use mvm_runtime::container::{
    Container, Cost, NotRunnable, Overrides, Request, Upper, root_file_system, state_dir,
};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::net::NetRequest;
use mvm_runtime::owner::Refused;
use mvm_vmm::config::MachineId;
use nix::sys::signal::Signal;

use crate::args::Run;
use crate::say;
use crate::stdio::{self, Streams, Target};
use crate::terminal::size;

pub(crate) fn run(options: Run) -> Result<u8, Failure> {
    stdio::check_terminal(options.tty)?;
    let state = state_dir();
    let image = root_file_system(&options.image, &state, &mut progress::Bar::default())?;
    let request = request(&options)?;
    let overrides = overrides(&options);
    // What is wrong with the command is said before a machine is booted for it.
    let spec = overrides.process(&image.config, connected(&options))?;
    let signals = stdio::hold_signals()?;

    let mut container = Container::boot(&request, &image, &state)?;
    let process = container.start(spec)?;
    let id = process.id;
    let target = Guest { agent: Arc::clone(&container.agent), process: id, machine: container.machine.pid() };
    let streams = Streams {
        terminal: process.terminal,
        stdin: process.stdin,
        stdout: process.stdout,
        stderr: process.stderr,
    };
    let code = stdio::serve(streams, signals, target, || {
        let status = container.agent.wait(id, None);
        status.map(|it| it.shell_code()).context(|| "cannot learn how the process ended".to_owned())
    })?;
    container.timeline.reach("process has ended");
    if options.stats {
        report(&container, request.memory.bytes());
    }
    container.end()?;
    Ok(code)
}

/// A container's process.
struct Guest {
    agent: Arc<AgentClient>,
    process: u64,
    machine: i32,
}

impl Target for Guest {
    fn resize(&self, size: WindowSize) {
        let _ = self.agent.resize(self.process, size);
    }

    fn signal(&self, signal: Signal) {
        let _ = self.agent.signal(self.process, signal as i32, SignalTarget::Process);
    }

    fn give_up(&self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.machine), Signal::SIGKILL);
    }
}

/// The exit code a failure stands for, if it is about the container's program.
pub(crate) fn exit_code(failure: &Failure) -> Option<u8> {
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        if let Some(program) = error.downcast_ref::<NotRunnable>() {
            return Some(program.exit_code);
        }
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(refused.exit_code);
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
        net: NetRequest {
            choice: options.net.clone(),
            publish: options.publish.clone(),
            dns: options.dns.clone(),
            mtu: options.mtu,
        },
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

/// Variables as given, or of our own environment where only the name is.
pub(crate) fn passed_on(variables: &[String]) -> Vec<String> {
    let value = |variable: &String| match variable.split_once('=') {
        Some(_) => Some(variable.clone()),
        None => std::env::var(variable).ok().map(|value| format!("{variable}={value}")),
    };
    variables.iter().filter_map(value).collect()
}

fn overrides(options: &Run) -> Overrides {
    Overrides {
        entrypoint: options.entrypoint.clone(),
        command: options.command.clone(),
        env: passed_on(&options.env),
        cwd: options.workdir.clone(),
        user: options.user.clone(),
    }
}

fn connected(options: &Run) -> StdioSpec {
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
