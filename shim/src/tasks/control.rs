//! What is asked of processes and containers in between: state, pausing, limits, sizes, figures.

use mvm_protocol::{RootStats, WindowSize};
use mvm_runtime::failure::Failure;
use oci_spec::runtime::LinuxResources;
use tokio::sync::watch;

use super::{Exit, Name, Reply, Report, State, Status, Tasks};
use crate::bundle::Role;
use crate::error::{Error, Result};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use std::sync::Arc;

impl Tasks {
    /// What is known of a process.
    pub(crate) fn report(&mut self, name: &Name) -> Result<Report> {
        let pid = self.machine.pid();
        let container = self.container(&name.container)?;
        let paused = container.paused;
        let bundle = container.bundle.to_string_lossy().into_owned();
        let process = container.process(&name.exec)?;
        let status = match process.status() {
            Status::Running if paused => Status::Paused,
            status => status,
        };
        let exit = *process.exit.borrow();
        Ok(Report { bundle, pid, status, stdio: process.stdio.clone(), exit })
    }

    /// Turns into how a process ended.
    pub(crate) fn watch(&mut self, name: &Name) -> Result<watch::Receiver<Option<Exit>>> {
        self.process(name).map(|process| process.exit.subscribe())
    }

    /// The machine's process.
    pub(crate) fn pid(&mut self, container: &str) -> Result<u32> {
        self.container(container)?;
        Ok(self.machine.pid())
    }

    /// Stops or continues all processes of a container.
    pub(crate) fn set_paused(&mut self, id: &str, paused: bool, reply: Reply<()>) {
        let container = id.to_owned();
        self.when_idle(id, move |tasks| {
            let virtually = match tasks.check_pause(&container, paused) {
                Err(error) => return drop(reply.send(Err(error))),
                Ok(virtually) => virtually,
            };
            if virtually {
                tasks.paused(&container, paused, Ok(()), reply);
                return;
            }
            let sandbox = match tasks.sandbox() {
                Err(error) => return drop(reply.send(Err(error))),
                Ok(sandbox) => sandbox,
            };
            if let Ok(container) = tasks.container(&container) {
                container.busy = true;
            }
            let id = container.clone();
            tasks.blocking(
                move || if paused { sandbox.pause(&id) } else { sandbox.resume(&id) },
                move |tasks, done| {
                    tasks.paused(&container, paused, done, reply);
                    tasks.idle(&container);
                },
            );
        });
    }

    /// Whether pausing is possible, and whether there is nothing to do in the guest.
    fn check_pause(&mut self, id: &str, pause: bool) -> Result<bool> {
        let container = self.container(id)?;
        let verb = if pause { "pause" } else { "resume" };
        let refused =
            |what: &str| Err(Error::failed_precondition(format!("cannot {verb} a {what} container")));
        match (&container.init.state, container.paused) {
            (State::Created { .. } | State::Starting, _) => refused("created"),
            (State::Ending { .. } | State::Stopped { .. }, _) => refused("stopped"),
            (_, true) if pause => refused("paused"),
            (_, false) if !pause => refused("running"),
            _ => Ok(container.role == Role::Sandbox),
        }
    }

    fn paused(&mut self, id: &str, paused: bool, done: std::result::Result<(), Failure>, reply: Reply<()>) {
        if done.is_ok()
            && let Ok(container) = self.container(id)
        {
            container.paused = paused;
            let container_id = id.to_owned();
            if paused {
                self.publisher.publish("/tasks/paused", &TaskPaused { container_id, ..Default::default() });
            } else {
                let event = TaskResumed { container_id, ..Default::default() };
                self.publisher.publish("/tasks/resumed", &event);
            }
        }
        let _ = reply.send(done.map_err(Error::from));
    }

    /// Changes a container's limits.
    pub(crate) fn update(&mut self, id: &str, resources: LinuxResources, reply: Reply<()>) {
        let container = id.to_owned();
        self.when_idle(id, move |tasks| {
            let checked = tasks.container(&container).and_then(|container| match container.init.state {
                State::Ending { .. } | State::Stopped { .. } => {
                    Err(Error::failed_precondition("cannot update a stopped container"))
                }
                _ => Ok(container.role),
            });
            match checked.and_then(|role| Ok((role, tasks.sandbox()?))) {
                Err(error) => drop(reply.send(Err(error))),
                // Its limits are those of the machine, which are made with it.
                Ok((Role::Sandbox, _)) => drop(reply.send(Ok(()))),
                Ok((_, sandbox)) => {
                    if let Ok(container) = tasks.container(&container) {
                        container.busy = true;
                    }
                    let id = container.clone();
                    tasks.blocking(
                        move || sandbox.update(&id, &resources),
                        move |tasks, updated| {
                            let _ = reply.send(updated.map_err(Error::from));
                            tasks.idle(&container);
                        },
                    );
                }
            }
        });
    }

    /// Sets the size of a process's terminal, now or when it starts.
    pub(crate) fn resize(&mut self, name: Name, size: WindowSize, reply: Reply<()>) {
        let container = name.container.clone();
        self.when_saved(&container, move |tasks| tasks.resize_now(&name, size, reply));
    }

    fn resize_now(&mut self, name: &Name, size: WindowSize, reply: Reply<()>) {
        let process = match self.process(name) {
            Err(error) => return drop(reply.send(Err(error))),
            Ok(process) => process,
        };
        process.size = size;
        let answer = match process.state {
            State::Created { .. } | State::Starting | State::Virtual => Ok(()),
            State::Ending { .. } | State::Stopped { .. } => {
                Err(Error::failed_precondition("cannot resize a stopped container"))
            }
            State::Running { .. } if !process.stdio.terminal => {
                Err(Error::failed_precondition("the process has no terminal"))
            }
            State::Running { id, .. } => match self.sandbox() {
                Err(error) => Err(error),
                Ok(sandbox) => {
                    return self.blocking(
                        move || sandbox.resize(id, size),
                        move |_, resized| drop(reply.send(resized.map_err(Error::from))),
                    );
                }
            },
        };
        let _ = reply.send(answer);
    }

    /// The client writes no more to a process's standard input.
    pub(crate) fn close_stdin(&mut self, name: &Name) -> Result<()> {
        let process = self.process(name)?;
        process.stdin_closed = true;
        if let State::Running { pumps, .. } = &mut process.state {
            pumps.close_stdin();
        }
        Ok(())
    }

    /// A container's use of its resources; `None` for a pod's sandbox, which uses none.
    pub(crate) fn stats(&mut self, id: String, reply: Reply<Option<RootStats>>) {
        self.when_saved(&id.clone(), move |tasks| tasks.stats_now(&id, reply));
    }

    fn stats_now(&mut self, id: &str, reply: Reply<Option<RootStats>>) {
        self.publish_memory_kills(id);
        let checked = self.container(id).and_then(|container| match container.init.state {
            State::Ending { .. } | State::Stopped { .. } => {
                Err(Error::not_found("the container has stopped"))
            }
            _ => Ok(container.role),
        });
        match checked.and_then(|role| Ok((role, self.sandbox()?))) {
            Err(error) => drop(reply.send(Err(error))),
            Ok((Role::Sandbox, _)) => drop(reply.send(Ok(None))),
            Ok((_, sandbox)) => {
                let id = id.to_owned();
                self.blocking(
                    move || Arc::clone(&sandbox).stats(&id),
                    move |_, stats| drop(reply.send(stats.map(Some).map_err(Error::from))),
                );
            }
        }
    }
}
