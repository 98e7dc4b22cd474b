//! What can be asked of a running machine, done to it.

use mvm_devices::config_space::ConfigSpace;
use mvm_devices::device::Kind;
use mvm_devices::memory::{GuestMemoryBackend, GuestMemoryRegion};
use mvm_devices::virtio::mem::{self, Standing};
use mvm_devices::virtio::{DeviceSpec, balloon};

use super::pause::{pause, resume};
use super::snapshot;
use crate::config::MachineConfig;
use crate::control::server::Received;
use crate::control::{
    Answer, Attached, Balloon, DeviceMetrics, DeviceName, Info, MachineState, MappedRegion, Memory,
    MemoryMap, Metrics, Reply, Request,
};
use crate::error::causes;
use crate::exit::Exit;
use crate::machine::{Machine, placed};
use crate::memory::Extent;
use crate::vcpu::Running;
use crate::{devices, layout, log};

/// Memory a balloon leaves to its guest, in MiB.
const LEAST_MIB: u64 = 32;
/// Some device could not be looked at.
const BUSY: &str = "a device is busy: the host has not completed its last request";

/// The machine that requests are about.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub config: &'a MachineConfig,
    pub machine: Machine,
    pub vcpus: Vec<Running>,
}

impl Subject<'_> {
    /// Does what `request` asks for; `files` came with it.
    pub(super) fn answer(&mut self, request: &Request, files: Received) -> Reply {
        match request {
            Request::Info => Reply::Ok(Answer::Info(self.info())),
            Request::Metrics => Reply::Ok(Answer::Metrics(self.metrics())),
            Request::Pause => done(pause(&self.machine.gate, &self.machine.bus, &self.vcpus)),
            Request::Resume => done(resume(&self.machine.gate, &self.machine.bus.pci)),
            Request::Stop => {
                self.machine.gate.finish(Exit::Stopped);
                Reply::Ok(Answer::Done {})
            }
            Request::Balloon { target_mib } => self.balloon(*target_mib),
            Request::Memory { size_mib } => match self.memory(*size_mib) {
                Ok(memory) => Reply::Ok(Answer::Memory(memory)),
                Err(refusal) => refusal,
            },
            Request::MemoryMap => Reply::Ok(Answer::MemoryMap(self.memory_map())),
            Request::Attach { device } => self.attach(device, files),
            Request::Snapshot { resume, contents, base } => {
                match snapshot::save(self, (contents, *base), *resume, files) {
                    Ok(saved) => Reply::Ok(Answer::Snapshot(saved)),
                    Err(why) => Reply::Error(why),
                }
            }
            Request::Detach { device, force } => self.detach(device, *force),
        }
    }

    /// How much memory there is now.
    pub(super) fn extent(&self) -> Extent {
        let bytes: u64 = self.machine.vm.memory().iter().map(GuestMemoryRegion::len).sum();
        let shown = bytes.saturating_sub(self.config.memory.bytes());
        Extent { ram: self.config.memory, pluggable: shown, shown }
    }

    fn attach(&mut self, spec: &DeviceSpec, mut files: Received) -> Reply {
        match devices::serial(spec) {
            "" => {}
            serial => match self.disk(serial) {
                Ok(None) => {}
                Ok(Some(_)) => {
                    return Reply::Error("a disk of this serial number is attached already".to_owned());
                }
                Err(busy) => return Reply::Busy(busy.to_owned()),
            },
        }
        if matches!(spec, DeviceSpec::Mem(_)) {
            match self.has(mem::KIND) {
                Ok(false) => {}
                Ok(true) => {
                    return Reply::Error(
                        "there is such a device already: memory is plugged by one alone".to_owned(),
                    );
                }
                Err(busy) => return Reply::Busy(busy.to_owned()),
            }
        }
        let spec = &placed(spec, self.config);
        match self.machine.attacher.attach(spec, &mut files, &self.machine.bus.pci) {
            Ok(number) => match u8::try_from(number) {
                Ok(device) => Reply::Ok(Answer::Attached(Attached { device })),
                Err(error) => Reply::Error(error.to_string()),
            },
            Err(error) => {
                let because = causes(&error).into_iter().map(|cause| format!(": {cause}"));
                Reply::Error(format!("{error}{}", because.collect::<String>()))
            }
        }
    }

    fn detach(&self, name: &DeviceName, force: bool) -> Reply {
        let number = match name {
            DeviceName::Number(number) => Ok(Some(usize::from(*number))),
            DeviceName::Serial(serial) => self.disk(serial),
        };
        let number = match number {
            Ok(Some(number)) => number,
            Ok(None) => return Reply::Error("there is no disk of this serial number".to_owned()),
            Err(busy) => return Reply::Busy(busy.to_owned()),
        };
        let device = match self.machine.bus.pci.remove_virtio(number, force) {
            Ok(device) => device,
            Err(why) => return Reply::Error(format!("cannot detach device {number}: {why}")),
        };
        if devices::end(device) {
            return Reply::Ok(Answer::Done {});
        }
        let open =
            "the device is off the bus, but its last request is not completed; its files are closed then";
        Reply::Error(open.to_owned())
    }

    /// Whether there is a device of this kind, unless it may be one that cannot be looked at.
    fn has(&self, kind: Kind) -> Result<bool, &'static str> {
        let mut found = false;
        let busy = self.machine.bus.pci.for_each_virtio(|_, device| found |= device.function.kind() == kind);
        if !found && busy > 0 { Err(BUSY) } else { Ok(found) }
    }

    /// The number of the disk with this serial number, unless it may be one that cannot be looked at.
    fn disk(&self, serial: &str) -> Result<Option<usize>, &'static str> {
        let mut found = None;
        let busy = self.machine.bus.pci.for_each_virtio(|number, device| {
            if !serial.is_empty() && device.serial == serial {
                found = Some(number);
            }
        });
        if found.is_none() && busy > 0 { Err(BUSY) } else { Ok(found) }
    }

    /// Sets the balloon's target and tells the driver; a guest keeps [`LEAST_MIB`] to live on.
    fn balloon(&self, target_mib: u64) -> Reply {
        let target_mib = target_mib.min(self.config.memory.mib().saturating_sub(LEAST_MIB));
        let pages_per_mib = (1 << 20) / balloon::PAGE_SIZE;
        let mut reply = Reply::Error("this machine has no balloon".to_owned());
        let busy = self.machine.bus.pci.for_each_virtio(|_, device| {
            let device = &device.function;
            if device.kind() != balloon::KIND {
                return;
            }
            let pages = u32::try_from(target_mib * pages_per_mib).unwrap_or(u32::MAX);
            let actual = device.change_config(|space| {
                balloon::set_target(space, pages);
                balloon::actual(space)
            });
            let actual_mib = actual.map_or(0, u64::from) / pages_per_mib;
            reply = Reply::Ok(Answer::Balloon(Balloon { target_mib, actual_mib }));
        });
        if busy > 0 && matches!(reply, Reply::Error(_)) { Reply::Busy(BUSY.to_owned()) } else { reply }
    }

    /// Has the guest have `size_mib` in all, and tells where it stands.
    fn memory(&self, size_mib: Option<u64>) -> Result<Memory, Reply> {
        let mut reply = None;
        let busy = self.machine.bus.pci.for_each_virtio(|_, device| {
            let device = &device.function;
            if let (mem::KIND, Some(space)) = (device.kind(), device.config_space()) {
                let resized = size_mib.and_then(|mib| device.change_config(|space| self.resize(space, mib)));
                let resized = resized.unwrap_or(Ok(()));
                let Standing { region, usable, requested, plugged } = mem::standing(space);
                let [max_mib, usable_mib, size_mib, plugged_mib] = [region, usable, requested, plugged]
                    .map(|bytes| self.config.memory.mib() + (bytes >> 20));
                let memory = Memory { size_mib, plugged_mib, max_mib, usable_mib };
                reply = Some(resized.map(|()| memory).map_err(Reply::Error));
            }
        });
        let none = "this machine keeps the memory it has: it is without the device `mem`";
        reply.unwrap_or_else(|| {
            Err(if busy > 0 { Reply::Busy(BUSY.to_owned()) } else { Reply::Error(none.to_owned()) })
        })
    }

    /// Has the device of this configuration space plug what makes it `mib` in all.
    fn resize(&self, space: &ConfigSpace, mib: u64) -> Result<(), String> {
        let Standing { region, usable, .. } = mem::standing(space);
        let ram = self.config.memory;
        let max = ram.mib().saturating_add(region >> 20);
        if mib > max {
            return Err(format!("{mib} MiB are more than this machine can have: at most {max} MiB"));
        }
        // In whole blocks, so no less than that: it is the rest of the region that is a whole number of them.
        let wanted = (mib.saturating_sub(ram.mib()) << 20).next_multiple_of(mem::BLOCK).min(region);
        let usable = layout::plugged_in(ram.bytes(), wanted).min(region).max(usable);
        // First there is memory, then the driver may plug it.
        self.machine.vm.show(usable).map_err(|error| error.to_string())?;
        mem::request(space, usable, wanted);
        Ok(())
    }

    /// Of what was plugged later nothing is told.
    fn memory_map(&self) -> MemoryMap {
        let saved = self.machine.saved;
        let mut left = saved.map_or(0, |saved| saved.bytes);
        let regions = self.machine.vm.memory().iter().map(|region| {
            let bytes = region.len().min(left);
            left -= bytes;
            MappedRegion { host: region.as_ptr() as u64, bytes }
        });
        let regions = regions.filter(|region| region.bytes > 0).collect();
        MemoryMap { snapshot: saved.map(|saved| saved.id), regions }
    }

    fn info(&self) -> Info {
        Info {
            id: self.config.id.as_str().to_owned(),
            pid: std::process::id(),
            state: if self.machine.gate.is_paused() { MachineState::Paused } else { MachineState::Running },
            cpus: self.config.cpus.get(),
            memory_mib: self.config.memory.mib(),
        }
    }

    fn metrics(&self) -> Metrics {
        let bus = &self.machine.bus;
        Metrics {
            exits: bus.counters.exits(),
            devices: self.devices(),
            serial_dropped: bus.serial.as_ref().map_or(0, |serial| serial.dropped.get()),
            log_suppressed: log::suppressed(),
        }
    }

    fn devices(&self) -> Vec<DeviceMetrics> {
        let mut devices = Vec::new();
        self.machine.bus.pci.for_each_virtio(|number, device| {
            let device = &device.function;
            devices.push(DeviceMetrics {
                device: u8::try_from(number).unwrap_or(u8::MAX),
                name: device.kind().name.to_owned(),
                driver_ready: device.driver_ready(),
                needs_reset: device.needs_reset(),
                counts: device
                    .counters()
                    .iter()
                    .map(|count| (count.name().to_owned(), count.get()))
                    .collect(),
            });
        });
        devices
    }
}

fn done(result: Result<(), String>) -> Reply {
    match result {
        Ok(()) => Reply::Ok(Answer::Done {}),
        Err(why) => Reply::Error(why),
    }
}
