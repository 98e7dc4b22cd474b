//! Start: a container's init or an exec begins to run.

use std::sync::Arc;

use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskStart};
use mvm_protocol::{ExitStatus, SignalTarget, WindowSize};
use mvm_runtime::agent::Process as GuestProcess;
use mvm_runtime::sandbox::Sandbox;
use nix::libc::SIGKILL;
use oci_spec::runtime::Process as OciProcess;

use super::machine::{Machine, waiting_thread};
use super::{Exit, KILLED, Name, Process, Reply, State, Tasks, Ticket, now};
use crate::bundle::Role;
use crate::error::{Error, Result};
use crate::stdio::{Input, Outputs, Owner, Paths, Pumps};

/// All that starting a process on another thread needs.
struct Begun {
    process: Box<OciProcess>,
    outputs: Option<Outputs>,
    stdio: Paths,
    size: WindowSize,
    owner: Owner,
    sandbox: Arc<dyn Sandbox>,
    restored: Option<GuestProcess>,
}

/// A process that runs, and what its streams are to be connected to.
struct Started {
    guest: GuestProcess,
    input: Option<Input>,
    outputs: Outputs,
}

impl Begun {
    fn start(&mut self) -> Result<Started> {
        let outputs = match self.outputs.take() {
            Some(outputs) => outputs,
            None => self.stdio.open_outputs(&self.owner)?,
        };
        let input = self.stdio.open_input()?;
        let guest = match self.restored.take() {
            Some(guest) => self.go_on(guest)?,
            None => {
                let spec = self.stdio.spec(self.size);
                self.sandbox.start(&self.owner.container, &self.process, spec)?
            }
        };
        Ok(Started { guest, input, outputs })
    }

    /// Lets a container go on that was restored.
    fn go_on(&self, guest: GuestProcess) -> Result<GuestProcess> {
        if self.stdio.terminal && self.size != WindowSize::default() {
            self.sandbox.resize(guest.id, self.size)?;
        }
        self.sandbox.resume(&self.owner.container)?;
        Ok(guest)
    }
}

impl Tasks {
    /// Adds an exec, to be started later.
    pub(crate) fn exec(&mut self, name: Name, process: Box<OciProcess>, stdio: Paths, reply: Reply<()>) {
        let added = self.container(&name.container).and_then(|container| {
            if name.exec.is_empty() {
                return Err(Error::invalid_argument("an exec needs an id"));
            }
            if container.execs.contains_key(&name.exec) {
                return Err(Error::already_exists(format!("id {}", name.exec)));
            }
            if container.role == Role::Sandbox {
                return Err(Error::failed_precondition("nothing can be executed in a pod's sandbox"));
            }
            match container.init.state {
                State::Running { .. } if container.paused => {
                    Err(Error::failed_precondition("cannot exec in a paused state"))
                }
                State::Running { .. } => Ok(()),
                State::Created { .. } | State::Starting | State::Virtual => {
                    Err(Error::failed_precondition("cannot exec in a created state"))
                }
                State::Ending { .. } | State::Stopped { .. } => {
                    Err(Error::failed_precondition("cannot exec in a stopped state"))
                }
            }?;
            container.execs.insert(name.exec.clone(), Process::new(stdio, process, None));
            Ok(())
        });
        if added.is_ok() {
            let event =
                TaskExecAdded { container_id: name.container, exec_id: name.exec, ..Default::default() };
            self.publisher.publish("/tasks/exec-added", &event);
        }
        let _ = reply.send(added);
    }

    /// Starts an init or an exec; answers with the machine's process.
    pub(crate) fn start(&mut self, name: Name, reply: Reply<u32>) {
        let container = name.container.clone();
        self.when_idle(&container, move |tasks| match tasks.begin_start(&name) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(None) => {
                let pid = tasks.publish_start(&name);
                let _ = reply.send(Ok(pid));
            }
            Ok(Some(begun)) => tasks.start_in_guest(name, begun, reply),
        });
    }

    /// Takes what a start needs out of the process. `None` is a sandbox, which runs from here on.
    fn begin_start(&mut self, name: &Name) -> Result<Option<Begun>> {
        let sandbox = self.sandbox();
        let owner = Owner { namespace: self.place.namespace.clone(), container: name.container.clone() };
        let container = self.container(&name.container)?;
        let is_init = name.exec.is_empty();
        if !is_init && !matches!(container.init.state, State::Running { .. }) {
            let text = format!("container {} init process is not running", name.container);
            return Err(Error::failed_precondition(text));
        }
        if !is_init && container.paused {
            return Err(Error::failed_precondition("cannot exec in a paused state"));
        }
        let is_sandbox = container.role == Role::Sandbox;
        let process = container.process(&name.exec)?;
        if !matches!(process.state, State::Created { .. }) {
            let what = if matches!(process.state, State::Stopped { .. }) { "stopped" } else { "running" };
            return Err(Error::failed_precondition(format!("cannot start a {what} process")));
        }
        let sandbox = sandbox?;
        let next = if is_sandbox { State::Virtual } else { State::Starting };
        let (stdio, size, restored) = (process.stdio.clone(), process.size, process.restored.take());
        match std::mem::replace(&mut process.state, next) {
            State::Created { process, outputs } if !is_sandbox => {
                container.busy = is_init;
                Ok(Some(Begun { process, outputs, stdio, size, owner, sandbox, restored }))
            }
            _ => Ok(None),
        }
    }

    fn start_in_guest(&mut self, name: Name, mut begun: Begun, reply: Reply<u32>) {
        self.blocking(
            move || {
                let outcome = begun.start();
                (begun.process, outcome)
            },
            move |tasks, (process, outcome)| {
                let outcome = outcome.and_then(|started| tasks.attach(&name, started));
                if let Err(error) = &outcome {
                    log::warn!("process {name:?} not started: {error}");
                    tasks.not_started(&name, process, error);
                }
                let _ = reply.send(outcome);
                if name.exec.is_empty() {
                    tasks.idle(&name.container);
                } else {
                    tasks.release_held_exit(&name.container);
                }
            },
        );
    }

    /// Connects a process that runs, and tells of it before its end can be told.
    fn attach(&mut self, name: &Name, started: Started) -> Result<u32> {
        let sandbox = self.sandbox()?;
        let id = started.guest.id;
        if let Err(error) = self.connect(name, started) {
            // It runs, and is nobody's.
            sandbox.abandon(id);
            self.blocking(move || sandbox.signal(id, SIGKILL, SignalTarget::Process), |_, _| {});
            return Err(error);
        }
        let pid = self.publish_start(name);
        let ticket = self.ticket(name)?;
        self.await_exit(ticket, id, sandbox);
        Ok(pid)
    }

    fn connect(&mut self, name: &Name, started: Started) -> Result<()> {
        let id = started.guest.id;
        if !matches!(self.process(name)?.state, State::Starting) {
            // Its end was told while it was started: that stands.
            return Err(Error::failed_precondition("the process was given up while it was started"));
        }
        let mut pumps = Pumps::start(started.input, started.outputs, started.guest)
            .map_err(|error| Error::failed(format!("cannot carry the process's streams: {error}")))?;
        let process = self.process(name)?;
        if process.stdin_closed {
            pumps.close_stdin();
        }
        process.state = State::Running { id, pumps };
        Ok(())
    }

    /// An exec that could not be started is as it was. An init is over, with nobody to tell: that it started was not
    /// told either. If the machine was lost meanwhile, that is told as of any other task.
    fn not_started(&mut self, name: &Name, process: Box<OciProcess>, error: &Error) {
        let is_up = matches!(self.machine, Machine::Up(_));
        let Ok(container) = self.container(&name.container) else { return };
        let role = container.role;
        let Ok(record) = container.process(&name.exec) else { return };
        if !matches!(record.state, State::Starting) {
            // Its end was told while it was started: that stands.
            return;
        }
        record.state = State::Created { process, outputs: None };
        if !name.exec.is_empty() {
            return;
        }
        if !is_up {
            return self.process_is_over(name, Exit { status: KILLED, at: now() });
        }
        record.state = State::Stopped { pumps: None };
        record.exit.send_replace(Some(Exit { status: error.exit_status(), at: now() }));
        if role == Role::Alone {
            self.end_machine(Box::new(|_| {}));
        }
    }

    fn publish_start(&self, name: &Name) -> u32 {
        let pid = self.machine.pid();
        let container_id = name.container.clone();
        if name.exec.is_empty() {
            let event = TaskStart { container_id, pid, ..Default::default() };
            self.publisher.publish("/tasks/start", &event);
        } else {
            let event =
                TaskExecStarted { container_id, exec_id: name.exec.clone(), pid, ..Default::default() };
            self.publisher.publish("/tasks/exec-started", &event);
        }
        pid
    }

    fn await_exit(&self, ticket: Ticket, id: u64, sandbox: Arc<dyn Sandbox>) {
        let me = self.me.clone();
        waiting_thread("process", move || {
            let status = sandbox.wait(id).map(ExitStatus::shell_code);
            drop(sandbox);
            let status = status.map_or(KILLED, u32::from);
            me.tell(move |tasks| tasks.process_exited(&ticket, status));
        });
    }
}
