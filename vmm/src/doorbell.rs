//! Doorbells that ring without an exit.

use std::io;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

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
