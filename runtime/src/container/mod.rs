//! A container: an image, a machine around it, and one process in it.

mod cost;
mod process;
mod spec;

pub use cost::Cost;
pub(crate) use process::start_failure;
pub use process::{NotRunnable, Overrides};
pub use spec::{CapName, Volume, Wishes, spec};

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mvm_devices::virtio::{DeviceSpec, balloon};
use mvm_protocol::{Configure, DiskFilesystem, Lower, SetupRoot, ShutdownMode, Surroundings, Writable};
use mvm_vmm::config::{MachineId, MemSize, VcpuCount};
use mvm_vmm::kvm::probe::PVM;

use crate::agent::{AgentClient, Process, ProcessSpec, fresh_identity};
use crate::failure::{Context, Failure};
use crate::guest::GuestFiles;
use crate::image::{Error, Progress, Rootfs, Source, Store, full_name};
use crate::machine::{Disk, Kernel, Machine, Origin, Plan, prepare};
use crate::net::{Connection, Net, NetRequest};
use crate::timeline::{START, Timeline, Track};

/// Name under which the agent keeps the container's root.
pub const ROOT: &str = "main";
/// Virtio serial of the disk the image lies on.
const ROOT_SERIAL: &str = "root";
/// Virtio serial of the disk that writes go to.
const UPPER_SERIAL: &str = "upper";
/// Time from the machine's start to the agent's hello. Generous: an emulated host is thirty times slower.
pub(crate) const AGENT_TIME: Duration = Duration::from_secs(60);
/// Time processes get between being asked to end and being killed.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
/// Time a guest gets after that to write its disk back and power off. One that lies about it gets no more.
pub(crate) const END_TIME: Duration = Duration::from_secs(60);
/// The guest kernel's command line. Each word and its gain is explained beside the kernel's configuration.
pub const CMDLINE: &str = "quiet noreplace-smp rcupdate.rcu_expedited=1 memory_hotplug.online_policy=auto-movable \
     initcall_blacklist=slab_late_init,param_sysfs_builtin_init";

/// What a container is made of.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of the machine and host name of the guest.
    pub id: MachineId,
    /// Virtual CPUs.
    pub cpus: VcpuCount,
    /// RAM.
    pub memory: MemSize,
    /// Its network.
    pub net: NetRequest,
    /// Refuse writes to the root file system.
    pub read_only: bool,
    /// Where they go otherwise.
    pub upper: Upper,
    /// Directory for the machine's sockets; without it there are none.
    pub sockets: Option<PathBuf>,
}

/// Where a container's writes go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Upper {
    /// Into the guest's memory; gone with the machine.
    #[default]
    Memory,
    /// Onto an ext4 file system on this raw disk.
    Disk(PathBuf),
}

/// A booted machine with a container's root in it.
#[derive(Debug)]
pub struct Container {
    /// Its machine.
    pub machine: Machine,
    /// Its agent.
    pub agent: Arc<AgentClient>,
    /// When each stage was reached.
    pub timeline: Timeline,
    upper: Upper,
    // After the machine, which has its taps open.
    _connection: Connection,
}

/// Where mvm keeps what outlives a machine: `MVM_STATE`, or `/var/lib/mvm`.
pub fn state_dir() -> PathBuf {
    directory_of("MVM_STATE", "/var/lib/mvm")
}

/// The directory that a variable names, or else `default`; absolute, because processes elsewhere are told of it.
pub(crate) fn directory_of(variable: &str, default: &str) -> PathBuf {
    let named = std::env::var_os(variable).filter(|it| !it.is_empty()).unwrap_or_else(|| default.into());
    // Only a process whose directory is gone has none.
    std::path::absolute(&named).unwrap_or_else(|_| named.into())
}

/// The image as a root file system, from the store or made now: by its path, or by a name it has in the store.
///
/// # Errors
/// It is no image, or the store cannot be used.
pub fn root_file_system(image: &str, state: &Path, progress: &mut dyn Progress) -> Result<Rootfs, Failure> {
    let unusable = |error: Error| {
        let help = error.help();
        let failure = Failure::because(format!("cannot use {image} as an image"), error);
        if let Some(help) = help { failure.help(help) } else { failure }
    };
    let open_store = || {
        Store::open(state.join("images"))
            .context(|| format!("cannot use {} for images", state.display()))
            .map_err(|failure| failure.help("run as root, or name another directory in MVM_STATE"))
    };
    match Source::open(image) {
        Ok(source) => open_store()?
            .rootfs(&source, progress)
            .context(|| format!("cannot make a root file system of {image}")),
        // What is no path may be a name.
        Err(Error::Open { .. }) if full_name(image).is_ok() && !Path::new(image).exists() => {
            open_store()?.get(image).map_err(unusable).map_err(|failure| {
                failure.help(format!("fetch it with `mvm image pull {image}`, or give the path of an image"))
            })
        }
        Err(error) => Err(unusable(error)),
    }
}

impl Container {
    /// Boots a machine and sets the container's root up in it.
    ///
    /// # Errors
    /// Whatever of it fails first; nothing is left behind then.
    pub fn boot(request: &Request, image: &Rootfs, state: &Path) -> Result<Self, Failure> {
        if mvm_vmm::kvm::probe::is_pvm() {
            // It would take half a minute of interpretation to find out.
            return Err(Failure::because(format!("cannot boot machine {}", request.id), Failure::new(PVM))
                .help("make lab CMD='mvm run …'"));
        }
        let guest = GuestFiles::find()?;
        let initrd = guest.initrd(&state.join("guest"))?;
        let connection = request.net.connect(request.id.as_str(), None)?;
        let plan = plan(request, image, guest, initrd, connection.nets.clone());
        let prepared = prepare(&plan)?;
        let stderr = std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned().ok();
        let timeline = Timeline::default();
        let mut machine = prepared.start(stderr)?;
        timeline.spawned(&machine);
        let identity = fresh_identity(request.id.to_string())?;
        let agent = Arc::new(timeline.agent(&mut machine, identity, AGENT_TIME)?);
        {
            let _stage = timeline.begin(Track::Agent, "set up container");
            agent.set_up_root(root(request)).context(|| "cannot set the container's root up".to_owned())?;
        }
        {
            let _stage = timeline.begin(Track::Agent, "configure guest");
            let place = place(&request.id, &connection);
            agent.configure(place).context(|| "cannot configure the guest".to_owned())?;
        }
        Ok(Self { machine, agent, timeline, upper: request.upper.clone(), _connection: connection })
    }

    /// Ends the machine: at once if nothing of it is kept, else after the guest has written its disk back.
    ///
    /// # Errors
    /// The guest does not end in order, or the machine's process cannot be waited for.
    pub fn end(mut self) -> Result<(), Failure> {
        if let Upper::Disk(_) = self.upper {
            self.agent
                .shut_down(ShutdownMode::PowerOff, GRACE)
                .context(|| "cannot have the guest shut down".to_owned())?;
            return self.machine.wait_at_most(GRACE + END_TIME).map(drop);
        }
        self.machine.kill()
    }

    /// Starts a process in the container.
    ///
    /// # Errors
    /// [`NotRunnable`] at the bottom if the program is missing or cannot be executed.
    pub fn start(&mut self, spec: ProcessSpec) -> Result<Process, Failure> {
        let program = spec.args.first().cloned().unwrap_or_default();
        let _stage = self.timeline.begin(Track::Agent, START);
        self.agent.start(spec).map_err(|error| process::start_failure(&program, error))
    }
}

fn plan(request: &Request, image: &Rootfs, guest: GuestFiles, initrd: PathBuf, nets: Vec<Net>) -> Plan {
    let disk = |path: &Path, serial: &str, read_only| Disk {
        path: path.to_path_buf(),
        read_only,
        serial: serial.to_owned(),
        throwaway: false,
    };
    let mut disks = vec![disk(&image.path, ROOT_SERIAL, true)];
    if let Upper::Disk(path) = &request.upper {
        disks.push(disk(path, UPPER_SERIAL, false));
    }
    let kernel = Kernel { image: guest.kernel, initrd: Some(initrd), cmdline: CMDLINE.to_owned() };
    Plan {
        cpus: request.cpus,
        memory: request.memory,
        disks,
        nets,
        devices: devices(),
        sockets: request.sockets.clone(),
        ..Plan::new(request.id.clone(), Origin::Kernel(kernel))
    }
}

/// Says whether there are [`devices`] by which guests give memory back: `on` or `off`.
pub const REPORTING: &str = "MVM_FREE_PAGE_REPORTING";

/// What every container's machine has besides disks, cards and the vsock: a balloon, through which the guest tells which
/// of its memory is free, so that the host has that back. The environment may do without it, by `off`.
pub fn devices() -> Vec<DeviceSpec> {
    let off = std::env::var_os(REPORTING).is_some_and(|choice| choice == "off");
    if off { Vec::new() } else { vec![DeviceSpec::Balloon(balloon::Config::default())] }
}

fn root(request: &Request) -> SetupRoot {
    SetupRoot {
        id: ROOT.to_owned(),
        lower: vec![Lower::Disk { serial: ROOT_SERIAL.to_owned(), filesystem: DiskFilesystem::Erofs }],
        writable: match &request.upper {
            _ if request.read_only => Writable::No,
            Upper::Memory => Writable::Tmpfs { size: 0 },
            Upper::Disk(_) => Writable::Disk { serial: UPPER_SERIAL.to_owned() },
        },
        surroundings: Surroundings { sysctls: request.net.tcp.sysctls(), ..Surroundings::default() },
    }
}

/// The guest's place in its network: its name at least.
fn place(id: &MachineId, connection: &Connection) -> Configure {
    let own = format!("127.0.0.1\tlocalhost {id}\n::1\tlocalhost {id}\n");
    Configure { hostname: Some(id.to_string()), hosts: Some(own), ..connection.place.clone() }
}
