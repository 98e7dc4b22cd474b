//! Create: a container is made, and with the first of a group the machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::types::mount::Mount;
use mvm_runtime::agent::{Process as GuestProcess, StdioSpec};
use mvm_runtime::failure::Failure;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, RestoreRequest, RootfsMount, Sandbox};
use mvm_runtime::state::Wish;
use oci_spec::runtime::Process as OciProcess;

use super::delete::Last;
use super::machine::{Machine, Place};
use super::process::console_size;
use super::{Container, Process, Reply, Tasks, program};
use crate::bundle::{self, Role};
use crate::error::{Error, Result};
use crate::stdio::{Outputs, Owner, Paths};

/// A task as a client asks for it.
#[derive(Debug)]
pub(crate) struct NewTask {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle's directory.
    pub(crate) bundle: PathBuf,
    /// Its root file system, as the snapshotter gave it.
    pub(crate) rootfs: Vec<Mount>,
    /// Its init's outputs.
    pub(crate) stdio: Paths,
    /// The directory of the checkpoint it goes on from.
    pub(crate) checkpoint: Option<PathBuf>,
}

/// All that is needed to make one, on another thread.
struct Recipe {
    request: ContainerRequest,
    role: Role,
    stdio: Paths,
    checkpoint: Option<PathBuf>,
    place: Arc<Place>,
    launcher: Arc<dyn Launcher>,
    /// The pod's machine, if it is up.
    sandbox: Option<Arc<dyn Sandbox>>,
    /// Whether it is still wanted.
    wish: Wish,
}

/// What was made.
struct Made {
    role: Role,
    process: Box<OciProcess>,
    sandbox: Arc<dyn Sandbox>,
    booted: bool,
    outputs: Outputs,
    /// The process in the guest, if it goes on from a checkpoint.
    restored: Option<GuestProcess>,
}

/// A container that is being made.
#[derive(Default)]
pub(super) struct Creating {
    /// Nobody wants it any more: what is made of it is undone.
    unwanted: Arc<AtomicBool>,
    /// Who asked for its deletion.
    deletions: Vec<Reply<Last>>,
}

impl Creating {
    /// Nobody wants it any more. If it waits for other machines to start, it does no longer.
    pub(super) fn give_up(&self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }

    fn is_unwanted(&self) -> bool {
        self.unwanted.load(Ordering::Relaxed)
    }

    fn wish(&self) -> Wish {
        let unwanted = Arc::clone(&self.unwanted);
        Wish::new(move || !unwanted.load(Ordering::Relaxed))
    }
}

impl Tasks {
    /// Makes a container; answers with the machine's process.
    pub(crate) fn create(&mut self, task: NewTask, reply: Reply<u32>) {
        let creating = Creating::default();
        match self.recipe(&task, creating.wish()) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(recipe) => {
                self.creating.insert(task.id.clone(), creating);
                if recipe.sandbox.is_none() {
                    self.machine = Machine::Booting;
                }
                self.blocking(move || recipe.make(), move |tasks, made| tasks.created(task, made, reply));
            }
        }
    }

    fn recipe(&self, task: &NewTask, wish: Wish) -> Result<Recipe> {
        if self.containers.contains_key(&task.id) || self.creating.contains_key(&task.id) {
            return Err(Error::already_exists(format!("task {}", task.id)));
        }
        let spec = bundle::spec(&task.bundle)?;
        let role = Role::of(&spec);
        if task.checkpoint.is_some() && role != Role::Alone {
            let text = "a checkpoint is of a whole machine, and a pod's is made empty";
            return Err(Error::failed_precondition(format!("cannot restore {}: {text}", task.id)));
        }
        let sandbox = match (role, &self.machine) {
            (Role::Member, Machine::Up(sandbox)) => Some(Arc::clone(sandbox)),
            (Role::Member, _) => return Err(Error::failed_precondition("the pod's machine does not run")),
            (_, Machine::Absent | Machine::Gone { .. }) if self.containers.is_empty() => None,
            _ => return Err(Error::failed_precondition("this shim has a machine, and it is no pod's")),
        };
        let rootfs = task.rootfs.iter().map(rootfs_mount).collect();
        Ok(Recipe {
            request: ContainerRequest { id: task.id.clone(), bundle: task.bundle.clone(), spec, rootfs },
            role,
            stdio: task.stdio.clone(),
            checkpoint: task.checkpoint.clone(),
            place: Arc::clone(&self.place),
            launcher: Arc::clone(&self.launcher),
            sandbox,
            wish,
        })
    }

    /// If the container is being made, it is to be deleted: says so once it is undone.
    pub(super) fn delete_creating(&mut self, id: &str, reply: Reply<Last>) -> Option<Reply<Last>> {
        let Some(creating) = self.creating.get_mut(id) else { return Some(reply) };
        creating.give_up();
        creating.deletions.push(reply);
        None
    }

    fn created(&mut self, task: NewTask, made: Result<Made>, reply: Reply<u32>) {
        let booting = matches!(self.machine, Machine::Booting);
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                if booting {
                    self.machine = Machine::Absent;
                }
                log::warn!("task {} not made: {error}", task.id);
                let _ = reply.send(Err(error));
                return self.not_created(&task.id);
            }
        };
        let pid = made.sandbox.pid();
        if made.booted {
            self.keeper = Some(task.bundle.clone());
            self.machine_is_up(Arc::clone(&made.sandbox));
        }
        if self.creating.get(&task.id).is_none_or(Creating::is_unwanted) {
            return self.undo(task.id, made, reply);
        }
        self.creating.remove(&task.id);
        let mut init = Process::new(task.stdio.clone(), made.process, Some(made.outputs));
        init.restored = made.restored;
        self.containers.insert(task.id.clone(), Container::new(made.role, task.bundle.clone(), init));
        self.publisher.publish("/tasks/create", &created_event(task, pid));
        let _ = reply.send(Ok(pid));
    }

    /// Undoes what was made for nobody: with its machine, or in a pod's, which the others need.
    fn undo(&mut self, id: String, made: Made, reply: Reply<u32>) {
        let container = id.clone();
        let undone = move |tasks: &mut Self| {
            let _ = reply.send(Err(Error::failed("nobody wants the task any more")));
            tasks.not_created(&container);
        };
        if made.booted {
            return self.end_machine(Box::new(undone));
        }
        self.blocking(
            move || made.sandbox.remove(&id),
            move |tasks, removed| {
                if let Err(failure) = removed {
                    log::error!("{}", failure.report());
                }
                undone(tasks);
            },
        );
    }

    /// A creation is over and gave nothing. The daemon may have been told to end meanwhile.
    fn not_created(&mut self, id: &str) {
        let creating = self.creating.remove(id).unwrap_or_default();
        for deletion in creating.deletions {
            let _ = deletion.send(Err(Error::not_found("container not created")));
        }
        self.end_if_wanted();
    }
}

impl Recipe {
    fn make(mut self) -> Result<Made> {
        let owner = Owner { namespace: self.place.namespace.clone(), container: self.request.id.clone() };
        let outputs = self.stdio.open_outputs(&owner)?;
        if let Some(checkpoint) = self.checkpoint.take() {
            return self.restore(checkpoint, outputs);
        }
        let (sandbox, booted) = match &self.sandbox {
            Some(sandbox) => (Arc::clone(sandbox), false),
            None => (self.boot()?, true),
        };
        if let Err(error) = self.furnish(&*sandbox, booted) {
            // The first failure is the one to tell.
            let _ = if booted { sandbox.end() } else { sandbox.remove(&self.request.id) };
            return Err(error);
        }
        let process = Box::new(self.request.spec.process_mut().take().unwrap_or_default());
        Ok(Made { role: self.role, process, sandbox, booted, outputs, restored: None })
    }

    /// The container goes on from a checkpoint, with its machine; its processes stand still.
    fn restore(self, checkpoint: PathBuf, outputs: Outputs) -> Result<Made> {
        let process = Box::new(self.request.spec.process().clone().unwrap_or_default());
        // What the process has is taken, wherever it goes.
        let stdio = match self.stdio.spec(console_size(&process)) {
            StdioSpec::Pipes { stdin, .. } => StdioSpec::Pipes { stdin, stdout: true, stderr: true },
            terminal => terminal,
        };
        let from = RestoreRequest { checkpoint, stdio };
        let (sandbox, restored) = self.place.restore(&*self.launcher, &self.request, &from, self.wish)?;
        let ContainerRequest { bundle, spec, .. } = &self.request;
        if let Err(failure) = self.place.machine_is_up(bundle, spec, sandbox.pid()) {
            // The first failure is the one to tell.
            let _ = sandbox.end();
            return Err(failure.into());
        }
        Ok(Made { role: self.role, process, sandbox, booted: true, outputs, restored: Some(restored) })
    }

    fn boot(&self) -> std::result::Result<Arc<dyn Sandbox>, Failure> {
        let pod = self.role == Role::Sandbox;
        self.place.boot(&*self.launcher, &self.request.spec, pod, self.wish.clone())
    }

    /// Makes the container. A machine for one container may have waited for it to boot.
    fn furnish(&self, sandbox: &dyn Sandbox, booted: bool) -> Result<()> {
        let ContainerRequest { id, bundle, spec, .. } = &self.request;
        if self.role != Role::Sandbox {
            sandbox.create(&self.request)?;
        }
        if booted {
            self.place.machine_is_up(bundle, spec, sandbox.pid())?;
        }
        match spec.process() {
            Some(process) if self.role != Role::Sandbox => program::check(sandbox, id, process),
            _ => Ok(()),
        }
    }
}

fn rootfs_mount(mount: &Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

fn created_event(task: NewTask, pid: u32) -> TaskCreate {
    let io = TaskIO {
        stdin: task.stdio.stdin,
        stdout: task.stdio.stdout,
        stderr: task.stdio.stderr,
        terminal: task.stdio.terminal,
        ..Default::default()
    };
    TaskCreate {
        container_id: task.id,
        bundle: task.bundle.to_string_lossy().into_owned(),
        rootfs: task.rootfs,
        checkpoint: task.checkpoint.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        io: MessageField::some(io),
        pid,
        ..Default::default()
    }
}
