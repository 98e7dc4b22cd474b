//! Checkpoint: a task's machine is saved with it, into a directory that containerd keeps.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::events::task::TaskCheckpointed;
use mvm_protocol::SignalTarget;
use mvm_runtime::failure::Failure;
use mvm_runtime::sandbox::{CheckpointRequest, Sandbox};
use nix::libc::SIGKILL;

use super::{Job, Name, Reply, State, Tasks};
use crate::bundle::Role;
use crate::error::{Error, Result};

/// A checkpoint as a client asks for it.
#[derive(Clone, Debug)]
pub(crate) struct NewCheckpoint {
    /// The task.
    pub(crate) id: String,
    /// Where to.
    pub(crate) directory: PathBuf,
    /// The task is to end with it.
    pub(crate) exit: bool,
}

/// All that saving on another thread needs.
struct Begun {
    id: String,
    request: CheckpointRequest,
    /// It is paused for this, and only for this.
    pause: bool,
    sandbox: Arc<dyn Sandbox>,
}

impl Begun {
    fn save(&self) -> std::result::Result<(), Failure> {
        let paused = if self.pause { self.sandbox.pause(&self.id) } else { Ok(()) };
        let saved = paused.and_then(|()| self.sandbox.checkpoint(&self.id, &self.request));
        // One whose answer is lost may have been paused.
        if saved.is_err()
            && self.pause
            && let Err(failure) = self.sandbox.resume(&self.id)
        {
            log::error!("{}", failure.report());
        }
        saved
    }
}

impl Tasks {
    /// Saves a task, which goes on, or ends if that is wanted.
    pub(crate) fn checkpoint(&mut self, wanted: NewCheckpoint, reply: Reply<()>) {
        let id = wanted.id.clone();
        self.when_idle(&id, move |tasks| match tasks.begin_checkpoint(&wanted) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(begun) => tasks.blocking(
                move || begun.save(),
                move |tasks, saved| {
                    tasks.checkpointed(&wanted, saved, reply);
                    tasks.idle(&wanted.id);
                },
            ),
        });
    }

    fn begin_checkpoint(&mut self, wanted: &NewCheckpoint) -> Result<Begun> {
        let NewCheckpoint { id, directory, exit } = wanted;
        if !directory.is_absolute() || !directory.is_dir() {
            let text = format!("{} is no directory for a checkpoint", directory.display());
            return Err(Error::invalid_argument(text));
        }
        let sandbox = self.sandbox();
        let container = self.container(id)?;
        let refused =
            |what: &str| Err(Error::failed_precondition(format!("cannot checkpoint a {what} container")));
        match container.init.state {
            State::Created { .. } | State::Starting => return refused("created"),
            State::Ending { .. } | State::Stopped { .. } => return refused("stopped"),
            State::Running { .. } | State::Virtual => {}
        }
        if container.role != Role::Alone {
            return Err(Error::failed_precondition(format!(
                "cannot checkpoint {id}: it shares its pod's machine, and a machine is saved as a whole"
            )));
        }
        let sandbox = sandbox?;
        container.busy = true;
        container.saving = true;
        // Who is to end does nothing more that its checkpoint does not know.
        let (pause, paused) = (*exit && !container.paused, *exit || container.paused);
        let terminal = container.init.stdio.terminal;
        let request = CheckpointRequest { directory: directory.clone(), terminal, paused };
        Ok(Begun { id: id.clone(), request, pause, sandbox })
    }

    fn checkpointed(
        &mut self,
        wanted: &NewCheckpoint,
        saved: std::result::Result<(), Failure>,
        reply: Reply<()>,
    ) {
        let id = &wanted.id;
        if let Ok(container) = self.container(id) {
            container.saving = false;
        }
        if let Err(failure) = saved {
            log::warn!("task {id} not saved: {}", failure.report());
            return drop(reply.send(Err(failure.into())));
        }
        let checkpoint = wanted.directory.to_string_lossy().into_owned();
        let event = TaskCheckpointed { container_id: id.clone(), checkpoint, ..Default::default() };
        self.publisher.publish("/tasks/checkpointed", &event);
        let init = Name { container: id.clone(), exec: String::new() };
        match self.process(&init).map(|process| &process.state) {
            Ok(State::Running { id, .. }) if wanted.exit => {
                let what = (*id, SIGKILL, SignalTarget::Process);
                self.signal(&init, what, reply);
            }
            _ => drop(reply.send(Ok(()))),
        }
    }

    /// Does something once the container is not being saved: until then its guest would refuse it.
    pub(super) fn when_saved(&mut self, container: &str, job: impl FnOnce(&mut Self) + Send + 'static) {
        match self.containers.get_mut(container) {
            Some(container) if container.saving => container.waiting.push_back(Box::new(job) as Job),
            _ => job(self),
        }
    }
}
