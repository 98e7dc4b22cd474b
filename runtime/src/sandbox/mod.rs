//! A sandbox: one machine and the containers that live in it, in the terms of a container engine.
//!
//! An engine describes a container by its bundle's specification and the mounts of its snapshotter. What of that
//! becomes a disk, a file in the guest, a message to the agent or a refusal is decided behind [`Sandbox`]. Every
//! call blocks and may be made from any thread; engines that must not block call from threads of their own.

mod beginning;
mod calls;
mod cgroup;
mod checkpoint;
mod ending;
mod files;
mod growth;
mod launcher;
mod limits;
mod machine;
mod member;
mod plugging;
mod restore;
mod save;
mod shares;
mod stage;
mod updates;
mod volumes;
mod wiring;
mod write_back;

#[cfg(feature = "fuzzing")]
pub(crate) use cgroup::{hierarchies, place};
pub use launcher::MachineLauncher;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_devices::throttle::Limit;
use mvm_protocol::{ExitStatus, Get, Got, Put, RootStats, SignalTarget, WindowSize};
use mvm_vmm::config::MachineId;
use oci_spec::runtime::{LinuxResources, Process as OciProcess, Spec};

use crate::agent::{Process, StdioSpec};
use crate::failure::Failure;
use crate::net::NetRequest;
use crate::snapshot::{BaseMemory, Going, SavedMachine};
use crate::state::Wish;
use crate::timeline::Timeline;

/// Makes sandboxes.
pub trait Launcher: Send + Sync {
    /// Boots a machine; returns once its agent is ready. For a container alone it may put that off until the first
    /// [`Sandbox::create`], so that the container's disks are there from the start.
    ///
    /// # Errors
    /// Whatever of it fails first; nothing is left behind then.
    fn boot(&self, request: &SandboxRequest) -> Result<Arc<dyn Sandbox>, Failure>;

    /// Has a machine go on with a container in it; that, and the container's first process.
    ///
    /// # Errors
    /// It does not fit this host, or whatever fails first; nothing is left behind then.
    fn restore(
        &self,
        request: &SandboxRequest,
        container: &ContainerRequest,
        going: &Going,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let _ = (container, going);
        Err(Failure::new(format!("cannot restore machine {}: it would be none", request.id)))
    }

    /// Has a container go on from its checkpoint in a machine of its own; that, and the container's first process. Its
    /// processes stand still until [`Sandbox::resume`].
    ///
    /// # Errors
    /// The checkpoint is none, is damaged, does not fit this host or the container (a refusal), or whatever fails
    /// first; nothing is left behind then.
    fn restore_checkpoint(
        &self,
        request: &SandboxRequest,
        container: &ContainerRequest,
        from: &RestoreRequest,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let _ = (container, from);
        Err(Failure::new(format!("cannot restore machine {}: it would be none", request.id)))
    }
}

/// How a container is saved for its engine.
#[derive(Clone, Debug)]
pub struct CheckpointRequest {
    /// Where to: a directory with nothing in it.
    pub directory: PathBuf,
    /// Its first process has a terminal.
    pub terminal: bool,
    /// It is paused, and stays so.
    pub paused: bool,
}

/// What a container goes on from.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// The directory of its checkpoint.
    pub checkpoint: PathBuf,
    /// The streams of its first process.
    pub stdio: StdioSpec,
}

/// What a sandbox is made for.
#[derive(Clone, Debug)]
pub struct SandboxRequest {
    /// Name of the machine.
    pub id: MachineId,
    /// Directory of its own, for sockets and records: made by the launcher, removed by [`Sandbox::end`].
    pub directory: PathBuf,
    /// Specification of the first container: its annotations, name spaces, limits and devices size the machine and
    /// place it in a network name space.
    pub spec: Spec,
    /// The sandbox holds a pod: containers will be added and removed while it runs.
    pub pod: bool,
    /// A network made for it; without one it takes its place in the specification's network name space.
    pub net: Option<NetRequest>,
    /// Whether it is still wanted, while it waits for others to start.
    pub wish: Wish,
}

/// A container to be made in a sandbox.
#[derive(Clone, Debug)]
pub struct ContainerRequest {
    /// Its id.
    pub id: String,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Its specification.
    pub spec: Spec,
    /// What its root file system is made of, as the snapshotter gave it; empty if the bundle's own `root.path` is.
    pub rootfs: Vec<RootfsMount>,
}

/// One mount of a snapshotter (containerd's `types.Mount`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system: `overlay`, `bind`, `ext4`, `erofs`.
    pub kind: String,
    /// Device, file or directory.
    pub source: String,
    /// Below the root; empty is the root itself.
    pub target: String,
    /// Options.
    pub options: Vec<String>,
}

/// Who is told of kills for want of memory.
pub type MemoryKill = Arc<dyn Fn() + Send + Sync>;

/// A machine that containers live in.
///
/// Containers are named by id, processes by the id [`Process`] carries. The loss of the machine fails every call;
/// [`Sandbox::wait_machine`] tells it first.
pub trait Sandbox: Send + Sync {
    /// The host's process that is the machine, or was; it lives in the sandbox's network name space. 0 as long as the
    /// machine is not booted: it always is once a container was made.
    fn pid(&self) -> u32;

    /// Makes a container: its disks are attached, its root and surroundings made.
    ///
    /// # Errors
    /// What of its specification cannot be honoured, or what failed; nothing of it is left then.
    fn create(&self, container: &ContainerRequest) -> Result<(), Failure>;

    /// Starts a process in a container; the first of a container is its init. Every later one shares its name
    /// spaces.
    ///
    /// # Errors
    /// [`crate::container::NotRunnable`] at the bottom if the program is missing or cannot be executed.
    fn start(&self, container: &str, process: &OciProcess, stdio: StdioSpec) -> Result<Process, Failure>;

    /// How a process ended, waiting for it; by then its output streams hold all it wrote. Given once.
    ///
    /// # Errors
    /// The machine is lost, or the process was given up.
    fn wait(&self, process: u64) -> Result<ExitStatus, Failure>;

    /// Gives a process up that its guest does not end, or of which nobody wants to know how it ends: whoever waits for
    /// it is told of a failure, and its end is nobody's should it be told later. The guest is asked nothing. One whose
    /// end was told does not mind.
    fn abandon(&self, process: u64);

    /// Sends a signal. Telling a process that has ended is no error.
    ///
    /// # Errors
    /// The agent does not answer or refuses.
    fn signal(&self, process: u64, signal: i32, target: SignalTarget) -> Result<(), Failure>;

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// The agent does not answer, or the process has no terminal.
    fn resize(&self, process: u64, size: WindowSize) -> Result<(), Failure>;

    /// Closes a process's standard input.
    ///
    /// # Errors
    /// The agent does not answer.
    fn close_stdin(&self, process: u64) -> Result<(), Failure>;

    /// Stops a container's processes.
    ///
    /// # Errors
    /// The agent does not answer.
    fn pause(&self, container: &str) -> Result<(), Failure>;

    /// Lets a container's processes go on.
    ///
    /// # Errors
    /// The agent does not answer.
    fn resume(&self, container: &str) -> Result<(), Failure>;

    /// A container's use of its resources.
    ///
    /// # Errors
    /// The agent does not answer.
    fn stats(&self, container: &str) -> Result<RootStats, Failure>;

    /// Changes a container's limits.
    ///
    /// # Errors
    /// A limit the guest cannot hold, one above what the machine can become, or the agent does not answer.
    fn update(&self, container: &str, resources: &LinuxResources) -> Result<(), Failure>;

    /// Limits how fast the machine may use its disks and its network, from now on until it ends.
    ///
    /// # Errors
    /// The machine does not run.
    fn limit(&self, limits: &[Limit]) -> Result<(), Failure> {
        let _ = limits;
        Err(Failure::new("cannot limit what is in no machine"))
    }

    /// Puts files into the guest.
    ///
    /// # Errors
    /// The agent's reason.
    fn put(&self, put: Put) -> Result<(), Failure>;

    /// Reads a file or directory of the guest.
    ///
    /// # Errors
    /// The agent's reason.
    fn get(&self, get: Get) -> Result<Got, Failure>;

    /// Kills in a container for want of memory so far. Cheap: nothing is asked.
    fn memory_kills(&self, container: &str) -> u64;

    /// From now on has `heard` told whenever [`Sandbox::memory_kills`] of a container may have changed, for as long as
    /// the machine that is booted now runs. It must not wait, nor call the sandbox; a guest can have it called as
    /// often as it likes.
    fn on_memory_kill(&self, heard: MemoryKill);

    /// Whether the guest's agent answers at all. Waits for the answer, but not for long.
    fn answers(&self) -> bool;

    /// Removes a container: what is left of its processes is killed, its disks detached. One that is not there is
    /// no error.
    ///
    /// # Errors
    /// The agent does not answer.
    fn remove(&self, container: &str) -> Result<(), Failure>;

    /// Saves the machine with its only container into files in `directory`, to go on from there as another. With a `base`
    /// it is the changes to that which are saved of its memory. It is held meanwhile and goes on, whatever comes of it.
    ///
    /// # Errors
    /// The container cannot be saved, or the host's reason.
    fn save(
        &self,
        container: &str,
        directory: &Path,
        _base: Option<&BaseMemory>,
    ) -> Result<SavedMachine, Failure> {
        Err(Failure::new(format!(
            "cannot save container {container} to {}: it is in no machine",
            directory.display()
        )))
    }

    /// Saves the machine with its only container into a directory that its engine keeps, from which
    /// [`Launcher::restore_checkpoint`] goes on. It is held meanwhile and goes on, whatever comes of it.
    ///
    /// # Errors
    /// The container cannot be saved (a refusal), or the host's reason; nothing is left in the directory then.
    fn checkpoint(&self, container: &str, request: &CheckpointRequest) -> Result<(), Failure> {
        Err(Failure::new(format!(
            "cannot save container {container} to {}: it is in no machine",
            request.directory.display()
        )))
    }

    /// The stages of its start, and of its containers'; `None` if nobody writes them down.
    fn timeline(&self) -> Option<Timeline> {
        None
    }

    /// Kills the machine, whatever becomes of what its guest has not written back; what it leaves on the host is
    /// removed by [`Sandbox::end`]. Does nothing if it has ended.
    fn kill_machine(&self);

    /// Waits until the machine has ended, by itself or by [`Sandbox::end`]; tells how, for people.
    fn wait_machine(&self) -> String;

    /// Ends the machine, writing back what is kept, and removes everything of the sandbox from the host. May be
    /// called again.
    ///
    /// # Errors
    /// Something of it is left behind.
    fn end(&self) -> Result<(), Failure>;
}
