//! Delete: a process is forgotten, and with an init its container.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::protobuf::MessageField;

use super::exit::DRAIN;
use super::{Exit, KILLED, Name, Reply, State, Tasks, now};
use crate::bundle::Role;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::stdio::{Progress, Pumps};

/// What is told of a process when it is forgotten: the machine's process, and how it ended. An exec that never ran
/// did not end.
pub(crate) type Last = (u32, Option<Exit>);

/// How long after an init's exit its deletion waits for output that nobody has read yet. containerd's CRI gives a
/// deletion ten seconds altogether. What an init has started ends with it: only a slow reader is waited for.
const INIT_DRAIN: Duration = Duration::from_secs(8);

impl Tasks {
    /// Forgets a process that does not run.
    pub(crate) fn delete(&mut self, name: Name, reply: Reply<Last>) {
        let container = name.container.clone();
        let reply = match name.exec.is_empty() {
            true => self.delete_creating(&container, reply),
            false => Some(reply),
        };
        let Some(reply) = reply else { return };
        self.when_idle(&container, move |tasks| {
            let begun = if name.exec.is_empty() { tasks.begin_delete(&name) } else { tasks.take_exec(&name) };
            match begun {
                Err(error) => drop(reply.send(Err(error))),
                Ok((last, pumps)) => {
                    let me = tasks.me.clone();
                    // An exec may leave behind who holds its streams for ever.
                    let time = if name.exec.is_empty() { INIT_DRAIN } else { DRAIN };
                    tokio::spawn(async move {
                        flush(last.1, pumps, time).await;
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
        let exit = container.init.exit.borrow().unwrap_or_else(|| Exit { status: KILLED, at: now() });
        container.init.exit.send_replace(Some(exit));
        let exit = Some(exit);
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
                let forget = move |tasks: &mut Self| tasks.forget(&id, last, reply);
                self.end_machine(Box::new(move |tasks| tasks.when_members_are_over(forget)));
            }
        }
    }

    fn forget(&mut self, id: &str, last: Last, reply: Reply<Last>) {
        let waiting = self.containers.remove(id).map(|container| {
            self.pass_record_on(&container);
            container.waiting
        });
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
        self.release_members_over();
        self.end_if_wanted();
    }
}

/// Waits for output that is still on its way, as long as is left of its time.
async fn flush(exit: Option<Exit>, pumps: Option<Pumps>, time: Duration) {
    let (Some(exit), Some(pumps)) = (exit, pumps) else { return };
    let passed = exit.at.elapsed().unwrap_or_default();
    pumps.reach(Progress::Closed, time.saturating_sub(passed)).await;
}
