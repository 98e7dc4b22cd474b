//! Create: a container is made, and with the first of a group the machine.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::types::mount::Mount;
use mvm_runtime::failure::Failure;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, RootfsMount, Sandbox};
use oci_spec::runtime::Process as OciProcess;

use super::machine::{Machine, Place};
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
}

/// All that is needed to make one, on another thread.
struct Recipe {
    request: ContainerRequest,
    role: Role,
    stdio: Paths,
    place: Arc<Place>,
    launcher: Arc<dyn Launcher>,
    /// The pod's machine, if it is up.
    sandbox: Option<Arc<dyn Sandbox>>,
}

/// What was made.
struct Made {
    role: Role,
    process: Box<OciProcess>,
    sandbox: Arc<dyn Sandbox>,
    booted: bool,
    outputs: Outputs,
}

impl Tasks {
    /// Makes a container; answers with the machine's process.
    pub(crate) fn create(&mut self, task: NewTask, reply: Reply<u32>) {
        match self.recipe(&task) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(recipe) => {
                self.creating.insert(task.id.clone(), false);
                if recipe.sandbox.is_none() {
                    self.machine = Machine::Booting;
                }
                self.blocking(move || recipe.make(), move |tasks, made| tasks.created(task, made, reply));
            }
        }
    }

    fn recipe(&self, task: &NewTask) -> Result<Recipe> {
        if self.containers.contains_key(&task.id) || self.creating.contains_key(&task.id) {
            return Err(Error::already_exists(format!("task {}", task.id)));
        }
        let spec = bundle::spec(&task.bundle)?;
        let role = Role::of(&spec);
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
            place: Arc::clone(&self.place),
            launcher: Arc::clone(&self.launcher),
            sandbox,
        })
    }

    fn created(&mut self, task: NewTask, made: Result<Made>, reply: Reply<u32>) {
        let unwanted = self.creating.remove(&task.id).unwrap_or(true);
        let booting = matches!(self.machine, Machine::Booting);
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                if booting {
                    self.machine = Machine::Absent;
                }
                log::warn!("task {} not made: {error}", task.id);
                let _ = reply.send(Err(error));
                return self.give_up(unwanted);
            }
        };
        let pid = made.sandbox.pid();
        if made.booted {
            self.machine_is_up(made.sandbox);
        }
        if unwanted {
            let _ = reply.send(Err(Error::failed("nobody wants the task any more")));
            return self.end_machine(Box::new(|tasks| tasks.give_up(true)));
        }
        let init = Process::new(task.stdio.clone(), made.process, Some(made.outputs));
        self.containers.insert(task.id.clone(), Container::new(made.role, task.bundle.clone(), init));
        self.publisher.publish("/tasks/create", &created_event(task, pid));
        let _ = reply.send(Ok(pid));
    }

    /// After a creation that gave nothing: the daemon may have been told to end meanwhile.
    fn give_up(&mut self, unwanted: bool) {
        if unwanted {
            self.shut_down();
        }
    }
}

impl Recipe {
    fn make(mut self) -> Result<Made> {
        let owner = Owner { namespace: self.place.namespace.clone(), container: self.request.id.clone() };
        let outputs = self.stdio.open_outputs(&owner)?;
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
        Ok(Made { role: self.role, process, sandbox, booted, outputs })
    }

    fn boot(&self) -> std::result::Result<Arc<dyn Sandbox>, Failure> {
        let pod = self.role == Role::Sandbox;
        self.place.boot(&*self.launcher, &self.request.spec, pod)
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
        io: MessageField::some(io),
        pid,
        ..Default::default()
    }
}
