//! Start: a container's init or an exec begins to run.

use std::sync::Arc;

use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskStart};
use mvm_protocol::ExitStatus;
use mvm_runtime::agent::Process as GuestProcess;
use mvm_runtime::sandbox::Sandbox;
use oci_spec::runtime::Process as OciProcess;

use super::machine::{Machine, waiting_thread};
use super::{Exit, KILLED, Name, Process, Reply, State, Tasks, now};
use crate::bundle::Role;
use crate::error::{Error, Result};
use crate::stdio::{Owner, Paths, Pumps, Streams};

/// What came of starting a process, and what it was started with.
struct Started {
    process: Box<OciProcess>,
    streams: Option<Streams>,
    outcome: Result<GuestProcess>,
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
    fn begin_start(&mut self, name: &Name) -> Result<Option<(Box<OciProcess>, Option<Streams>)>> {
        let container = self.container(&name.container)?;
        let is_init = name.exec.is_empty();
        if !is_init && !matches!(container.init.state, State::Running { .. }) {
            let text = format!("container {} init process is not running", name.container);
            return Err(Error::failed_precondition(text));
        }
        if !is_init && container.paused {
            return Err(Error::failed_precondition("cannot exec in a paused state"));
        }
        let role = container.role;
        let process = container.process(&name.exec)?;
        let next = if role == Role::Sandbox { State::Virtual } else { State::Starting };
        match std::mem::replace(&mut process.state, next) {
            State::Created { process, streams } => {
                container.busy = is_init && role != Role::Sandbox;
                Ok((role != Role::Sandbox).then_some((process, streams)))
            }
            other => {
                let what = if matches!(other, State::Stopped { .. }) { "stopped" } else { "running" };
                process.state = other;
                Err(Error::failed_precondition(format!("cannot start a {what} process")))
            }
        }
    }

    fn start_in_guest(
        &mut self,
        name: Name,
        (process, streams): (Box<OciProcess>, Option<Streams>),
        reply: Reply<u32>,
    ) {
        let sandbox = self.sandbox();
        let Ok(record) = self.process(&name) else { return };
        let (paths, size) = (record.stdio.clone(), record.size);
        let owner = Owner { namespace: self.place.namespace.clone(), container: name.container.clone() };
        let container = name.container.clone();
        self.blocking(
            move || {
                let streams = match streams {
                    Some(streams) => Ok(streams),
                    None => paths.open(&owner),
                };
                let (streams, outcome) = match (streams, sandbox) {
                    (Ok(streams), Ok(sandbox)) => {
                        let started = sandbox.start(&container, &process, paths.spec(size));
                        (Some(streams), started.map_err(Error::from))
                    }
                    (Err(error), _) | (Ok(_), Err(error)) => (None, Err(error)),
                };
                Started { process, streams, outcome }
            },
            move |tasks, started| tasks.started(&name, started, reply),
        );
    }

    fn started(&mut self, name: &Name, started: Started, reply: Reply<u32>) {
        let Started { process, streams, outcome } = started;
        match outcome.and_then(|guest| self.attach(name, guest, streams)) {
            Ok(pid) => drop(reply.send(Ok(pid))),
            Err(error) => {
                log::warn!("process {name:?} not started: {error}");
                self.not_started(name, process);
                let _ = reply.send(Err(error));
            }
        }
        if name.exec.is_empty() {
            self.idle(&name.container);
        } else {
            self.release_held_exit(&name.container);
        }
    }

    /// Connects a process that runs, and tells of it before its end can be told.
    fn attach(&mut self, name: &Name, guest: GuestProcess, streams: Option<Streams>) -> Result<u32> {
        let sandbox = self.sandbox()?;
        let id = guest.id;
        let mut pumps = Pumps::start(streams.unwrap_or_default(), guest)
            .map_err(|error| Error::failed(format!("cannot carry the process's streams: {error}")))?;
        let process = self.process(name)?;
        if process.stdin_closed {
            pumps.close_stdin();
        }
        process.state = State::Running { id, pumps };
        let pid = self.publish_start(name);
        self.await_exit(name.clone(), id, sandbox);
        Ok(pid)
    }

    /// A process that could not be started is as it was, unless its machine is lost.
    fn not_started(&mut self, name: &Name, process: Box<OciProcess>) {
        let Ok(record) = self.process(name) else { return };
        record.state = State::Created { process, streams: None };
        if name.exec.is_empty() && !matches!(self.machine, Machine::Up(_)) {
            self.process_is_over(name, Exit { status: KILLED, at: now() });
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

    fn await_exit(&self, name: Name, id: u64, sandbox: Arc<dyn Sandbox>) {
        let me = self.me.clone();
        waiting_thread("process", move || {
            let status = sandbox.wait(id).map(ExitStatus::shell_code);
            drop(sandbox);
            let status = status.map_or(KILLED, u32::from);
            me.tell(move |tasks| tasks.process_exited(&name, status));
        });
    }
}
