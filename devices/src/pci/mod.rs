//! PCI functions: what the machine's PCI bus needs of a device, and how a device raises interrupts.
//!
//! Only what a virtio-pci modern function and a host bridge need: type 0 headers, memory BARs, MSI-X.
//! There is no INTx: no function has an interrupt pin.

pub mod config;
pub mod host_bridge;
pub mod msix;

/// Bytes of configuration space of one function (PCI Express).
pub const CONFIG_SPACE_SIZE: usize = 4096;

/// A memory BAR as it is decoded now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// BAR register, 0 to 5.
    pub index: u8,
    /// Guest physical address of the first byte.
    pub address: u64,
    /// Bytes, a power of two.
    pub size: u64,
}

/// What a write to configuration space changed beyond the bytes themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum ConfigChange {
    /// Nothing the bus must know of.
    None,
    /// A BAR moved, or memory decoding was switched: the bus asks for [`PciFunction::bars`] again.
    Decoding,
}

/// One PCI function as the machine's bus drives it.
///
/// All calls come from vCPU threads, one at a time (the bus holds a lock per function). Every call is
/// total: any offset, any length, any value has a defined result and none blocks for long.
pub trait PciFunction: Send {
    /// The whole configuration space as the guest must read it now. Reads have no side effects, so the
    /// machine may map this to the guest read-only and refresh it after each write.
    fn config(&self) -> &[u8; CONFIG_SPACE_SIZE];

    /// A write of 1, 2 or 4 bytes at `offset`. Read-only bits stay as they are.
    fn write_config(&mut self, offset: usize, data: &[u8]) -> ConfigChange;

    /// The BARs decoded now; empty while memory decoding is off.
    fn bars(&self) -> Vec<Bar>;

    /// Places BAR `index` at `address` and leaves decoding off: done once by the machine, as firmware would.
    fn assign_bar(&mut self, index: u8, address: u64);

    /// BARs the function implements: (index, size in bytes).
    fn bar_sizes(&self) -> Vec<(u8, u64)>;

    /// Reads BAR `index` at `offset`; bytes no register backs read as all ones.
    fn read_bar(&mut self, index: u8, offset: u64, data: &mut [u8]);

    /// Writes BAR `index` at `offset`; bytes no register backs are ignored.
    fn write_bar(&mut self, index: u8, offset: u64, data: &[u8]);

    /// Doorbells: an address (BAR index, offset) whose write, of any value and of width 2, only signals
    /// `EventFd`. The machine may let KVM signal it without leaving the kernel (ioeventfd).
    fn doorbells(&self) -> Vec<Doorbell>;
}

/// One queue's notification address and the event it signals.
#[derive(Debug)]
pub struct Doorbell {
    /// BAR register the doorbell lies in.
    pub bar: u8,
    /// Offset in that BAR.
    pub offset: u64,
    /// Signalled by a write.
    pub event: vmm_sys_util::eventfd::EventFd,
}

/// A message-signalled interrupt as the guest programmed it into an MSI-X table entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Msi {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where a function's MSI-X vectors end: KVM in a machine, a recorder in tests.
pub trait MsiSink: Send + Sync {
    /// The message of `vector` is now this one; `None` once MSI-X is switched off. A message that is merely
    /// masked stays routed (the function just sends nothing), so that an interrupt already on its way is
    /// not lost. Called from vCPU threads only, and only for changes.
    fn route(&self, vector: u16, msi: Option<Msi>);

    /// Delivers `vector` now, with the message last given to [`MsiSink::route`]. Called from any thread;
    /// must not block.
    fn signal(&self, vector: u16);
}
