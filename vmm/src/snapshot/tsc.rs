//! A guest's time: its CPUs' time stamp counters, and KVM's clock.
//!
//! Counters go on from where they were saved, all from the same host time: by their offsets to the host's counter
//! (Linux 5.16). Written as registers instead, KVM guesses which writes were meant to be the same, and takes the
//! counter of a guest younger than a second for one of a new machine.
#![allow(unsafe_code)] // the offset's calls, which take an address

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_clock_data, kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_iow_nr;

use crate::error::{Error, Result};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe2, kvm_device_attr);

/// Time stamp counter.
pub(super) const MSR_TSC: u32 = 0x10;
/// How often two clocks are read one after the other, to have read them at nearly the same time once.
const READINGS: usize = 5;

/// How often the clock is set at most, until that went without a delay.
const SETTINGS: usize = 20;
/// The part of a millisecond that it may take to set it.
const CLOSE: u32 = 4;

/// The guest's two clocks at one time. They must go on together: Linux measures each by the other, and gives the
/// faster one up if they are a millisecond apart after half a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moment {
    /// The virtual CPU's time stamp counter.
    pub tsc: u64,
    /// What it is ahead of the host's, if KVM says.
    offset: Option<u64>,
    /// KVM's clock in nanoseconds.
    clock: u64,
}

impl Moment {
    /// Both clocks of `fd`, a CPU of `vm`, as close to each other as they can be read.
    pub(super) fn now(vm: &VmFd, fd: &VcpuFd) -> Result<Self> {
        let clock = || vm.get_clock().map(|clock| clock.clock).map_err(Error::kvm("read the guest's clock"));
        let mut closest = (u64::MAX, Self::default());
        for _ in 0..READINGS {
            let before = clock()?;
            let tsc = read(fd)?;
            let apart = clock()?.saturating_sub(before);
            if apart < closest.0 {
                closest =
                    (apart, Self { tsc, offset: offset(fd).ok(), clock: before.saturating_add(apart / 2) });
            }
        }
        Ok(closest.1)
    }
}

/// Makes one moment of the `moments` at which CPUs were saved, whose counters have frequency `khz`. What the guest
/// itself set them apart by stays.
pub(super) fn align(moments: &mut [&mut Moment], khz: u32) {
    let Some(first) = moments.first().map(|moment| **moment) else { return };
    for moment in moments {
        if let (Some(offset), Some(first_offset)) = (moment.offset, first.offset) {
            moment.tsc = first.tsc.wrapping_add(offset.wrapping_sub(first_offset));
        } else if moment.tsc.abs_diff(first.tsc) < u64::from(khz).saturating_mul(1000) {
            // KVM's own bound of what is meant to be the same: a second.
            moment.tsc = first.tsc;
        }
    }
}

/// Lets the counters of `fds`, new CPUs that have their frequency, go on from `moments`. False if this KVM knows no
/// offsets: the counters are to be written then.
pub(super) fn go_on(fds: &[VcpuFd], moments: &[Moment]) -> Result<bool> {
    let (Some(fd), Some(first)) = (fds.first(), moments.first()) else { return Ok(true) };
    let Ok(now) = offset(fd) else { return Ok(false) };
    let from = now.wrapping_add(first.tsc.wrapping_sub(read(fd)?));
    for (fd, moment) in fds.iter().zip(moments) {
        let offset = from.wrapping_add(moment.tsc.wrapping_sub(first.tsc));
        set_offset(fd, offset).map_err(|error| Error::kvm("set a time stamp counter's offset")(error))?;
    }
    Ok(true)
}

/// Sets KVM's clock of `vm` so that it has gone on from `moment` as far as the counter of `fd`, whose frequency is
/// `khz`, has. Anew if it took so long that a guest would notice: a busy host may have let others run in between.
pub(super) fn set_clock(vm: &VmFd, fd: &VcpuFd, moment: &Moment, khz: u32) -> Result<()> {
    let mut before = read(fd)?;
    for _ in 0..SETTINGS {
        let ticks = before.saturating_sub(moment.tsc);
        let passed = ticks.saturating_mul(1_000_000).checked_div(khz.into()).unwrap_or(0);
        let clock = kvm_clock_data { clock: moment.clock.saturating_add(passed), ..Default::default() };
        vm.set_clock(&clock).map_err(Error::kvm("set the guest's clock"))?;
        let after = read(fd)?;
        if after.saturating_sub(before) <= u64::from(khz / CLOSE) {
            break;
        }
        before = after;
    }
    Ok(())
}

fn read(fd: &VcpuFd) -> Result<u64> {
    let wanted = [kvm_msr_entry { index: MSR_TSC, ..Default::default() }];
    let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::KvmLacks("room for a register"))?;
    let read = fd.get_msrs(&mut msrs).map_err(Error::kvm("read a time stamp counter"))?;
    let counter = msrs.as_slice().first().filter(|_| read == 1);
    counter.map(|msr| msr.data).ok_or(Error::KvmLacks("a time stamp counter"))
}

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        ..Default::default()
    }
}

fn offset(fd: &VcpuFd) -> Result<u64, errno::Error> {
    let mut value = 0;
    let mut attribute = attribute(&raw mut value);
    // SAFETY: KVM writes eight bytes at the attribute's address, which is `value`'s.
    let done = unsafe { ioctl_with_mut_ref(fd, KVM_GET_DEVICE_ATTR(), &mut attribute) };
    if done == 0 { Ok(value) } else { Err(errno::Error::last()) }
}

fn set_offset(fd: &VcpuFd, mut value: u64) -> Result<(), errno::Error> {
    let attribute = attribute(&raw mut value);
    // SAFETY: KVM reads eight bytes at the attribute's address, which is `value`'s.
    let done = unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) };
    if done == 0 { Ok(()) } else { Err(errno::Error::last()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(tsc: u64, offset: Option<u64>) -> Moment {
        Moment { tsc, offset, clock: 0 }
    }

    fn aligned<const N: usize>(mut moments: [Moment; N]) -> [u64; N] {
        align(&mut moments.iter_mut().collect::<Vec<_>>(), 2_000_000);
        moments.map(|moment| moment.tsc)
    }

    #[test]
    fn counters_of_one_offset_are_the_same_whenever_they_were_read() {
        let negative = Some(5u64.wrapping_neg());
        let moments = [moment(1000, negative), moment(9_000_000_000, negative), moment(900, Some(2))];
        assert_eq!(aligned(moments), [1000, 1000, 1007]);
    }

    #[test]
    fn without_offsets_what_is_less_than_a_second_apart_is_the_same() {
        let moments =
            [7_000_000_000, 7_000_100_000, 6_999_000_000, 9_000_000_000].map(|tsc| moment(tsc, None));
        assert_eq!(aligned(moments), [7_000_000_000, 7_000_000_000, 7_000_000_000, 9_000_000_000]);
    }
}
