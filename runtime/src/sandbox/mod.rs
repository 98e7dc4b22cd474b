//! A sandbox: one machine and the containers that live in it, in the terms of a container engine.
//!
//! An engine describes a container by its bundle's specification and the mounts of its snapshotter. What of that
//! becomes a disk, a file in the guest, a message to the agent or a refusal is decided behind [`Sandbox`]. Every
//! call blocks and may be made from any thread; engines that must not block call from threads of their own.

mod calls;
mod files;
mod launcher;
mod machine;
mod member;
mod shares;
mod stage;
mod updates;
mod volumes;
mod wiring;

pub use launcher::MachineLauncher;

use std::path::PathBuf;
use std::sync::Arc;

use mvm_protocol::{ExitStatus, Get, Got, Put, RootStats, SignalTarget, WindowSize};
use mvm_vmm::config::MachineId;
use oci_spec::runtime::{LinuxResources, Process as OciProcess, Spec};

use crate::agent::{Process, StdioSpec};
use crate::container::Timeline;
use crate::failure::Failure;
use crate::net::NetRequest;

/// Makes sandboxes.
pub trait Launcher: Send + Sync {
    /// Boots a machine; returns once its agent is ready. For a container alone it may put that off until the first
    /// [`Sandbox::create`], so that the container's disks are there from the start.
    ///
    /// # Errors
    /// Whatever of it fails first; nothing is left behind then.
    fn boot(&self, request: &SandboxRequest) -> Result<Arc<dyn Sandbox>, Failure>;
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

/// A machine that containers live in.
///
/// Containers are named by id, processes by the id [`Process`] carries. The loss of the machine fails every call;
/// [`Sandbox::wait_machine`] tells it first.
pub trait Sandbox: Send + Sync {
    /// The host's process that is the machine; it lives in the sandbox's network name space. 0 as long as the machine
    /// is not booted: it always is once a container was made.
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
    /// The machine is lost.
    fn wait(&self, process: u64) -> Result<ExitStatus, Failure>;

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
    /// A limit the guest cannot hold, or the agent does not answer.
    fn update(&self, container: &str, resources: &LinuxResources) -> Result<(), Failure>;

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

    /// Removes a container: what is left of its processes is killed, its disks detached. One that is not there is
    /// no error.
    ///
    /// # Errors
    /// The agent does not answer.
    fn remove(&self, container: &str) -> Result<(), Failure>;

    /// When each stage of its first container's start was reached; `None` before there is one, or if nobody knows.
    fn timeline(&self) -> Option<Timeline> {
        None
    }

    /// Waits until the machine has ended, by itself or by [`Sandbox::end`]; tells how, for people.
    fn wait_machine(&self) -> String;

    /// Ends the machine, writing back what is kept, and removes everything of the sandbox from the host. May be
    /// called again.
    ///
    /// # Errors
    /// Something of it is left behind.
    fn end(&self) -> Result<(), Failure>;
}
