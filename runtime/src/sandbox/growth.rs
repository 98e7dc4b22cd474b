//! A machine's memory follows the limits of what is in it when they are changed: it grows while it runs, and shrinks again,
//! also when a container goes.
//!
//! Every machine is made with addresses for as much memory as its host has, which cost nothing. What plugs memory there
//! is attached once a limit is raised above the machine's size, so that machines whose limits stay as they are have
//! no such device.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use mvm_devices::virtio::mem::STEP_MIB;
use mvm_vmm::config::MemSize;

use super::limits::Sizes;
use super::machine::MachineSandbox;
pub(super) use super::plugging::Growth;
use super::plugging::Guest;
use super::stage::Live;
use crate::failure::Failure;
use crate::snapshot::SavedMachine;
use crate::spec::{Size, memory_for};

/// How long a guest may take to plug memory: an emulated one plugs 4 GiB in a second.
const PLUG_TIME: Duration = Duration::from_secs(30);

impl MachineSandbox {
    /// MiB it can be given while it runs: what its host has besides, in the steps that memory comes in, and its device
    /// can plug.
    pub(super) fn pluggable_mib(&self) -> u64 {
        let most = self.host.memory_mib.min(MemSize::MAX_MIB);
        let besides = most.saturating_sub(self.size.memory.mib()) / STEP_MIB * STEP_MIB;
        self.plugs_mib.map_or(besides, |mib| mib.min(besides))
    }

    /// It goes on as a machine that was saved: of that size, and with what it had been given.
    pub(super) fn go_on_as(&mut self, machine: &SavedMachine) {
        self.size = Size { cpus: machine.cpus, memory: machine.memory_mib };
        self.plugs_mib = machine.growth.map(|growth| growth.most_mib);
    }

    /// The memory it may have in all for a container of these limits alone.
    pub(super) fn memory_of(&self, sizes: &Sizes) -> MemSize {
        self.memory_for([sizes.memory].into_iter())
    }

    /// The largest it can become.
    pub(super) fn most(&self) -> Size {
        let mib = self.size.memory.mib().saturating_add(self.pluggable_mib());
        Size { memory: mib.try_into().unwrap_or(self.size.memory), ..self.size }
    }

    /// Its growth; locked for as long as limits are changed, so that none takes back what another was just promised.
    pub(super) fn growth(&self) -> MutexGuard<'_, Growth> {
        self.growth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory it needs once `container` has a limit of so many bytes.
    pub(super) fn memory_with(&self, container: &str, limit: u64) -> MemSize {
        let members = self.members();
        let others = members.iter().filter(|(id, _)| *id != container).map(|(_, member)| member.memory);
        self.memory_for(others.chain([limit]))
    }

    /// The memory it needs for containers of these limits in bytes; one without, or 0, has what there is.
    fn memory_for(&self, limits: impl Iterator<Item = u64>) -> MemSize {
        let sum = limits.fold(0, u64::saturating_add);
        if sum <= self.size.memory.bytes() {
            return self.size.memory;
        }
        memory_for(Some(sum), self.host).clamp(self.size.memory, self.most().memory)
    }

    /// Gives it `wanted` in all, if it is to have less, and waits until its guest has that.
    pub(super) fn grow(&self, growth: &mut Growth, live: &Live, wanted: MemSize) -> Result<(), Failure> {
        if wanted <= self.size.memory {
            return Ok(());
        }
        let guest = Guest { control: &live.control(), agent: &live.agent, patience: PLUG_TIME };
        growth.grow(&guest, self.pluggable_mib(), wanted.mib())
    }

    /// Takes back what it was given beyond what the limits that hold now call for. Its guest gives it back when it can:
    /// nobody waits for that.
    pub(super) fn shrink(&self, growth: &mut Growth, live: &Live) {
        let wanted = self.memory_for(self.members().values().map(|member| member.memory));
        if let Err(failure) = growth.shrink(&live.control(), wanted.mib()) {
            log::warn!("{}", failure.report());
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::sandbox::machine::tests::{alone, planned};

    #[test]
    fn a_machine_needs_more_once_its_limits_are_more_than_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let mut sandbox = planned(dir.path(), alone()).unwrap();
        sandbox.host.memory_mib = 1000;
        assert_eq!((sandbox.pluggable_mib(), sandbox.most().memory.mib()), (768, 896));
        let wanted = |mib: u64| sandbox.memory_with("c", mib << 20).mib();
        assert_eq!([0, 100, 128].map(wanted), [128; 3]);
        assert_eq!(wanted(256), 256 + 8 + 48);
        assert_eq!([890, 896, 5000].map(wanted), [896; 3], "no more than there is");
        let pod = |limits: &[u64]| sandbox.memory_for(limits.iter().map(|mib| mib << 20)).mib();
        assert_eq!(pod(&[]), 128);
        assert_eq!(pod(&[64, 64]), 128, "what is in it fits");
        assert_eq!((pod(&[100, 0, 156]), pod(&[u64::MAX >> 20; 2])), (256 + 8 + 48, 896));
        sandbox.plugs_mib = Some(256);
        assert_eq!(
            (sandbox.pluggable_mib(), sandbox.most().memory.mib()),
            (256, 384),
            "no more than its device can"
        );
        sandbox.plugs_mib = Some(1 << 20);
        assert_eq!(sandbox.pluggable_mib(), 768, "nor its host");
        sandbox.host.memory_mib = 64;
        assert_eq!((sandbox.pluggable_mib(), sandbox.most().memory.mib()), (0, 128));
    }
}
