//! The descriptor and page tables a 64-bit entry expects (Linux x86 boot protocol, "64-bit boot protocol").

use mvm_devices::memory::Memory;

use super::Result;
use crate::layout::{self, PAGE_SIZE};

/// Present and writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB page.
const LARGE_PAGE: u64 = 0b1000_0011;
/// Entries of a page table.
const ENTRIES: u64 = 512;

/// Flat 64-bit code segment, at selector 0x10.
pub(crate) const CODE_64: u64 = 0x00af_9b00_0000_ffff;
/// Flat data segment, at selector 0x18.
pub(crate) const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A task state segment, so that the task register is valid, at selector 0x20.
pub(crate) const TASK: u64 = 0x008f_8b00_0000_ffff;
/// The descriptor table.
pub(crate) const DESCRIPTORS: [u64; 5] = [0, 0, CODE_64, DATA, TASK];

/// Writes the descriptor table, and page tables that map the first GiB to itself with 2 MiB pages.
pub(super) fn write(memory: &Memory) -> Result<()> {
    let bytes: Vec<u8> = DESCRIPTORS.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    super::write(memory, layout::GDT, &bytes, "descriptor table")?;
    super::write(memory, layout::PML4, &(layout::PDPT | TABLE).to_le_bytes(), "page tables")?;
    super::write(memory, layout::PDPT, &(layout::PAGE_DIRECTORY | TABLE).to_le_bytes(), "page tables")?;
    let directory: Vec<u8> =
        (0..ENTRIES).flat_map(|index| ((index * ENTRIES * PAGE_SIZE) | LARGE_PAGE).to_le_bytes()).collect();
    super::write(memory, layout::PAGE_DIRECTORY, &directory, "page tables")
}
