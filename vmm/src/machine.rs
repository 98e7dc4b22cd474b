//! A machine, from its configuration to its end.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use mvm_devices::memory::Memory;
use mvm_devices::pci::host_bridge::HostBridge;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::boot::{self, Entry, Images, Platform};
use crate::bus::Bus;
use crate::config::MachineConfig;
use crate::cpuid::{self, Topology};
use crate::devices::Attacher;
use crate::doorbell::Doorbells;
use crate::ecam::Ecam;
use crate::error::{Error, Result};
use crate::fds::Slots;
use crate::gate::Gate;
use crate::kvm::host::{self, SupportedCpuid};
use crate::kvm::{Vm, registers};
use crate::memory;
use crate::metrics::Counters;
use crate::pci_bus::PciBus;
use crate::serial_port;
use crate::status::{Stages, Stream, now};
use crate::vcpu::{self, Running, Vcpu};

/// A machine whose virtual CPUs have not started.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vec<Vcpu>,
    vm: Arc<Vm>,
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
        slots: &mut Slots,
        status: &Arc<Stream>,
        stages: &mut Stages,
    ) -> Result<Self> {
        let kvm = host::open(slots.take_for(config.kvm, "/dev/kvm")?)?;
        let features = SupportedCpuid::ask(&kvm)?; // wanted in step 5
        let memory = memory::create(config.memory)?; // 1. RAM, where layout.rs says
        let entry = load(config, slots, &memory)?; // 2. kernel, initial RAM disk, tables
        stages.loaded_ns = now();

        let ecam = Ecam::take()?;
        let vm = Arc::new(Vm::new(kvm, memory)?); // 3. a machine that has them
        stages.vm_ns = now();

        let pci = PciBus::new(Arc::clone(vm.fd()) as Arc<dyn Doorbells>, ecam);
        pci.add_bridge(HostBridge::new())?; // 4. devices
        let mut attacher = Attacher::new(Arc::clone(&vm));
        for (index, spec) in config.devices.iter().enumerate() {
            let attached = attacher.attach(spec, slots, &pci);
            attached.map_err(|source| Error::Configured { index, source: Box::new(source) })?;
        }
        let (serial, serial_input) = match &config.serial {
            Some(spec) => serial_port::build(spec, slots).map(|(port, input)| (Some(port), input))?,
            None => (None, None),
        };
        let bus = Arc::new(Bus::new(pci, serial, Arc::clone(status), Arc::new(Counters::default())));
        stages.devices_ns = now();

        let gate = Arc::new(Gate::new().map_err(Error::system("make an event"))?);
        let vcpus = vcpus(&vm, features, config.cpus.get(), entry)? // 5. CPUs, pointed at the entry
            .into_iter()
            .map(|(id, fd)| Vcpu {
                id,
                fd,
                _vm: Arc::clone(&vm),
                bus: Arc::clone(&bus),
                gate: Arc::clone(&gate),
            })
            .collect();
        stages.vcpus_ns = now();
        Ok(Self { vcpus, vm, attacher, bus, gate, serial_input })
    }

    /// Starts the virtual CPUs. The first one comes last, so that the others are there when it looks for them.
    pub(crate) fn start(&mut self) -> Result<Vec<Running>> {
        vcpu::install_kick_handler()?;
        self.vcpus.drain(..).rev().map(Vcpu::start).collect()
    }

    /// What can wait until the guest runs.
    pub(crate) fn complete(&self) -> Result<()> {
        self.vm.add_config_space(self.bus.pci.ecam())
    }
}

fn load(config: &MachineConfig, slots: &mut Slots, memory: &Memory) -> Result<Entry> {
    let kernel = File::from(slots.take_for(config.boot.kernel, "kernel")?);
    let initrd = slots.take_optional(config.boot.initrd, "initial RAM disk")?.map(File::from);
    let images = Images {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        cmdline: config.boot.cmdline.as_str(),
        protocol: config.boot.protocol,
        image: config.boot.image,
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

fn vcpus(vm: &Vm, features: SupportedCpuid, count: u8, entry: Entry) -> Result<Vec<(u8, VcpuFd)>> {
    let fds = (0..count).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>>>()?;
    let supported = features.answer()?;
    let mut vcpus = Vec::with_capacity(count.into());
    for (id, fd) in (0..).zip(fds) {
        // A KVM that does not tell leaves the guest to ask kvmclock.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let topology = Topology { cpus: count, tsc_khz, tsc_deadline: vm.has_tsc_deadline_timer() };
        let cpuid = cpuid::for_vcpu(&supported, topology, id)?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("set a virtual CPU's features"))?;
        registers::set_msrs(&fd)?;
        if id == 0 {
            registers::set_entry(&fd, entry)?;
        }
        vcpus.push((id, fd));
    }
    Ok(vcpus)
}
