//! A pod's sandbox and the containers in it: the sandbox is over last.
//!
//! containerd stops and deletes a pod's containers before its sandbox, but what it is told of them and what it asks
//! may cross. Whatever order it asks in, each container's end is told once, and before that of the sandbox.

use std::time::Duration;

use super::{Container, Exit, Name, Process, Tasks};
use crate::bundle::{Record, Role};

/// How long a sandbox that was ended leaves its containers to end by themselves.
const MEMBERS_TIME: Duration = Duration::from_secs(2);

impl Tasks {
    /// A sandbox has ended: that is told once none of its containers lives.
    pub(super) fn sandbox_is_over(&mut self, name: &Name, exit: Exit) {
        let Ok(container) = self.container(&name.container) else { return };
        if container.held_exit.is_some() {
            return;
        }
        container.held_exit = Some(exit);
        let name = name.clone();
        self.when_members_are_over(move |tasks| {
            let exit = tasks.container(&name.container).ok().and_then(|container| container.held_exit.take());
            if let Some(exit) = exit {
                tasks.process_is_over(&name, exit);
            }
        });
    }

    /// Does something once no container of the pod lives. Those that live for too long end with the machine.
    pub(super) fn when_members_are_over(&mut self, job: impl FnOnce(&mut Self) + Send + 'static) {
        if !self.has_living_member() {
            return job(self);
        }
        self.members_over.push(Box::new(job));
        let me = self.me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(MEMBERS_TIME).await;
            me.tell(|tasks| {
                if !tasks.members_over.is_empty() {
                    tasks.end_machine(Box::new(|_| {}));
                }
            });
        });
    }

    /// A container is over: it may have been the last that somebody waited for.
    pub(super) fn release_members_over(&mut self) {
        if !self.has_living_member() {
            for job in std::mem::take(&mut self.members_over) {
                job(self);
            }
        }
    }

    fn has_living_member(&self) -> bool {
        let lives = |container: &Container| {
            container.init.is_alive() || container.execs.values().any(Process::is_alive)
        };
        self.containers.values().any(|container| container.role == Role::Member && lives(container))
    }

    /// A container is forgotten. If its bundle says whom to end when it is removed, another's says so from now on:
    /// nobody may end this daemon while it has containers.
    pub(super) fn pass_record_on(&mut self, from: &Container) {
        let Some(next) = self.containers.values().next() else { return };
        if self.keeper.as_ref() != Some(&from.bundle) {
            return;
        }
        // Whoever keeps the record, the machine has gone with it or is of those that stay.
        if let Err(failure) = self.place.record(&next.bundle, None) {
            log::error!("{}", failure.report());
        }
        self.keeper = Some(next.bundle.clone());
        Record::remove(&from.bundle);
    }
}
