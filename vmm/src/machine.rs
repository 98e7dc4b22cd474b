//! A machine, from its configuration to its end.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use kvm_ioctls::{Kvm, VcpuFd};
use mvm_devices::io_loop::IoLoop;
use mvm_devices::memory::Memory;
use mvm_devices::pci::host_bridge::HostBridge;
use mvm_devices::throttle::Meters;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::boot::{self, Entry, Images, Placed, Platform};
use crate::bus::Bus;
use crate::config::{Boot, DeviceSpec, MachineConfig, Restore, Start};
use crate::cpuid::{self, Topology};
use crate::devices::{self, Attacher};
use crate::doorbell::Doorbells;
use crate::ecam::Ecam;
use crate::error::{Error, Result};
use crate::fds::Slots;
use crate::gate::Gate;
use crate::kvm::host::{self, SupportedCpuid};
use crate::kvm::{Vm, registers};
use crate::layout;
use crate::memory;
use crate::metrics::Counters;
use crate::pci_bus::PciBus;
use crate::serial_port;
use crate::snapshot::host::HostFacts;
use crate::snapshot::pages::{self, Backed};
use crate::snapshot::source::{self, Source};
use crate::snapshot::vcpu::{SaveVcpu, VcpuState};
use crate::snapshot::{self, MachineState, SnapshotId, WorkingSet, number};
use crate::status::{Stages, Stream, now};
use crate::userfault::Userfault;
use crate::vcpu::{self, Running, Vcpu};

/// RAM that was saved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedRam {
    /// The snapshot's.
    pub id: SnapshotId,
    /// How much it is; what comes behind it was plugged later.
    pub bytes: u64,
}

/// A machine whose virtual CPUs have not started.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vec<Vcpu>,
    /// What KVM has of it.
    pub vm: Arc<Vm>,
    /// The parts of its RAM that come from files.
    pub backed: Vec<Backed>,
    /// What of it was saved, if it went on from a snapshot.
    pub saved: Option<SavedRam>,
    /// Whoever brings it, if it is elsewhere.
    pub source: Option<Source>,
    /// Attaches devices; its I/O loop serves them for as long as the machine is there.
    pub attacher: Attacher,
    /// What its CPUs see.
    pub bus: Arc<Bus>,
    /// Holds and ends them.
    pub gate: Arc<Gate>,
    /// Serial input, if there is any.
    pub serial_input: Option<File>,
}

impl Machine {
    /// Builds the machine. Guest memory comes before everything else in KVM, see [`crate::kvm`].
    pub(crate) fn build(
        config: &MachineConfig,
        (slots, userfault): (&mut Slots, Option<Userfault>),
        status: &Arc<Stream>,
        stages: &mut Stages,
    ) -> Result<Self> {
        let kvm = host::open(slots.take_for(config.kvm, "/dev/kvm")?)?;
        let io_loop = (!config.devices.is_empty()).then(devices::shared_loop).transpose()?;
        match &config.start {
            Start::Boot(boot) => {
                let features = SupportedCpuid::ask(&kvm)?; // wanted last
                let memory = memory::create(memory::Extent::of(config)?)?;
                let placed = load(config, boot, slots, &memory)?;
                let backed = placed.images.into_iter().map(|range| Backed { range, file: None }).collect();
                let ram = Ram { memory, backed, saved: None, source: None };
                let mut machine = Self::assemble(config, (slots, io_loop), status, (kvm, ram, None), stages)?;
                machine.add_vcpus(vcpus(&machine.vm, features, config.cpus.get(), placed.entry)?);
                stages.vcpus_ns = now();
                Ok(machine)
            }
            Start::Restore(restore) => {
                let (state, ram) = read(config, restore, (slots, userfault), status)?;
                let mut machine =
                    Self::assemble(config, (slots, io_loop), status, (kvm, ram, Some(&state)), stages)?;
                machine.add_vcpus(restored_vcpus(&machine.vm, &state)?);
                machine.vm.add_config_space(machine.bus.pci.ecam())?;
                stages.vcpus_ns = now();
                Ok(machine)
            }
        }
    }

    /// A machine without CPUs, with devices as configured, and as `saved` if it goes on from a snapshot.
    fn assemble(
        config: &MachineConfig,
        (slots, io_loop): (&mut Slots, Option<IoLoop>),
        status: &Arc<Stream>,
        (kvm, ram, saved): (Arc<Kvm>, Ram, Option<&MachineState>),
        stages: &mut Stages,
    ) -> Result<Self> {
        stages.loaded_ns = now();
        let ecam = Ecam::take()?;
        let vm = Arc::new(Vm::new(kvm, ram.memory)?);
        stages.vm_ns = now();

        let pci = PciBus::new(Arc::clone(vm.fd()) as Arc<dyn Doorbells>, ecam);
        pci.add_bridge(HostBridge::new())?;
        let mut attacher = Attacher::new(Arc::clone(&vm), io_loop, meters(config, slots)?);
        for (index, spec) in config.devices.iter().enumerate() {
            let spec = &placed(spec, config);
            let function = saved.and_then(|saved| saved.functions.get(index));
            let attached = match function {
                Some(function) => {
                    attacher.build(spec, slots).and_then(|virtio| pci.put_back(function, virtio))
                }
                None => attacher.attach(spec, slots, &pci).map(drop),
            };
            attached.map_err(|source| Error::Configured { index, source: Box::new(source) })?;
        }
        let (serial, serial_input) = match &config.serial {
            Some(spec) => serial_port::build(spec, slots).map(|(port, input)| (Some(port), input))?,
            None => (None, None),
        };
        if let (Some(port), Some(state)) = (&serial, saved.and_then(|saved| saved.serial.as_ref())) {
            port.port.lock().unwrap_or_else(PoisonError::into_inner).restore(state);
        }
        let bus = Arc::new(Bus::new(pci, serial, Arc::clone(status), Arc::new(Counters::default())));
        stages.devices_ns = now();

        let gate = Arc::new(Gate::new().map_err(Error::system("make an event"))?);
        Ok(Self {
            vcpus: Vec::new(),
            vm,
            backed: ram.backed,
            saved: ram.saved,
            source: ram.source,
            attacher,
            bus,
            gate,
            serial_input,
        })
    }

    fn add_vcpus(&mut self, fds: Vec<VcpuFd>) {
        self.vcpus = (0..)
            .zip(fds)
            .map(|(id, fd)| Vcpu {
                id,
                fd,
                _vm: Arc::clone(&self.vm),
                bus: Arc::clone(&self.bus),
                gate: Arc::clone(&self.gate),
            })
            .collect();
    }

    /// Starts the virtual CPUs. The first one comes last, so that the others are there when it looks for them.
    pub(crate) fn start(&mut self) -> Result<Vec<Running>> {
        vcpu::install_kick_handler()?;
        self.vcpus.drain(..).rev().map(Vcpu::start).collect()
    }

    /// What can wait until the guest runs, which started like this.
    pub(crate) fn complete(&mut self, start: &Start) -> Result<()> {
        self.bus.pci.resume()?;
        if let Start::Boot(_) = start {
            self.vm.add_config_space(self.bus.pci.ecam())?;
        }
        self.attacher.shared().map(drop)
    }

    /// What saving one of its CPUs takes.
    pub(crate) fn save_vcpu(&self) -> Result<SaveVcpu> {
        Ok(SaveVcpu::new(Arc::clone(self.vm.fd()), self.vm.registers()?, self.vm.extended_state()))
    }
}

/// What its disks and cards are charged at.
fn meters(config: &MachineConfig, slots: &mut Slots) -> Result<Meters> {
    let file = slots.take_optional(config.meters, "its meters")?;
    file.map_or_else(|| Ok(Meters::default()), Meters::open).map_err(Error::system("map its meters"))
}

/// `spec` with what the machine decides about it: where memory lies that can be plugged, if there is room for it.
pub(crate) fn placed(spec: &DeviceSpec, config: &MachineConfig) -> DeviceSpec {
    let mut spec = spec.clone();
    if let DeviceSpec::Mem(mem) = &mut spec
        && mem.size_mib <= config.pluggable().unwrap_or(0) >> 20
    {
        mem.address = layout::pluggable(config.memory.bytes());
    }
    spec
}

/// RAM before there is a machine.
struct Ram {
    memory: Memory,
    backed: Vec<Backed>,
    saved: Option<SavedRam>,
    source: Option<Source>,
}

fn read(
    config: &MachineConfig,
    restore: &Restore,
    (slots, userfault): (&mut Slots, Option<Userfault>),
    status: &Arc<Stream>,
) -> Result<(MachineState, Ram)> {
    let state = File::from(slots.take_for(restore.state, "saved state")?);
    let file = slots.take_for(restore.memory, "saved memory")?;
    let state = MachineState::read(&state, config, &restore.contents)?;
    let base = slots.take_optional(restore.base, "memory of the base")?.map(File::from);
    let extent = memory::Extent { shown: state.shown(), ..memory::Extent::of(config)? };
    let ram = match userfault {
        None => {
            let (memory, backed) = pages::map(extent, file.into(), base, &state.id)?;
            let saved = Some(SavedRam { id: state.id, bytes: extent.bytes() });
            Ram { memory, backed, saved, source: None }
        }
        Some(_) if base.is_some() => {
            return Err(snapshot::Error::Base("memory that is elsewhere has none").into());
        }
        Some(userfault) => {
            let (memory, backed, source) = source::map(extent, file, userfault)?;
            source.watch(status)?;
            // Which of it was only read nobody can tell: all that is there is the machine's own.
            Ram { memory, backed, saved: None, source: Some(source) }
        }
    };
    if let Some(file) = slots.take_optional(restore.working_set, "working set")? {
        let set = WorkingSet::read(&file.into(), extent, &state.id)?;
        set.bring_in(&ram.memory).map_err(Error::system("bring in the working set"))?;
    }
    Ok((state, ram))
}

fn load(config: &MachineConfig, boot: &Boot, slots: &mut Slots, memory: &Memory) -> Result<Placed> {
    let kernel = File::from(slots.take_for(boot.kernel, "kernel")?);
    let initrd = slots.take_optional(boot.initrd, "initial RAM disk")?.map(File::from);
    let images = Images {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        cmdline: boot.cmdline.as_str(),
        protocol: boot.protocol,
        image: boot.image,
    };
    let platform = Platform { cpus: config.cpus.get(), serial: config.serial.is_some() };
    Ok(boot::load(memory, config.memory.bytes(), &images, &platform)?)
}

/// Makes reads and writes of `fd` return rather than wait.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).map_err(Error::system("read the flags of a file"))?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags)).map_err(Error::system("set the flags of a file"))?;
    Ok(())
}

fn vcpus(vm: &Vm, features: SupportedCpuid, count: u8, entry: Entry) -> Result<Vec<VcpuFd>> {
    let fds = (0..count).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>>>()?;
    let supported = features.answer()?;
    for (id, fd) in (0..).zip(&fds) {
        let tsc_khz = match fd.get_tsc_khz() {
            // The timers of such a machine would never fire.
            Ok(0) => return Err(Error::KvmLacks("a time stamp counter whose frequency the host knows")),
            Ok(khz) => khz,
            // A KVM that does not tell leaves the guest to ask kvmclock.
            Err(_) => 0,
        };
        let topology = Topology { cpus: count, tsc_khz, tsc_deadline: vm.has_tsc_deadline_timer() };
        let cpuid = cpuid::for_vcpu(&supported, topology, id)?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("set a virtual CPU's features"))?;
        registers::set_msrs(fd)?;
        if id == 0 {
            registers::set_entry(fd, entry)?;
        }
    }
    Ok(fds)
}

fn restored_vcpus(vm: &Vm, state: &MachineState) -> Result<Vec<VcpuFd>> {
    let here = HostFacts::here();
    for vcpu in &state.vcpus {
        state.host.admits(&here, &vcpu.cpuid, || vm.supported_cpuid())?;
    }
    // All of them first: what one is given must not be taken for what a later one starts with.
    let ids = (0..state.vcpus.len()).map(number);
    let fds = ids.map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>>>()?;
    VcpuState::restore_all(&state.vcpus, &fds, vm.fd(), vm.extended_state())?;
    Ok(fds)
}
