//! Delete: a process is forgotten, and with an init its container.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::protobuf::MessageField;

use super::exit::DRAIN;
use super::{Exit, Name, Reply, State, Tasks};
use crate::bundle::Role;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::stdio::{Progress, Pumps};

/// What is told of a process when it is forgotten: the machine's process, and how it ended if it ever ran.
pub(crate) type Last = (u32, Option<Exit>);

impl Tasks {
    /// Forgets a process that does not run.
    pub(crate) fn delete(&mut self, name: Name, reply: Reply<Last>) {
        let container = name.container.clone();
        self.when_idle(&container, move |tasks| {
            let begun = if name.exec.is_empty() { tasks.begin_delete(&name) } else { tasks.take_exec(&name) };
            match begun {
                Err(error) => drop(reply.send(Err(error))),
                Ok((last, pumps)) => {
                    let me = tasks.me.clone();
                    tokio::spawn(async move {
                        flush(last.1, pumps).await;
                        me.tell(move |tasks| tasks.flushed_for_delete(name, last, reply));
                    });
                }
            }
        });
    }

    fn take_exec(&mut self, name: &Name) -> Result<(Last, Option<Pumps>)> {
        let pid = self.machine.pid();
        let container = self.container(&name.container)?;
        if container.process(&name.exec)?.is_alive() {
            return Err(Error::failed_precondition("cannot delete a running process"));
        }
        let process = container.execs.remove(&name.exec);
        let exit = process.as_ref().and_then(|process| *process.exit.borrow());
        let pumps = process.and_then(|process| match process.state {
            State::Stopped { pumps } => pumps,
            _ => None,
        });
        Ok(((pid, exit), pumps))
    }

    fn begin_delete(&mut self, name: &Name) -> Result<(Last, Option<Pumps>)> {
        let pid = self.machine.pid();
        let container = self.container(&name.container)?;
        if container.init.is_alive() {
            let what = if container.paused { "paused" } else { "running" };
            return Err(Error::failed_precondition(format!("cannot delete a {what} process")));
        }
        container.busy = true;
        let exit = *container.init.exit.borrow();
        // One that never ran ends here without a word: its machine's end must not tell of it.
        match std::mem::replace(&mut container.init.state, State::Stopped { pumps: None }) {
            State::Stopped { pumps } => Ok(((pid, exit), pumps)),
            _ => Ok(((pid, exit), None)),
        }
    }

    fn flushed_for_delete(&mut self, name: Name, last: Last, reply: Reply<Last>) {
        if !name.exec.is_empty() {
            return drop(reply.send(Ok(last)));
        }
        let id = name.container;
        let Some(role) = self.containers.get(&id).map(|container| container.role) else { return };
        match (role, self.sandbox()) {
            (Role::Member, Ok(sandbox)) => {
                let member = id.clone();
                self.blocking(
                    move || Arc::clone(&sandbox).remove(&member),
                    move |tasks, removed| {
                        if let Err(failure) = removed {
                            // The guest's rest goes with the machine.
                            log::error!("{}", failure.report());
                        }
                        tasks.forget(&id, last, reply);
                    },
                );
            }
            (Role::Member, Err(_)) => self.forget(&id, last, reply),
            (Role::Alone | Role::Sandbox, _) => {
                self.end_machine(Box::new(move |tasks| tasks.forget(&id, last, reply)));
            }
        }
    }

    fn forget(&mut self, id: &str, last: Last, reply: Reply<Last>) {
        let waiting = self.containers.remove(id).map(|container| container.waiting);
        let (pid, exit) = last;
        let event = TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(MessageField::none, |exit| MessageField::some(timestamp(exit.at))),
            ..Default::default()
        };
        self.publisher.publish("/tasks/delete", &event);
        let _ = reply.send(Ok(last));
        for job in waiting.into_iter().flatten() {
            job(self);
        }
    }
}

/// Waits for output that is still on its way, as long as is left of its time.
async fn flush(exit: Option<Exit>, pumps: Option<Pumps>) {
    let (Some(exit), Some(pumps)) = (exit, pumps) else { return };
    let passed = exit.at.elapsed().unwrap_or_default();
    pumps.reach(Progress::Closed, DRAIN.saturating_sub(passed)).await;
}
