//! Where a virtio-pci function keeps what: one memory BAR, one page per kind of register, and the
//! capabilities that say so (VIRTIO 1.2 §4.1.4).
//!
//! The BAR is 32 bits wide and preassigned: a 64-bit one takes two registers, so it is sized and probed with
//! as many writes, and the window below 4 GiB has room for thousands of these.

use crate::pci::config::{Header, HeaderError, Identity};
use crate::pci::msix::{self, Msix};

/// The one BAR.
pub const BAR: u8 = 0;
/// Bytes of the BAR.
pub const BAR_SIZE: u32 = 0x8000;
/// Bytes between two queues' doorbells.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues of a device: their doorbells and table entries fit their pages many times over.
pub const MAX_QUEUES: usize = 64;

const VENDOR: u16 = 0x1af4;
/// Device id of a modern function without its virtio id.
const MODERN: u16 = 0x1040;
const REVISION: u8 = 1;
/// `PCI_CAP_ID_VNDR`.
const VENDOR_CAPABILITY: u8 = 9;

const PAGE: u32 = 0x1000;
const COMMON: u32 = 0;
const COMMON_LEN: u32 = 0x40;
const ISR: u32 = PAGE;
const DEVICE: u32 = 2 * PAGE;
const NOTIFY: u32 = 3 * PAGE;
const TABLE: u32 = 4 * PAGE;
const PENDING: u32 = 5 * PAGE;

/// `cfg_type` of a virtio capability.
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// One kind of register in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Common configuration.
    Common,
    /// Interrupt status.
    Isr,
    /// The device's own configuration space.
    Device,
    /// Doorbells.
    Notify,
    /// MSI-X table.
    Table,
    /// MSI-X pending bits.
    Pending,
}

/// The region at `offset` of the BAR and the offset in it.
pub fn region(offset: u64) -> Option<(Region, u64)> {
    let region = match u32::try_from(offset).ok()?.checked_div(PAGE)?.checked_mul(PAGE)? {
        COMMON => Region::Common,
        ISR => Region::Isr,
        DEVICE => Region::Device,
        NOTIFY => Region::Notify,
        TABLE => Region::Table,
        PENDING => Region::Pending,
        _ => return None,
    };
    Some((region, offset.checked_rem(PAGE.into())?))
}

/// Offset in the BAR of a queue's doorbell.
pub fn doorbell(queue: u16) -> u64 {
    u64::from(NOTIFY).saturating_add(u64::from(queue).saturating_mul(NOTIFY_MULTIPLIER.into()))
}

/// What the capabilities describe.
pub struct Contents<'a> {
    /// Virtio device id.
    pub id: u16,
    /// PCI class code.
    pub class: [u8; 3],
    /// Number of queues.
    pub queues: u32,
    /// Bytes of the device's configuration space; 0 for none.
    pub config_len: u32,
    /// The vector table.
    pub msix: &'a Msix,
}

/// A function's header, and where in it the capabilities are that the guest writes to.
pub struct Function {
    /// The header.
    pub header: Header,
    /// Offset of the MSI-X capability.
    pub msix: usize,
    /// Offset of the configuration access capability.
    pub window: usize,
}

/// Builds the header.
///
/// # Errors
/// [`HeaderError`]: never for contents within the bounds of this module.
pub fn function(contents: &Contents<'_>) -> Result<Function, HeaderError> {
    let id = contents.id.saturating_add(MODERN);
    let mut header = Header::new(Identity {
        vendor: VENDOR,
        device: id,
        revision: REVISION,
        class: contents.class,
        subsystem_vendor: VENDOR,
        subsystem: id,
    });
    header.add_memory_bar(BAR, BAR_SIZE)?;
    let mut add = |kind, offset, len, more: &[u8], writable: &[u8]| {
        header.add_capability(VENDOR_CAPABILITY, &body(kind, offset, len, more), writable)
    };
    add(TYPE_COMMON, COMMON, COMMON_LEN, &[], &[])?;
    let doorbells = contents.queues.saturating_mul(NOTIFY_MULTIPLIER);
    add(TYPE_NOTIFY, NOTIFY, doorbells, &NOTIFY_MULTIPLIER.to_le_bytes(), &[])?;
    add(TYPE_ISR, ISR, 1, &[], &[])?;
    if contents.config_len != 0 {
        add(TYPE_DEVICE, DEVICE, contents.config_len, &[], &[])?;
    }
    let window = add(TYPE_PCI, 0, 0, &[0; 4], &WINDOW_WRITABLE)?;
    let (body, writable) = contents.msix.capability(BAR, TABLE, PENDING);
    let msix = header.add_capability(msix::CAPABILITY, &body, &writable)?;
    Ok(Function { header, msix, window })
}

/// `struct virtio_pci_cap` after its id and link, and what follows it.
fn body(kind: u8, offset: u32, len: u32, more: &[u8]) -> Vec<u8> {
    // id, link and these sixteen bytes less the two: `cap_len` counts all of it.
    let cap_len = u8::try_from(more.len().saturating_add(16)).unwrap_or(u8::MAX);
    let mut body = vec![cap_len, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(more);
    body
}

/// Offsets in the configuration access capability.
pub mod window {
    /// Which BAR.
    pub const BAR: usize = 4;
    /// Offset in the BAR.
    pub const OFFSET: usize = 8;
    /// Bytes of the access.
    pub const LENGTH: usize = 12;
    /// The window itself.
    pub const DATA: usize = 16;
    /// End of the capability.
    pub const END: usize = 20;
}

/// `bar`, `offset`, `length` and the data are the guest's, counted from after id and link.
const WINDOW_WRITABLE: [u8; 18] =
    [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
