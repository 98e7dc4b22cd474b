//! The state of one virtual CPU, as KVM gives and takes it.
#![allow(unsafe_code)] // the extended state, whose size KVM assumes

use std::mem::size_of;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use mvm_devices::bounded;
use serde::{Deserialize, Serialize};

use super::Error as Saved;
use super::tsc::{self, MSR_TSC, Moment};
use crate::error::{Error, Result};

/// When the local APIC's timer fires, by the time stamp counter.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The guest uses virtualisation itself: VT-x and AMD-V.
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// Most registers that one call takes.
const MAX_MSRS: usize = kvm_bindings::KVM_MAX_MSR_ENTRIES;
/// Words of the extended state that every CPU has.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();
/// Most words of extended state that are read again: several times what any CPU has.
const MAX_XSAVE: usize = 16 << 10;
/// Most registers that are read again: several times what KVM knows.
const MAX_SAVED_MSRS: usize = 4096;
/// How far the frequency of two hosts' time stamp counters may be apart, in millionths. Linux itself tolerates 500.
const TSC_TOLERANCE: u64 = 250;

/// A virtual CPU between two instructions.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    /// What its CPUID instruction says.
    #[serde(deserialize_with = "bounded::list::<_, _, KVM_MAX_CPUID_ENTRIES>")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its time stamp counter in kHz, 0 if KVM did not say.
    tsc_khz: u32,
    moment: Moment,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// As KVM_GET_XSAVE2 lays it out.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_XSAVE>")]
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// In the order in which they are set.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_SAVED_MSRS>")]
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// What saving a virtual CPU of this machine takes.
#[derive(Debug)]
pub(crate) struct SaveVcpu {
    /// Model-specific registers that KVM has state of, in the order in which they are to be set.
    msrs: Vec<u32>,
    xsave_bytes: usize,
    vm: Arc<VmFd>,
}

impl SaveVcpu {
    /// Saves CPUs of `vm`: `msrs` among the rest, and `xsave_bytes` of extended state (0 if KVM does not say).
    pub(crate) fn new(vm: Arc<VmFd>, msrs: Vec<u32>, xsave_bytes: usize) -> Self {
        Self { msrs: in_order(msrs), xsave_bytes, vm }
    }

    /// Saves `fd`, which must not be in the middle of an instruction.
    ///
    /// The order matters: KVM_GET_MP_STATE may change what the other calls give, and a timer that fires in between
    /// is in the deadline register, in the local APIC, or in both, but not in neither.
    pub(crate) fn save(&self, fd: &VcpuFd) -> Result<VcpuState> {
        let get = |what| Error::kvm(what);
        let mp_state = fd.get_mp_state().map_err(get("read whether a virtual CPU runs"))?;
        let msrs = self.msrs(fd)?;
        let sregs = fd.get_sregs().map_err(get("read a virtual CPU's special registers"))?;
        if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
            return Err(Error::Nested);
        }
        Ok(VcpuState {
            moment: Moment::now(&self.vm, fd)?,
            mp_state,
            msrs,
            regs: fd.get_regs().map_err(get("read a virtual CPU's registers"))?,
            sregs,
            xsave: self.xsave(fd)?,
            xcrs: fd.get_xcrs().map_err(get("read a virtual CPU's extended control registers"))?,
            debug: fd.get_debug_regs().map_err(get("read a virtual CPU's debug registers"))?,
            lapic: fd.get_lapic().map_err(get("read a local APIC"))?,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            cpuid: fd
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(get("read a virtual CPU's features"))?
                .as_slice()
                .to_vec(),
            events: fd.get_vcpu_events().map_err(get("read a virtual CPU's events"))?,
        })
    }

    /// Reads what can be read of the registers: KVM lists some that this machine's CPUs do not have.
    fn msrs(&self, fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>> {
        let mut found = Vec::with_capacity(self.msrs.len());
        let mut rest = self.msrs.as_slice();
        while !rest.is_empty() {
            let wanted: Vec<_> = rest
                .iter()
                .take(MAX_MSRS)
                .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
                .collect();
            let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::KvmLacks("room for registers"))?;
            let read = fd.get_msrs(&mut msrs).map_err(Error::kvm("read model-specific registers"))?;
            found.extend(msrs.as_slice().iter().take(read));
            // KVM stops at the first that it cannot read.
            let passed = if read < wanted.len() { read + 1 } else { read };
            rest = rest.get(passed..).unwrap_or_default();
        }
        Ok(found)
    }

    fn xsave(&self, fd: &VcpuFd) -> Result<Vec<u32>> {
        let get = "read a virtual CPU's extended state";
        let Some(more) = more_words(self.xsave_bytes) else {
            return Ok(fd.get_xsave().map_err(Error::kvm(get))?.region.to_vec());
        };
        let mut xsave = room(more)?;
        // SAFETY: it has as many bytes as KVM says this machine's CPUs have; none are added while it runs.
        unsafe { fd.get_xsave2(&mut xsave) }.map_err(Error::kvm(get))?;
        let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
        words.extend(xsave.as_slice());
        Ok(words)
    }
}

impl VcpuState {
    /// Puts `states` into `fds`, the new CPUs of `vm` whose extended state has `xsave_bytes`.
    ///
    /// # Errors
    /// KVM refuses a part of it.
    pub(crate) fn restore_all(states: &[Self], fds: &[VcpuFd], vm: &VmFd, xsave_bytes: usize) -> Result<()> {
        for (state, fd) in states.iter().zip(fds) {
            let cpuid =
                CpuId::from_entries(&state.cpuid).map_err(|_| Saved::Nonsense("too many features"))?;
            fd.set_cpuid2(&cpuid).map_err(Error::kvm("set a virtual CPU's features"))?;
            state.restore_tsc_khz(fd)?;
        }
        let moments: Vec<_> = states.iter().map(|state| state.moment).collect();
        let counting = tsc::go_on(fds, &moments)?;
        for (state, fd) in states.iter().zip(fds) {
            state.restore(fd, xsave_bytes, counting)?;
        }
        match (states.first(), fds.first()) {
            (Some(state), Some(fd)) => tsc::set_clock(vm, fd, &state.moment, state.tsc_khz),
            _ => Ok(()),
        }
    }

    /// Puts the state into `fd`, which has its features and, if it is `counting`, its time stamp counter.
    ///
    /// The order is KVM's: CPUID decides what else is possible, the special registers switch the local APIC on,
    /// which must be there before its timer's deadline, and what is injected comes last.
    fn restore(&self, fd: &VcpuFd, xsave_bytes: usize, counting: bool) -> Result<()> {
        let set = |what| Error::kvm(what);
        fd.set_mp_state(self.mp_state).map_err(set("set whether a virtual CPU runs"))?;
        fd.set_regs(&self.regs).map_err(set("set a virtual CPU's registers"))?;
        fd.set_sregs(&self.sregs).map_err(set("set a virtual CPU's special registers"))?;
        self.restore_xsave(fd, xsave_bytes)?;
        fd.set_xcrs(&self.xcrs).map_err(set("set a virtual CPU's extended control registers"))?;
        fd.set_debug_regs(&self.debug).map_err(set("set a virtual CPU's debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(set("set a local APIC"))?;
        self.restore_msrs(fd, counting)?;
        fd.set_vcpu_events(&self.events).map_err(set("set a virtual CPU's events"))
    }

    /// Makes one moment of those at which `vcpus` were saved.
    pub(crate) fn align(vcpus: &mut [VcpuState]) {
        let khz = vcpus.first().map_or(0, |vcpu| vcpu.tsc_khz);
        tsc::align(&mut vcpus.iter_mut().map(|vcpu| &mut vcpu.moment).collect::<Vec<_>>(), khz);
    }

    fn restore_tsc_khz(&self, fd: &VcpuFd) -> Result<()> {
        let here = fd.get_tsc_khz().unwrap_or(0);
        let (saved, apart) = (u64::from(self.tsc_khz), u64::from(self.tsc_khz.abs_diff(here)));
        // A guest that was told no frequency has found out by itself what it relies on.
        if saved == 0 || apart.saturating_mul(1_000_000) <= saved.saturating_mul(TSC_TOLERANCE) {
            return Ok(());
        }
        fd.set_tsc_khz(self.tsc_khz).map_err(|_| Saved::TscFrequency { saved: self.tsc_khz, here }.into())
    }

    fn restore_xsave(&self, fd: &VcpuFd, bytes: usize) -> Result<()> {
        let more = more_words(bytes).unwrap_or(0);
        if self.xsave.len() > XSAVE_WORDS.saturating_add(more) {
            return Err(Saved::Nonsense("more extended state than this host's CPUs have").into());
        }
        let mut xsave = room(more)?;
        // SAFETY: the words are changed, not the number of those that follow them.
        let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
        region.iter_mut().zip(&self.xsave).for_each(|(word, saved)| *word = *saved);
        let rest = self.xsave.get(XSAVE_WORDS..).unwrap_or_default();
        xsave.as_mut_slice().iter_mut().zip(rest).for_each(|(word, saved)| *word = *saved);
        // SAFETY: it has as many bytes as KVM says this machine's CPUs have; none are added while it runs.
        unsafe { fd.set_xsave2(&xsave) }.map_err(Error::kvm("set a virtual CPU's extended state"))
    }

    /// Sets the registers, in order. One that cannot be set is an error unless it is at its value already.
    fn restore_msrs(&self, fd: &VcpuFd, counting: bool) -> Result<()> {
        let moment = kvm_msr_entry { index: MSR_TSC, data: self.moment.tsc, ..Default::default() };
        let counter = (!counting).then_some(moment);
        let msrs: Vec<_> = counter.into_iter().chain(self.msrs.iter().copied()).collect();
        let mut rest = msrs.as_slice();
        while !rest.is_empty() {
            let chunk = rest.get(..MAX_MSRS).unwrap_or(rest);
            let msrs = Msrs::from_entries(chunk).map_err(|_| Error::KvmLacks("room for registers"))?;
            let set = fd.set_msrs(&msrs).map_err(Error::kvm("set model-specific registers"))?;
            let Some(refused) = chunk.get(set) else {
                rest = rest.get(set..).unwrap_or_default();
                continue;
            };
            if current(fd, refused.index) != Some(refused.data) {
                return Err(Saved::Register { index: refused.index, value: refused.data }.into());
            }
            rest = rest.get(set + 1..).unwrap_or_default();
        }
        Ok(())
    }
}

/// The registers to save, in the order in which they are to be set: the timer's deadline last, because it may then
/// fire. The time stamp counter is saved apart.
fn in_order(mut msrs: Vec<u32>) -> Vec<u32> {
    msrs.retain(|index| *index != MSR_TSC);
    msrs.sort_by_key(|index| *index == MSR_TSC_DEADLINE);
    msrs
}

/// The value of a model-specific register, if it can be read.
fn current(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let read = fd.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| read == 1).map(|msr| msr.data)
}

/// Words of the extended state beyond those every CPU has; `None` if KVM does not say how many bytes there are.
fn more_words(bytes: usize) -> Option<usize> {
    let more = bytes.checked_sub(size_of::<kvm_xsave>())?;
    Some(more.div_ceil(size_of::<u32>()))
}

fn room(more: usize) -> Result<Xsave> {
    Xsave::new(more).map_err(|_| Error::KvmLacks("a bounded extended state"))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl VcpuState {
        /// A state with something in each of its lists.
        pub(crate) fn sample(number: u32) -> Self {
            let leaf = |function| kvm_cpuid_entry2 { function, eax: 7, edx: number, ..Default::default() };
            let msr = |index| kvm_msr_entry { index, data: u64::from(index) << 32, ..Default::default() };
            Self {
                cpuid: (0..8).map(leaf).collect(),
                tsc_khz: 2_000_000,
                regs: kvm_regs { rip: 0x10_0000, ..Default::default() },
                xsave: (0..40).map(|word| word << 20).collect(),
                msrs: [0x174, 0x175, 0xc000_0080, MSR_TSC_DEADLINE].map(msr).to_vec(),
                ..Default::default()
            }
        }
    }

    #[test]
    fn the_deadline_is_set_last_and_the_counter_apart() {
        let msrs = vec![MSR_TSC_DEADLINE, 0x174, MSR_TSC, 0x4b56_4d01];
        assert_eq!(in_order(msrs), [0x174, 0x4b56_4d01, MSR_TSC_DEADLINE]);
    }

    #[test]
    fn the_extended_state_is_never_less_than_what_every_cpu_has() {
        assert_eq!((more_words(0), more_words(4096), more_words(4097)), (None, Some(0), Some(1)));
    }
}
