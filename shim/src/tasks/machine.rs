//! The machine behind a shim: made with the first container, ended with the last or by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;

use mvm_runtime::agent::Process;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::hex::hex;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, RestoreRequest, Sandbox, SandboxRequest};
use mvm_runtime::state::{ProcessId, Wish};
use oci_spec::runtime::{Process as OciProcess, Spec};
use sha2::{Digest, Sha256};

use super::{Exit, Job, KILLED, Name, State, Tasks, now};
use crate::bundle::{MACHINES, Record, Role};

/// Stack of a thread that only waits, in bytes.
const WAITING_STACK: usize = 256 * 1024;
/// Stack of a thread that ends a machine, in bytes. Only what is touched costs.
const ENDING_STACK: usize = 2 << 20;
/// Longest path of a machine's directory: its sockets' paths must fit.
const MAX_DIRECTORY: usize = 85;
/// Longest name of a machine.
const MAX_ID: usize = 64;

/// Who and where the shim is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// containerd's name space.
    pub(crate) namespace: String,
    /// Id of the pod or the lone container.
    pub(crate) group: String,
    /// The daemon's socket.
    pub(crate) socket: PathBuf,
}

/// Where the machine is in its life.
pub(super) enum Machine {
    /// There was none yet.
    Absent,
    /// Being made.
    Booting,
    /// Up.
    Up(Arc<dyn Sandbox>),
    /// Being ended, for those who wait.
    Ending { pid: u32, waiting: Vec<Job> },
    /// Gone.
    Gone { pid: u32 },
}

impl Machine {
    /// The host's process that is or was the machine; 0 if there was none.
    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Absent | Self::Booting => 0,
            Self::Up(sandbox) => sandbox.pid(),
            Self::Ending { pid, .. } | Self::Gone { pid } => *pid,
        }
    }
}

impl Place {
    /// The machine's own directory.
    fn directory(&self) -> PathBuf {
        let plain = Path::new(MACHINES).join(&self.namespace).join(&self.group);
        if plain.as_os_str().len() <= MAX_DIRECTORY { plain } else { Path::new(MACHINES).join(self.hash()) }
    }

    fn machine_id(&self) -> String {
        if self.group.len() <= MAX_ID { self.group.clone() } else { self.hash() }
    }

    fn hash(&self) -> String {
        let hash = Sha256::digest(format!("{}/{}", self.namespace, self.group));
        hex(hash.iter().take(16))
    }

    /// Boots the machine.
    pub(super) fn boot(
        &self,
        launcher: &dyn Launcher,
        spec: &Spec,
        pod: bool,
        wish: Wish,
    ) -> Result<Arc<dyn Sandbox>, Failure> {
        launcher.boot(&SandboxRequest { wish, ..self.request(spec, pod)? })
    }

    /// Has the machine go on with a container in it; the container's process.
    pub(super) fn restore(
        &self,
        launcher: &dyn Launcher,
        container: &ContainerRequest,
        from: &RestoreRequest,
        wish: Wish,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let request = SandboxRequest { wish, ..self.request(&container.spec, false)? };
        launcher.restore_checkpoint(&request, container, from)
    }

    fn request(&self, spec: &Spec, pod: bool) -> Result<SandboxRequest, Failure> {
        let id = self.machine_id().try_into();
        let id = id.context(|| format!("{} cannot be a machine's name", self.group))?;
        let (directory, spec, wish) = (self.directory(), spec.clone(), Wish::default());
        Ok(SandboxRequest { id, directory, spec, pod, net: None, wish })
    }

    /// Records the machine's process.
    pub(super) fn machine_is_up(&self, bundle: &Path, spec: &Spec, pid: u32) -> Result<(), Failure> {
        // The machine is what the container is to the host's memory, and not to be spared as this shim is.
        let score = spec.process().as_ref().and_then(OciProcess::oom_score_adj).unwrap_or(0);
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
        self.record(bundle, i32::try_from(pid).ok().and_then(ProcessId::of))
    }

    /// Leaves in a bundle what `delete` must know.
    pub(crate) fn record(&self, bundle: &Path, machine: Option<ProcessId>) -> Result<(), Failure> {
        let (directory, socket) = (self.directory(), self.socket.clone());
        let record = Record { directory, socket, daemon: ProcessId::own(), machine };
        record.write(bundle).context(|| format!("cannot write a record to {}", bundle.display()))
    }
}

impl Tasks {
    /// The machine is up: its end will be noticed.
    pub(super) fn machine_is_up(&mut self, sandbox: Arc<dyn Sandbox>) {
        self.machine = Machine::Up(Arc::clone(&sandbox));
        self.hear_of_memory_kills(&*sandbox);
        self.machines += 1;
        let (me, number) = (self.me.clone(), self.machines);
        waiting_thread("machine", move || {
            let how = sandbox.wait_machine();
            drop(sandbox);
            me.tell(move |tasks| tasks.machine_is_lost(number, &how));
        });
    }

    /// The machine has ended. If nobody ended it, whatever lived in it was killed.
    fn machine_is_lost(&mut self, number: u64, how: &str) {
        if self.machines != number {
            return;
        }
        if matches!(self.machine, Machine::Up(_)) {
            log::warn!("the machine has ended: {how}");
        }
        let mut ids: Vec<String> = self.containers.keys().cloned().collect();
        // A sandbox is over after the containers in it.
        ids.sort_by_key(|id| self.containers.get(id).map(|container| container.role) == Some(Role::Sandbox));
        for id in ids {
            let execs: Vec<String> =
                self.containers.get(&id).map(|c| c.execs.keys().cloned().collect()).unwrap_or_default();
            for exec in execs {
                self.process_is_lost(&Name { container: id.clone(), exec });
            }
            let init = Name { container: id, exec: String::new() };
            self.process_is_lost(&init);
            if self.process(&init).is_ok_and(|p| matches!(p.state, State::Created { .. } | State::Virtual)) {
                self.init_without_guest_is_over(&init, Exit { status: KILLED, at: now() });
            }
        }
        self.end_machine(Box::new(|_| {}));
    }

    fn process_is_lost(&mut self, name: &Name) {
        if let Ok(ticket) = self.ticket(name) {
            self.process_exited(&ticket, KILLED);
        }
    }

    /// Ends the machine if there is one, then goes on.
    pub(super) fn end_machine(&mut self, then: Job) {
        match &mut self.machine {
            Machine::Ending { waiting, .. } => waiting.push(then),
            Machine::Absent | Machine::Booting | Machine::Gone { .. } => then(self),
            Machine::Up(sandbox) => {
                let sandbox = Arc::clone(sandbox);
                self.machine = Machine::Ending { pid: sandbox.pid(), waiting: vec![then] };
                self.apart(
                    "end",
                    move || sandbox.end(),
                    |tasks, ended| {
                        if let Err(failure) = ended {
                            log::error!("{}", failure.report());
                        }
                        tasks.machine_is_gone();
                    },
                );
            }
        }
    }

    fn machine_is_gone(&mut self) {
        let gone = Machine::Gone { pid: self.machine.pid() };
        if let Machine::Ending { waiting, .. } = std::mem::replace(&mut self.machine, gone) {
            for job in waiting {
                job(self);
            }
        }
    }
}

/// Runs what waits for long on a thread of its own.
pub(super) fn waiting_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(WAITING_STACK);
    if let Err(error) = builder.spawn(work) {
        log::error!("cannot start a thread: {error}");
    }
}

/// Does a job on a thread of its own, or, where the host has none left, on one that is shared: it must be done.
pub(super) fn own_thread(name: &str, job: impl FnOnce() + Send + 'static) {
    let (jobs, given) = mpsc::channel();
    let job: Box<dyn FnOnce() + Send> = Box::new(job);
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(ENDING_STACK);
    let spawned =
        builder.spawn(move || given.recv().into_iter().for_each(|job: Box<dyn FnOnce() + Send>| job()));
    let left = match spawned {
        Ok(_) => jobs.send(job).err().map(|unsent| unsent.0),
        Err(error) => {
            log::error!("cannot start a thread: {error}");
            Some(job)
        }
    };
    if let Some(job) = left {
        tokio::task::spawn_blocking(job);
    }
}
