//! From a plan to a running machine: opens everything it names, then starts its process with it.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use mvm_devices::fd::FdSlot;
use mvm_devices::throttle::{Limit, Meters};
use mvm_devices::virtio::vsock::dialer::DialServer;
use mvm_devices::virtio::{DeviceSpec, console, mem, vsock};
use mvm_vmm::config::{Boot, FIRST_SLOT, MachineConfig, Restore, Serial, Start, Userfault};
use mvm_vmm::launch::{Files, Launch};

use super::calls::{Calls, VSOCK_SOCKET};
use super::control::Control;
use super::device::{disk_spec, empty_spec, no_disk, open_disk, tap_spec};
use super::listen::listen;
use super::plan::{ConsoleKind, Kernel, Origin, Plan, Slot, Snapshot};
use super::running::{Console, Machine};
use super::source::device;
use crate::failure::{Context, Failure};
use crate::net::{Net, Netns, TapNet, mac_of, open_tap};

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
    let (config, opening) = fill(plan, Opening { files: Some(Files::default()), ..Default::default() })?;
    let control = opening.control.ok_or_else(|| Failure::new("the machine has no control connection"))?;
    let control = Control::new(plan.id.clone(), control, opening.meters)
        .context(|| "cannot set time-outs on the control connection".to_owned())?;
    Ok(Prepared {
        config,
        files: opening.files.unwrap_or_default(),
        console: opening.console,
        calls: opening.calls,
        control,
        netns: plan.netns.clone(),
    })
}

/// The configuration that [`prepare`] makes, without opening or making anything.
///
/// # Errors
/// The kernel command line is too long.
pub fn describe(plan: &Plan) -> Result<MachineConfig, Failure> {
    fill(plan, Opening::default()).map(|(config, _)| config)
}

fn fill(plan: &Plan, mut opening: Opening) -> Result<(MachineConfig, Opening), Failure> {
    let kvm = opening.add(open_kvm)?;
    let mut start = opening.start(plan)?;
    if plan.plugged {
        opening.fixed(plan)?;
        opening.nets(plan)?;
        opening.disks(plan)?;
    } else {
        opening.disks(plan)?;
        opening.nets(plan)?;
        opening.fixed(plan)?;
    }
    let terminal = opening.console(plan)?;
    let plugs = |size_mib| DeviceSpec::Mem(mem::Config { size_mib, address: 0 });
    opening.devices.extend(plan.plugs_mib.map(plugs));
    let control = opening.control(plan.sockets.as_deref())?;
    let meters = plan.limits.as_deref().map(|limits| opening.meters(limits)).transpose()?;
    if let (Start::Boot(boot), Origin::Kernel(kernel)) = (&mut start, &plan.origin) {
        let cmdline = format!("{terminal}{}", kernel.cmdline).trim_end().to_owned();
        boot.cmdline = cmdline.try_into().context(|| "cannot use the kernel command line".to_owned())?;
    }
    let config = MachineConfig {
        cpus: plan.cpus,
        memory: plan.memory,
        pluggable_mib: plan.pluggable_mib,
        devices: std::mem::take(&mut opening.devices),
        serial: opening.serial.take(),
        control: Some(control),
        meters,
        ..MachineConfig::new(plan.id.clone(), kvm, start)
    };
    Ok((config, opening))
}

/// What a plan becomes on its way to a machine.
#[derive(Default)]
struct Opening {
    /// The files that are open; `None` if the slots are only numbered.
    files: Option<Files>,
    /// Slots given out without a file.
    numbered: u32,
    devices: Vec<DeviceSpec>,
    console: Option<Console>,
    serial: Option<Serial>,
    calls: Option<Calls>,
    control: Option<UnixStream>,
    meters: Meters,
}

impl Opening {
    /// The slot of the next file, which `open` opens if files are opened at all.
    fn add<F: Into<OwnedFd>>(
        &mut self,
        open: impl FnOnce() -> Result<F, Failure>,
    ) -> Result<FdSlot, Failure> {
        match &mut self.files {
            Some(files) => Ok(files.add(open()?)),
            None => {
                let slot = FdSlot(FIRST_SLOT.saturating_add(self.numbered));
                self.numbered = self.numbered.saturating_add(1);
                Ok(slot)
            }
        }
    }

    /// The slot of a file that need not be.
    fn add_any(&mut self, path: Option<&Path>, what: &str) -> Result<Option<FdSlot>, Failure> {
        path.map(|path| self.add(|| open(path, what))).transpose()
    }

    /// What the machine starts from. A kernel's command line comes later.
    fn start(&mut self, plan: &Plan) -> Result<Start, Failure> {
        match &plan.origin {
            Origin::Saved(Snapshot { state, memory, source, base, working_set, contents }) => {
                let state = self.add(|| open(state, "saved state"))?;
                let (memory, userfault) = match source {
                    None => (self.add(|| open(memory, "saved memory"))?, None),
                    Some(source) => (self.add(|| source.connect())?, Some(self.userfault()?)),
                };
                Ok(Start::Restore(Restore {
                    state,
                    memory,
                    userfault,
                    base: self.add_any(base.as_deref(), "saved memory")?,
                    working_set: self.add_any(working_set.as_deref(), "working set")?,
                    contents: contents.clone(),
                }))
            }
            Origin::Kernel(Kernel { image, initrd, .. }) => {
                let kernel = self.add(|| open(image, "kernel image"))?;
                let initrd = self.add_any(initrd.as_deref(), "initial RAM disk")?;
                Ok(Start::Boot(Boot { initrd, ..Boot::new(kernel) }))
            }
        }
    }

    /// By what a machine has missing memory reported. Without the device it asks by its own right.
    fn userfault(&mut self) -> Result<Userfault, Failure> {
        let device = self.files.is_some().then(device).flatten();
        Ok(Userfault { device: device.map(|device| self.add(|| Ok(device))).transpose()? })
    }

    fn disks(&mut self, plan: &Plan) -> Result<(), Failure> {
        for disk in &plan.disks {
            let slot = self.add(|| open_disk(disk))?;
            self.devices.push(disk_spec(disk, slot));
        }
        Ok(())
    }

    fn nets(&mut self, plan: &Plan) -> Result<(), Failure> {
        for net in &plan.nets {
            match net {
                Net::None => {}
                Net::Tap(tap) => self.tap(tap, plan)?,
                Net::Open(tap) => {
                    let slot = self.add(|| {
                        tap.file.try_clone().context(|| "cannot copy the descriptor of a tap".to_owned())
                    })?;
                    self.devices.push(tap_spec(tap.mac, tap.mtu, tap.only_own_mac, slot));
                }
            }
        }
        Ok(())
    }

    /// What every machine of its kind has.
    fn fixed(&mut self, plan: &Plan) -> Result<(), Failure> {
        if plan.vsock {
            self.vsock(plan.sockets.as_deref())?;
        }
        self.devices.extend(plan.devices.iter().cloned());
        for Slot { read_only, disk } in &plan.slots {
            let image = self.add(|| disk.as_ref().map_or_else(no_disk, open_disk))?;
            self.devices.push(
                disk.as_ref().map_or_else(|| empty_spec(*read_only, image), |disk| disk_spec(disk, image)),
            );
        }
        Ok(())
    }

    fn tap(&mut self, tap: &TapNet, plan: &Plan) -> Result<(), Failure> {
        let mac = tap.mac.unwrap_or_else(|| mac_of(&format!("{}/{}", plan.id, tap.name)));
        let slot = self.add(|| match &plan.netns {
            Some(netns) => netns.run(|| open_tap(&tap.name))?,
            None => open_tap(&tap.name),
        })?;
        self.devices.push(tap_spec(mac, None, false, slot));
        Ok(())
    }

    /// The machine's end of the control connection. With `sockets` the machine listens there, and the connection is
    /// the first it takes.
    fn control(&mut self, sockets: Option<&Path>) -> Result<FdSlot, Failure> {
        let mut near = None;
        let slot = self.add(|| {
            let Some(dir) = sockets else {
                let (ours, theirs) = UnixStream::pair()
                    .context(|| "cannot make a socket pair to control the machine by".to_owned())?;
                near = Some(ours);
                return Ok(OwnedFd::from(theirs));
            };
            let path = dir.join(CONTROL_SOCKET);
            let listener = listen(&path)?;
            let connected = UnixStream::connect(&path);
            near = Some(connected.context(|| format!("cannot connect to {}", path.display()))?);
            Ok(OwnedFd::from(listener))
        })?;
        self.control = near;
        Ok(slot)
    }

    /// What the machine's disks and cards are charged at, with these limits.
    fn meters(&mut self, limits: &[Limit]) -> Result<FdSlot, Failure> {
        let mut made = Meters::default();
        let slot = self.add(|| {
            let (meters, file) =
                Meters::create().context(|| "cannot make meters of a machine's traffic".to_owned())?;
            limits.iter().for_each(|limit| meters.set(limit));
            made = meters;
            Ok(file)
        })?;
        self.meters = made;
        Ok(slot)
    }

    fn vsock(&mut self, sockets: Option<&Path>) -> Result<(), Failure> {
        let listener = match sockets {
            Some(dir) => Some(self.add(|| listen(&dir.join(VSOCK_SOCKET)))?),
            None => None,
        };
        let mut server = None;
        let dialer = self.add(|| {
            let (ours, theirs) = DialServer::pair()
                .context(|| "cannot make a socket pair for the machine's vsock".to_owned())?;
            server = Some(ours);
            Ok(theirs)
        })?;
        self.devices.push(DeviceSpec::Vsock(vsock::Config {
            listener,
            dialer: Some(dialer),
            ..vsock::Config::new(vsock::GuestCid::FIRST)
        }));
        self.calls = server.map(|server| Calls::new(server, sockets.map(PathBuf::from)));
        Ok(())
    }

    /// Connects the console; returns what the kernel's command line needs for it.
    fn console(&mut self, plan: &Plan) -> Result<String, Failure> {
        let Some(kind) = plan.console else { return Ok(String::new()) };
        let pipe = || std::io::pipe().context(|| "cannot make a pipe for the console".to_owned());
        let (mut to_guest, mut from_guest) = (None, None);
        let input = self.add(|| {
            let (theirs, ours) = pipe()?;
            to_guest = Some(ours);
            Ok(theirs)
        })?;
        let output = self.add(|| {
            let (ours, theirs) = pipe()?;
            from_guest = Some(ours);
            Ok(theirs)
        })?;
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
        self.console =
            to_guest.zip(from_guest).map(|(to_guest, from_guest)| Console { to_guest, from_guest });
        Ok(format!("console={} ", kind.terminal()))
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

#[cfg(test)]
#[path = "start_tests.rs"]
mod tests;
