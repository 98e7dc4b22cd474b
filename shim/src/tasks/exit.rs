//! Exit: a process has ended. It is told once, after its output is out, and an init's after all others'.

use std::time::Duration;

use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::MessageField;
use mvm_protocol::SignalTarget;
use nix::libc::SIGKILL;

use super::{Exit, KILLED, Name, State, Tasks, Ticket, now};
use crate::bundle::Role;
use crate::events::timestamp;
use crate::stdio::Progress;

/// How long an exit waits for the process's output: what it left behind may hold its streams open for ever.
pub(super) const DRAIN: Duration = Duration::from_secs(2);

impl Tasks {
    /// A process has ended in the guest, or with it. Only the first word counts.
    pub(super) fn process_exited(&mut self, ticket: &Ticket, status: u32) {
        let Some(process) = self.holder(ticket) else { return };
        let State::Running { .. } = &process.state else { return };
        let State::Running { pumps, .. } = std::mem::replace(&mut process.state, State::Starting) else {
            return;
        };
        let drained = pumps.reach(Progress::Drained, DRAIN);
        process.state = State::Ending { pumps };
        let (me, ticket, exit) = (self.me.clone(), ticket.clone(), Exit { status, at: now() });
        tokio::spawn(async move {
            drained.await;
            me.tell(move |tasks| tasks.process_drained(&ticket, exit));
        });
    }

    /// A process that its guest does not end is said to have ended.
    pub(super) fn give_up(&mut self, ticket: &Ticket) {
        self.abandon(ticket);
        self.process_exited(ticket, KILLED);
    }

    /// Nobody waits any more for the guest's word that a process has ended.
    fn abandon(&mut self, ticket: &Ticket) {
        let Ok(sandbox) = self.sandbox() else { return };
        if let Some(State::Running { id, .. }) = self.holder(ticket).map(|process| &process.state) {
            sandbox.abandon(*id);
        }
    }

    fn process_drained(&mut self, ticket: &Ticket, exit: Exit) {
        if self.holder(ticket).is_none() {
            return;
        }
        let name = &ticket.name;
        if !name.exec.is_empty() {
            self.process_is_over(name, exit);
            return self.release_held_exit(&name.container);
        }
        let Ok(container) = self.container(&name.container) else { return };
        if !container.execs.values().any(super::Process::is_alive) {
            return self.process_is_over(name, exit);
        }
        container.held_exit = Some(exit);
        self.kill_execs(&name.container);
        let (me, ticket) = (self.me.clone(), ticket.clone());
        tokio::spawn(async move {
            tokio::time::sleep(DRAIN).await;
            me.tell(move |tasks| tasks.force_held_exit(&ticket));
        });
    }

    /// An init takes all others of its container with it, wherever they live.
    fn kill_execs(&mut self, id: &str) {
        let (Ok(sandbox), Some(container)) = (self.sandbox(), self.containers.get(id)) else { return };
        for process in container.execs.values() {
            if let State::Running { id, .. } = process.state {
                let sandbox = std::sync::Arc::clone(&sandbox);
                self.blocking(move || sandbox.signal(id, SIGKILL, SignalTarget::Process), |_, _| {});
            }
        }
    }

    /// Tells an init's exit once its execs are over.
    pub(super) fn release_held_exit(&mut self, id: &str) {
        let Ok(container) = self.container(id) else { return };
        if container.execs.values().any(super::Process::is_alive) {
            return;
        }
        if let Some(exit) = container.held_exit.take() {
            self.process_is_over(&Name { container: id.to_owned(), exec: String::new() }, exit);
        }
    }

    /// Execs that do not end although their init has are given up.
    fn force_held_exit(&mut self, init: &Ticket) {
        if self.holder(init).is_none() {
            return;
        }
        let id = &init.name.container;
        let Ok(container) = self.container(id) else { return };
        if container.held_exit.is_none() {
            return;
        }
        let alive = container.execs.iter().filter(|(_, exec)| exec.is_alive());
        let names: Vec<_> = alive.map(|(exec, _)| exec.clone()).collect();
        for exec in names {
            let name = Name { container: id.clone(), exec };
            if let Ok(ticket) = self.ticket(&name) {
                self.abandon(&ticket);
            }
            self.process_is_over(&name, Exit { status: KILLED, at: now() });
        }
        self.release_held_exit(id);
    }

    /// Tells everybody that a process has ended.
    pub(super) fn process_is_over(&mut self, name: &Name, exit: Exit) {
        self.publish_memory_kills(&name.container);
        let pid = self.machine.pid();
        let Ok(process) = self.process(name) else { return };
        let stopped = State::Stopped { pumps: None };
        let pumps = match std::mem::replace(&mut process.state, stopped) {
            State::Stopped { pumps } => {
                process.state = State::Stopped { pumps };
                return;
            }
            State::Ending { pumps } | State::Running { pumps, .. } => Some(pumps),
            State::Created { .. } | State::Starting | State::Virtual => None,
        };
        let is_drained = pumps.as_ref().is_none_or(|pumps| pumps.has_reached(Progress::Drained));
        process.state = State::Stopped { pumps };
        let id = if name.exec.is_empty() { &name.container } else { &name.exec };
        let event = TaskExit {
            container_id: name.container.clone(),
            id: id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        };
        process.exit.send_replace(Some(exit));
        self.publisher.publish("/tasks/exit", &event);
        let role = self.containers.get(&name.container).map(|container| container.role);
        let ends_machine = match role {
            // A machine that still holds output waits for the task to be deleted.
            Some(Role::Alone) => name.exec.is_empty() && is_drained,
            Some(Role::Sandbox) => true,
            Some(Role::Member) | None => false,
        };
        if ends_machine {
            self.end_machine(Box::new(|_| {}));
        }
        self.release_members_over();
    }
}
