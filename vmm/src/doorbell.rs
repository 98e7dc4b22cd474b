//! Doorbells that ring without an exit, once that pays.
//!
//! For KVM to watch one it waits for a grace period, which costs as much as ten exits and more; most queues of a short
//! life are rung less often than that. And while a machine's virtual CPU is preempted in a fault, a host with one CPU
//! spends that grace period spinning in a worker of its kernel, up to its next tick. So the virtual CPU asks that
//! rings it, when it has done so a few times.

use std::io;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use mvm_devices::pci::{Bar, Doorbell};
use vmm_sys_util::eventfd::EventFd;

/// How often a doorbell is rung by an exit before KVM watches it.
const EXITS: u8 = 16;

/// Signals an event when the guest writes an address: KVM in a machine, a recorder in tests.
pub(crate) trait Doorbells: Send + Sync {
    /// Any write at `address` signals `event` from now on.
    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Takes back what [`Doorbells::watch`] did with the same arguments.
    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

impl Doorbells for VmFd {
    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        // Without a length to match, hosts that support it look the address up without decoding the instruction.
        self.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// The doorbells of a function.
pub(crate) struct Bells(Vec<Bell>);

struct Bell {
    doorbell: Doorbell,
    /// Exits so far, up to [`EXITS`].
    rung: u8,
    state: Watch,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    Not,
    /// KVM watches this address.
    At(u64),
    /// KVM could not, at the place where it is now.
    Refused,
}

impl Bells {
    /// None of them is watched.
    pub(crate) fn new(doorbells: Vec<Doorbell>) -> Self {
        Self(doorbells.into_iter().map(|doorbell| Bell { doorbell, rung: 0, state: Watch::Not }).collect())
    }

    /// The function answers at these BARs from now on.
    pub(crate) fn moved(&mut self, bars: &[Bar], kvm: &dyn Doorbells) {
        for bell in &mut self.0 {
            let bar = bars.iter().find(|bar| bar.index == bell.doorbell.bar);
            let address = bar.and_then(|bar| bar.address.checked_add(bell.doorbell.offset));
            match bell.state {
                Watch::At(watched) if Some(watched) != address => bell.unwatch(watched, kvm),
                Watch::Refused => bell.state = Watch::Not,
                Watch::At(_) | Watch::Not => {}
            }
        }
    }

    /// A virtual CPU wrote at `offset` of a BAR, which is `address`, and exited.
    pub(crate) fn written(&mut self, bar: u8, offset: u64, address: u64, kvm: &dyn Doorbells) {
        let is_it = |bell: &&mut Bell| bell.doorbell.bar == bar && bell.doorbell.offset == offset;
        let Some(bell) = self.0.iter_mut().find(is_it) else { return };
        bell.rung = bell.rung.saturating_add(1).min(EXITS);
        if bell.rung == EXITS && bell.state == Watch::Not {
            bell.watch(address, kvm);
        }
    }

    /// The function is gone.
    pub(crate) fn forget(mut self, kvm: &dyn Doorbells) {
        self.moved(&[], kvm);
    }
}

impl Bell {
    fn watch(&mut self, address: u64, kvm: &dyn Doorbells) {
        self.state = match kvm.watch(address, &self.doorbell.event) {
            Ok(()) => Watch::At(address),
            Err(error) => {
                log::warn!("the doorbell at {address:#x} costs an exit: {error}");
                Watch::Refused
            }
        };
    }

    fn unwatch(&mut self, address: u64, kvm: &dyn Doorbells) {
        if let Err(error) = kvm.unwatch(address, &self.doorbell.event) {
            log::warn!("the doorbell at {address:#x} cannot be moved: {error}");
        }
        self.state = Watch::Not;
    }
}
