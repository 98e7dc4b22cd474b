//! From a plan to a running machine: opens everything it names, then starts its process with it.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_devices::fd::FdSlot;
use mvm_devices::virtio::vsock::dialer::DialServer;
use mvm_devices::virtio::{DeviceSpec, console, vsock};
use mvm_vmm::config::{Boot, MachineConfig, Serial};
use mvm_vmm::launch::{Files, Launch};

use super::calls::{Calls, VSOCK_SOCKET};
use super::control::Control;
use super::device::{disk_spec, open_disk, tap_spec};
use super::plan::{ConsoleKind, Disk, Plan};
use super::running::{Console, Machine};
use crate::failure::{Context, Failure};
use crate::net::{Net, Netns, OpenTap, TapNet, mac_of, open_tap};

/// Name of the machine's control socket.
pub const CONTROL_SOCKET: &str = "control.sock";

/// A plan whose files are open: what the machine's process is started with.
#[derive(Debug)]
pub struct Prepared {
    config: MachineConfig,
    files: Files,
    console: Option<Console>,
    calls: Option<Calls>,
    control: Control,
    netns: Option<Netns>,
}

impl Prepared {
    /// The configuration as the machine's process will read it.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Starts the machine's process; `stderr` is where it logs.
    ///
    /// # Errors
    /// The program is missing or cannot be started.
    pub fn start(self, stderr: Option<OwnedFd>) -> Result<Machine, Failure> {
        let id = self.config.id.clone();
        let launch = Launch { config: self.config, files: self.files, stderr };
        let spawned_ns = mvm_vmm::status::now();
        // A thread of its own only where it must be: a process starts in the name space of the thread that asks.
        let child = match &self.netns {
            Some(netns) => netns.run(|| launch.spawn())?,
            None => launch.spawn(),
        };
        let child = child.context(|| format!("cannot start machine {id}")).map_err(|failure| {
            failure.help("build everything with `make build`, or name the program in MVM_VMM")
        })?;
        Ok(Machine::new(child, spawned_ns, self.console, self.calls, self.control))
    }
}

/// Opens everything `plan` names.
///
/// # Errors
/// The first file that cannot be opened, with what to do about it.
pub fn prepare(plan: &Plan) -> Result<Prepared, Failure> {
    let mut opening = Opening { files: Files::default(), devices: Vec::new(), console: None, serial: None };
    let kvm = opening.files.add(open_kvm()?);
    let kernel = opening.files.add(open(&plan.kernel, "kernel image")?);
    let initrd = match &plan.initrd {
        Some(path) => Some(opening.files.add(open(path, "initial RAM disk")?)),
        None => None,
    };
    for disk in &plan.disks {
        opening.disk(disk)?;
    }
    for net in &plan.nets {
        match net {
            Net::None => {}
            Net::Tap(tap) => opening.tap(tap, plan)?,
            Net::Open(tap) => opening.open_tap(tap)?,
        }
    }
    let calls = if plan.vsock { Some(opening.vsock(plan.sockets.as_deref())?) } else { None };
    opening.devices.extend(plan.devices.iter().cloned());
    let cmdline = opening.console(plan)?;
    let (control, near) = opening.control(plan.sockets.as_deref())?;
    let Opening { files, devices, console, serial } = opening;
    let cmdline = cmdline.try_into().context(|| "cannot use the kernel command line".to_owned())?;
    let config = MachineConfig {
        id: plan.id.clone(),
        cpus: plan.cpus,
        memory: plan.memory,
        kvm,
        boot: Boot { kernel, initrd, cmdline, protocol: Default::default(), image: Default::default() },
        devices,
        serial,
        status: None,
        control: Some(control),
    };
    let control = Control::new(plan.id.clone(), near)
        .context(|| "cannot set time-outs on the control connection".to_owned())?;
    Ok(Prepared { config, files, console, calls, control, netns: plan.netns.clone() })
}

struct Opening {
    files: Files,
    devices: Vec<DeviceSpec>,
    console: Option<Console>,
    serial: Option<Serial>,
}

impl Opening {
    fn disk(&mut self, disk: &Disk) -> Result<(), Failure> {
        let slot = self.files.add(open_disk(disk)?);
        self.devices.push(disk_spec(disk, slot));
        Ok(())
    }

    fn tap(&mut self, tap: &TapNet, plan: &Plan) -> Result<(), Failure> {
        let mac = tap.mac.unwrap_or_else(|| mac_of(&format!("{}/{}", plan.id, tap.name)));
        let file = Arc::new(match &plan.netns {
            Some(netns) => netns.run(|| open_tap(&tap.name))??,
            None => open_tap(&tap.name)?,
        });
        self.open_tap(&OpenTap { file, mac, mtu: None, only_own_mac: false })
    }

    fn open_tap(&mut self, tap: &OpenTap) -> Result<(), Failure> {
        let file = tap.file.try_clone().context(|| "cannot copy the descriptor of a tap".to_owned())?;
        let slot = self.files.add(file);
        self.devices.push(tap_spec(tap, slot));
        Ok(())
    }

    /// The machine's end of the control connection goes into its files; the other is returned. With `sockets` the
    /// machine listens there as well, and the connection is one of those it takes.
    fn control(&mut self, sockets: Option<&Path>) -> Result<(FdSlot, UnixStream), Failure> {
        let Some(dir) = sockets else {
            let (near, far) = UnixStream::pair()
                .context(|| "cannot make a socket pair to control the machine by".to_owned())?;
            return Ok((self.files.add(far), near));
        };
        let path = dir.join(CONTROL_SOCKET);
        let listener = listen(&path)?;
        let near = UnixStream::connect(&path).context(|| format!("cannot connect to {}", path.display()))?;
        Ok((self.files.add(listener), near))
    }

    fn vsock(&mut self, sockets: Option<&Path>) -> Result<Calls, Failure> {
        let (server, theirs) =
            DialServer::pair().context(|| "cannot make a socket pair for the machine's vsock".to_owned())?;
        let listener = match sockets {
            Some(dir) => Some(self.files.add(listen(&dir.join(VSOCK_SOCKET))?)),
            None => None,
        };
        let dialer = self.files.add(theirs);
        self.devices.push(DeviceSpec::Vsock(vsock::Config {
            listener,
            dialer: Some(dialer),
            ..vsock::Config::new(vsock::GuestCid::FIRST)
        }));
        Ok(Calls::new(server, sockets.map(PathBuf::from)))
    }

    /// Connects the console; returns the kernel command line with what it needs.
    fn console(&mut self, plan: &Plan) -> Result<String, Failure> {
        let Some(kind) = plan.console else { return Ok(plan.cmdline.clone()) };
        let pipe = || std::io::pipe().context(|| "cannot make a pipe for the console".to_owned());
        let (input, to_guest) = pipe()?;
        let (from_guest, output) = pipe()?;
        let (input, output) = (self.files.add(input), self.files.add(output));
        match kind {
            ConsoleKind::Virtio => {
                self.devices.push(DeviceSpec::Console(console::Config {
                    input: Some(input),
                    output,
                    unlimited: true,
                    size: None,
                }));
            }
            ConsoleKind::Serial => self.serial = Some(Serial { output, input: Some(input) }),
        }
        self.console = Some(Console { to_guest, from_guest });
        Ok(format!("console={} {}", kind.terminal(), plan.cmdline).trim_end().to_owned())
    }
}

fn open_kvm() -> Result<File, Failure> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/kvm");
    opened.map_err(|error| {
        let help = match error.kind() {
            ErrorKind::NotFound => {
                "load the kvm module, and switch on virtualisation in the firmware; `mvm doctor` says more"
            }
            ErrorKind::PermissionDenied => {
                "add yourself to the kvm group (usermod -aG kvm $USER), then log in again"
            }
            _ => "see `mvm doctor`",
        };
        Failure::because("cannot open /dev/kvm", error).help(help)
    })
}

fn open(path: &Path, what: &str) -> Result<File, Failure> {
    File::open(path).context(|| format!("cannot open {what} {}", path.display()))
}

/// A listening socket that only its owner may connect to. A socket left by a machine that died is replaced.
fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let failed = || format!("cannot listen on {}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).context(failed)?;
    }
    match UnixStream::connect(path) {
        Ok(_) => return Err(Failure::new(format!("{} is in use by another machine", path.display()))),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).context(failed)?;
        }
        Err(_) => {}
    }
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    listener.context(failed)
}
