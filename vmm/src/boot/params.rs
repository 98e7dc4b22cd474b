//! What the kernel is told about the machine: the Linux "zero page", or PVH's start info.

use std::mem::offset_of;

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{XEN_HVM_START_MAGIC_VALUE, hvm_start_info};
use mvm_devices::memory::Memory;

use super::{Loaded, Result, Span, write};
use crate::layout;

/// Memory map types, the same in E820 and PVH.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// `type_of_loader`: a loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// `loadflags`: the kernel lies above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Distance of PVH's module list and memory map from its start info.
const MODULES_OFFSET: u64 = 0x100;
const MEMORY_MAP_OFFSET: u64 = 0x200;

/// The memory map: RAM without what the firmware keeps, and what must not be used for devices.
fn memory_map(ram: u64) -> Vec<(Span, u32)> {
    let span = |start: u64, end: u64| Span { start, length: end.saturating_sub(start) };
    let mut map = vec![
        (span(0, layout::LOW_RAM_END), RAM),
        (span(layout::ACPI, layout::ACPI + layout::ACPI_SIZE), RESERVED),
    ];
    for (start, length) in layout::ram_regions(ram) {
        map.push((span(start.max(layout::HIGH_MEMORY), start + length), RAM));
    }
    map.push((span(layout::ECAM, layout::ECAM + layout::ECAM_SIZE), RESERVED));
    map
}

/// A page that is filled field by field.
struct Page([u8; size_of::<boot_params>()]);

impl Page {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(offset..offset.saturating_add(bytes.len())) {
            field.copy_from_slice(bytes);
        }
    }
}

/// Writes `boot_params`.
pub(super) fn write_zero_page(
    memory: &Memory,
    ram: u64,
    kernel: &Loaded,
    initrd: Option<Span>,
) -> Result<()> {
    const HEADER: usize = offset_of!(boot_params, hdr);
    let mut page = Page([0; size_of::<boot_params>()]);
    match &kernel.header {
        Some(header) => page.put(HEADER, &header.0),
        None => {
            page.put(HEADER + offset_of!(setup_header, boot_flag), &0xaa55u16.to_le_bytes());
            page.put(HEADER + offset_of!(setup_header, header), b"HdrS");
            page.put(HEADER + offset_of!(setup_header, kernel_alignment), &0x100_0000u32.to_le_bytes());
            page.put(HEADER + offset_of!(setup_header, loadflags), &[LOADED_HIGH]);
        }
    }
    page.put(HEADER + offset_of!(setup_header, type_of_loader), &[UNDEFINED_LOADER]);
    let (cmdline, cmdline_high) = halves(layout::CMDLINE);
    page.put(HEADER + offset_of!(setup_header, cmd_line_ptr), &cmdline);
    page.put(offset_of!(boot_params, ext_cmd_line_ptr), &cmdline_high);
    page.put(
        HEADER + offset_of!(setup_header, cmdline_size),
        &u32::try_from(layout::CMDLINE_SIZE - 1).unwrap_or(0).to_le_bytes(),
    );
    if let Some(initrd) = initrd {
        let (start, start_high) = halves(initrd.start);
        let (length, length_high) = halves(initrd.length);
        page.put(HEADER + offset_of!(setup_header, ramdisk_image), &start);
        page.put(HEADER + offset_of!(setup_header, ramdisk_size), &length);
        page.put(offset_of!(boot_params, ext_ramdisk_image), &start_high);
        page.put(offset_of!(boot_params, ext_ramdisk_size), &length_high);
    }
    page.put(offset_of!(boot_params, acpi_rsdp_addr), &layout::ACPI.to_le_bytes());
    let map = memory_map(ram);
    page.put(offset_of!(boot_params, e820_entries), &[u8::try_from(map.len()).unwrap_or(0)]);
    for (index, (span, kind)) in map.iter().enumerate() {
        let entry = offset_of!(boot_params, e820_table) + index * size_of::<boot_e820_entry>();
        page.put(entry, &span.start.to_le_bytes());
        page.put(entry + 8, &span.length.to_le_bytes());
        page.put(entry + 16, &kind.to_le_bytes());
    }
    write(memory, layout::BOOT_PARAMS, &page.0, "boot parameters")
}

/// Writes `hvm_start_info`, its module list and its memory map.
pub(super) fn write_start_info(memory: &Memory, ram: u64, initrd: Option<Span>) -> Result<()> {
    let mut page = Page([0; size_of::<boot_params>()]);
    let map = memory_map(ram);
    page.put(offset_of!(hvm_start_info, magic), &XEN_HVM_START_MAGIC_VALUE.to_le_bytes());
    page.put(offset_of!(hvm_start_info, version), &1u32.to_le_bytes());
    page.put(offset_of!(hvm_start_info, cmdline_paddr), &layout::CMDLINE.to_le_bytes());
    page.put(offset_of!(hvm_start_info, rsdp_paddr), &layout::ACPI.to_le_bytes());
    let map_address = layout::BOOT_PARAMS + MEMORY_MAP_OFFSET;
    page.put(offset_of!(hvm_start_info, memmap_paddr), &map_address.to_le_bytes());
    let entries = u32::try_from(map.len()).unwrap_or(0);
    page.put(offset_of!(hvm_start_info, memmap_entries), &entries.to_le_bytes());
    let mut offset = usize::try_from(MEMORY_MAP_OFFSET).unwrap_or(usize::MAX);
    for (span, kind) in &map {
        page.put(offset, &span.start.to_le_bytes());
        page.put(offset + 8, &span.length.to_le_bytes());
        page.put(offset + 16, &kind.to_le_bytes());
        offset += 24;
    }
    if let Some(initrd) = initrd {
        let modules = usize::try_from(MODULES_OFFSET).unwrap_or(usize::MAX);
        page.put(offset_of!(hvm_start_info, nr_modules), &1u32.to_le_bytes());
        let list = layout::BOOT_PARAMS + MODULES_OFFSET;
        page.put(offset_of!(hvm_start_info, modlist_paddr), &list.to_le_bytes());
        page.put(modules, &initrd.start.to_le_bytes());
        page.put(modules + 8, &initrd.length.to_le_bytes());
    }
    write(memory, layout::BOOT_PARAMS, &page.0, "start info")
}

/// Low and high half of an address, as the zero page stores them.
fn halves(value: u64) -> ([u8; 4], [u8; 4]) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    ([a, b, c, d], [e, f, g, h])
}
