//! bzImage kernels, as distributions ship them, by their 64-bit entry (Linux boot protocol 2.12).
//!
//! The decompressor moves itself and writes the kernel over its load address, so the image is copied.

use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use mvm_devices::memory::Memory;

use super::{Error, Loaded, MAX_KERNEL_BYTES, Result, Room, Span, copy};
use crate::layout;

/// Offset of the setup header in the file and in `boot_params`.
const HEADER_OFFSET: u64 = 0x1f1;
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// First protocol version with `xloadflags`.
const VERSION_2_12: u32 = 0x020c;
/// `xloadflags`: the image has a 64-bit entry at [`ENTRY_64_OFFSET`].
const XLF_KERNEL_64: u32 = 1;
/// Offset of the 64-bit entry in the protected-mode part.
const ENTRY_64_OFFSET: u64 = 0x200;
/// Where kernels without a preferred address go.
const DEFAULT_ADDRESS: u64 = 0x100_0000;

/// A setup header as it is in the file.
#[derive(Clone, Debug)]
pub(super) struct Header(pub(super) [u8; size_of::<setup_header>()]);

impl Header {
    fn read(file: &File) -> Result<Self> {
        let mut bytes = [0; size_of::<setup_header>()];
        file.read_exact_at(&mut bytes, HEADER_OFFSET).map_err(|_| Error::UnknownFormat)?;
        let header = Self(bytes);
        if header.u32_at(offset_of!(setup_header, header)) != MAGIC {
            return Err(Error::UnknownFormat);
        }
        let version = header.u32_at(offset_of!(setup_header, version)) & 0xffff;
        let flags = header.u32_at(offset_of!(setup_header, xloadflags)) & 0xffff;
        if version < VERSION_2_12 || flags & XLF_KERNEL_64 == 0 {
            return Err(Error::BzImage("it has no 64-bit entry"));
        }
        Ok(header)
    }

    /// Highest address an initial RAM disk may reach.
    pub(super) fn initrd_addr_max(&self) -> u64 {
        self.u32_at(offset_of!(setup_header, initrd_addr_max)).into()
    }

    fn u32_at(&self, offset: usize) -> u32 {
        self.0.get(offset..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    fn u64_at(&self, offset: usize) -> u64 {
        self.0.get(offset..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// Copies the protected-mode part to where the image prefers it.
pub(super) fn load(memory: &Memory, file: &File, bytes: u64, room: Room) -> Result<Loaded> {
    let header = Header::read(file)?;
    let sectors = match header.0.first() {
        None | Some(0) => 4,
        Some(&sectors) => u64::from(sectors),
    };
    let setup = (sectors + 1) * 512;
    let length = bytes.checked_sub(setup).ok_or(Error::BzImage("it is shorter than its set-up code"))?;
    let address = match header.u64_at(offset_of!(setup_header, pref_address)) {
        0 => DEFAULT_ADDRESS,
        preferred => preferred,
    };
    let init_size = u64::from(header.u32_at(offset_of!(setup_header, init_size)));
    if address < layout::HIGH_MEMORY || init_size > MAX_KERNEL_BYTES {
        return Err(Error::BzImage("it wants to lie below 1 MiB or needs too much memory"));
    }
    let end = address.checked_add(length.max(init_size)).ok_or(Error::BzImage("its address wraps"))?;
    if end > room.below_hole() {
        return Err(room.too_little(end));
    }
    copy(memory, file, Span { start: setup, length }, address, "kernel")?;
    Ok(Loaded { entry: address + ENTRY_64_OFFSET, pvh_entry: None, end, header: Some(header) })
}
