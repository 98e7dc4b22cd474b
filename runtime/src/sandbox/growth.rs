//! A machine's memory follows the limits of what is in it when they are changed: it grows while it runs, and shrinks again,
//! also when a container goes.
//!
//! Every machine is made with addresses for as much memory as its host has, which cost nothing. What plugs memory there
//! is attached once a limit is raised above the machine's size, so that machines whose limits stay as they are have
//! no such device.

use std::sync::{MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mvm_devices::virtio::mem::STEP_MIB;
use mvm_vmm::config::MemSize;

use super::machine::MachineSandbox;
use super::stage::Live;
use crate::failure::{Context, Failure};
use crate::machine::Control;
use crate::spec::{Size, memory_for};

/// How long a guest may take to plug memory: an emulated one plugs 4 GiB in a second.
const PLUG_TIME: Duration = Duration::from_secs(30);
/// How often it is looked whether it has.
const INTERVAL: Duration = Duration::from_millis(10);

/// What a machine was given beyond its size.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// It has the device for it.
    pub(super) is_attached: bool,
    /// What it is to have in all, in MiB, if that is more than its size.
    mib: u64,
}

impl MachineSandbox {
    /// MiB it can be given while it runs: what its host has besides, in the steps that memory comes in.
    pub(super) fn pluggable_mib(&self) -> u64 {
        let most = self.host.memory_mib.min(MemSize::MAX_MIB);
        most.saturating_sub(self.size.memory.mib()) / STEP_MIB * STEP_MIB
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
        if wanted.mib() <= growth.mib.max(self.size.memory.mib()) {
            return Ok(());
        }
        let control = live.control();
        if !growth.is_attached {
            control.attach_memory(self.pluggable_mib())?;
            growth.is_attached = true;
        }
        let found = live.agent.rescan().context(|| "cannot have the guest look for its memory".to_owned());
        if let Err(failure) = found.and_then(|()| plug(&control, wanted.mib())) {
            // What it has plugged is of no use to anybody now.
            if let Err(failure) = control.memory(Some(growth.mib)) {
                log::warn!("{}", failure.report());
            }
            return Err(failure);
        }
        growth.mib = wanted.mib();
        Ok(())
    }

    /// Takes back what it was given beyond what the limits that hold now call for. Its guest gives it back when it can:
    /// nobody waits for that.
    pub(super) fn shrink(&self, growth: &mut Growth, live: &Live) {
        let wanted = self.memory_for(self.members().values().map(|member| member.memory));
        if wanted.mib() >= growth.mib {
            return;
        }
        growth.mib = wanted.mib();
        let control = live.control();
        if let Err(failure) = control.memory(Some(wanted.mib())) {
            log::warn!("{}", failure.report());
        }
    }
}

/// Waits until the guest has plugged what makes it `mib` in all.
fn plug(control: &Control, mib: u64) -> Result<(), Failure> {
    let end = Instant::now() + PLUG_TIME;
    let mut now = control.memory(Some(mib))?;
    while now.plugged_mib < now.size_mib {
        if Instant::now() >= end {
            let has = format!("the guest has {} of the {} MiB it was given", now.plugged_mib, now.size_mib);
            return Err(Failure::new(has).help("its kernel needs CONFIG_VIRTIO_MEM: use the one of mvm"));
        }
        thread::sleep(INTERVAL);
        now = control.memory(None)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::answering;
    use crate::sandbox::machine::tests::{alone, planned};

    #[test]
    fn a_guest_is_waited_for_until_it_has_what_it_was_given() {
        let (control, host) = answering(&[
            r#"{"ok":{"size_mib":640,"plugged_mib":128,"max_mib":1152}}"#,
            r#"{"ok":{"size_mib":640,"plugged_mib":512,"max_mib":1152}}"#,
            r#"{"ok":{"size_mib":640,"plugged_mib":640,"max_mib":1152}}"#,
            r#"{"error":"4000 MiB are more than this machine can have: at most 1152 MiB"}"#,
        ]);
        plug(&control, 640).unwrap();
        let refused = plug(&control, 4000).unwrap_err().report();
        assert!(refused.contains("at most 1152 MiB"), "{refused}");
        let asked = host.join().unwrap();
        let (first, then) = (r#"{"command":"memory","size_mib":640}"#, r#"{"command":"memory"}"#);
        assert_eq!(asked, [first, then, then, r#"{"command":"memory","size_mib":4000}"#]);
    }

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
        sandbox.host.memory_mib = 64;
        assert_eq!((sandbox.pluggable_mib(), sandbox.most().memory.mib()), (0, 128));
    }
}
