//! Type 0 configuration space: its bytes, which of their bits the guest may write, and the capability list.
//!
//! Reading never changes anything, so the machine may map [`Header::bytes`] to the guest. A function builds
//! its header once with the `add_` methods and then lets the guest [`Header::write`] to it.

use serde::{Deserialize, Serialize};

use super::CONFIG_SPACE_SIZE;
use crate::bounded;

/// Offset of the command register.
pub const COMMAND: usize = 0x04;
/// Command register: the function answers at its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: the function must not raise INTx. Writable because drivers set it beside MSI-X.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const LATENCY_TIMER: usize = 0x0d;
const FIRST_BAR: usize = 0x10;
const BARS: u8 = 6;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Capabilities lie between the header and the end of the conventional space.
const CAPABILITIES: std::ops::Range<usize> = 0x40..0x100;
/// Double words of the space.
const DOUBLE_WORDS: usize = CONFIG_SPACE_SIZE / 4;
/// Smallest memory BAR: the low four bits are type bits.
const SMALLEST_BAR: u32 = 16;
/// Not 0, because Linux then writes a value of its own on each `pci_set_master`: an exit for nothing.
const LATENCY: u8 = 64;

/// Who a function is, as it stands in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// What does not fit into a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// No room is left between the header and offset 256.
    #[error("no room for capability {0:#x}")]
    Capability(u8),
    /// The BAR does not exist, is taken, or its size is not a power of two of at least 16.
    #[error("BAR {0} cannot be {1:#x} bytes")]
    Bar(u8, u32),
}

/// A function's configuration space.
#[derive(Clone, Debug)]
pub struct Header {
    bytes: Box<[u8; CONFIG_SPACE_SIZE]>,
    /// Bits the guest may change.
    writable: Box<[u8; CONFIG_SPACE_SIZE]>,
    /// Where the offset of the next capability is to be written.
    link: usize,
    /// First free byte for capabilities.
    free: usize,
    /// Sizes of the BARs, by index; 0 for none.
    bars: [u32; BARS as usize],
}

/// What the guest wrote: each double word with writable bits, by offset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderState(#[serde(deserialize_with = "bounded::list::<_, _, DOUBLE_WORDS>")] Vec<(u16, u32)>);

impl Header {
    /// A header without BARs and capabilities, decoding off.
    pub fn new(identity: Identity) -> Self {
        let mut header = Self {
            bytes: Box::new([0; CONFIG_SPACE_SIZE]),
            writable: Box::new([0; CONFIG_SPACE_SIZE]),
            link: CAPABILITIES_POINTER,
            free: CAPABILITIES.start,
            bars: [0; BARS as usize],
        };
        let [base, sub, interface] = identity.class;
        header.set(0x00, &identity.vendor.to_le_bytes());
        header.set(0x02, &identity.device.to_le_bytes());
        header.set(0x08, &[identity.revision, interface, sub, base]);
        header.set(LATENCY_TIMER, &[LATENCY]);
        header.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        header.set(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        header.allow(COMMAND, &command.to_le_bytes());
        header.allow(LATENCY_TIMER, &[0xff]);
        header.allow(INTERRUPT_LINE, &[0xff]);
        header
    }

    /// Adds a 32-bit, non-prefetchable memory BAR of `size` bytes.
    ///
    /// # Errors
    /// [`HeaderError::Bar`].
    pub fn add_memory_bar(&mut self, index: u8, size: u32) -> Result<(), HeaderError> {
        let error = HeaderError::Bar(index, size);
        let place = self.bars.get_mut(usize::from(index)).ok_or(error)?;
        if *place != 0 || !size.is_power_of_two() || size < SMALLEST_BAR {
            return Err(error);
        }
        *place = size;
        // The bits below the size are fixed at 0, which is how software finds the size.
        self.allow(bar_offset(index), &size.wrapping_neg().to_le_bytes());
        Ok(())
    }

    /// Adds a capability: `body` follows the id and the link, `writable` are the bits of it that the guest
    /// may write (bytes it does not cover are read-only). Returns the capability's offset.
    ///
    /// # Errors
    /// [`HeaderError::Capability`] when the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, HeaderError> {
        let at = self.free;
        let end = body.len().saturating_add(2).saturating_add(at).next_multiple_of(4);
        let offset = u8::try_from(at).map_err(|_| HeaderError::Capability(id))?;
        if end > CAPABILITIES.end {
            return Err(HeaderError::Capability(id));
        }
        self.set(self.link, &[offset]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(at, &[id, 0]);
        self.set(at.saturating_add(2), body);
        self.allow(at.saturating_add(2), writable);
        self.link = at.saturating_add(1);
        self.free = end;
        Ok(at)
    }

    /// The space as the guest reads it.
    pub fn bytes(&self) -> &[u8; CONFIG_SPACE_SIZE] {
        &self.bytes
    }

    /// A guest write; bits that are not writable, and bytes outside, stay as they are.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let places = self.bytes.iter_mut().zip(self.writable.iter()).skip(offset);
        for ((byte, mask), value) in places.zip(data) {
            *byte = (*byte & !mask) | (value & mask);
        }
    }

    /// Changes bytes for the function itself, writable or not. Bytes outside are dropped.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    /// `N` bytes at `offset`; those outside are 0.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (byte, value) in bytes.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = *value;
        }
        bytes
    }

    /// Whether the function answers at its memory BARs.
    pub fn memory_enabled(&self) -> bool {
        u16::from_le_bytes(self.get(COMMAND)) & COMMAND_MEMORY != 0
    }

    /// The BARs there are: index, address, size.
    pub fn memory_bars(&self) -> impl Iterator<Item = (u8, u32, u32)> + '_ {
        (0..BARS).zip(self.bars).filter(|(_, size)| *size != 0).map(|(index, size)| {
            // The writable bits are the address bits.
            (index, u32::from_le_bytes(self.get(bar_offset(index))), size)
        })
    }

    /// Places a BAR and switches memory decoding off, as firmware would.
    pub fn place_bar(&mut self, index: u8, address: u32) {
        if index < BARS {
            self.write(bar_offset(index), &address.to_le_bytes());
        }
        let command = u16::from_le_bytes(self.get(COMMAND)) & !COMMAND_MEMORY;
        self.set(COMMAND, &command.to_le_bytes());
    }

    /// What the guest wrote.
    pub fn state(&self) -> HeaderState {
        let places = (0u16..).step_by(4).zip(self.writable.chunks_exact(4));
        let written = places.filter(|(_, mask)| mask.iter().any(|bits| *bits != 0));
        HeaderState(written.map(|(at, _)| (at, u32::from_le_bytes(self.get(at.into())))).collect())
    }

    /// Takes over what the guest had written; only writable bits change, whatever `state` says.
    pub fn restore(&mut self, state: &HeaderState) {
        for (offset, value) in &state.0 {
            self.write(usize::from(*offset), &value.to_le_bytes());
        }
    }

    fn allow(&mut self, offset: usize, bits: &[u8]) {
        for (mask, value) in self.writable.iter_mut().skip(offset).zip(bits) {
            *mask = *value;
        }
    }
}

fn bar_offset(index: u8) -> usize {
    usize::from(index).saturating_mul(4).saturating_add(FIRST_BAR)
}
