//! Where everything lies in guest physical memory and I/O space.
//!
//! RAM runs from 0 to [`HOLE_START`] and, if there is more, on from [`HOLE_END`]. The hole holds the PCI
//! window, the configuration space and the local APICs. The first MiB holds what the machine hands to the
//! kernel; kernels and initial RAM disks are loaded above it.

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// End of the first MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// `boot_params` (the "zero page") of the Linux boot protocol, or PVH's `hvm_start_info`.
pub const BOOT_PARAMS: u64 = 0x7000;
/// The kernel's command line, NUL-terminated.
pub const CMDLINE: u64 = 0x8000;
/// Bytes of the command line with its NUL: what an x86 kernel keeps.
pub const CMDLINE_SIZE: usize = 2048;
/// Global descriptor table; shares the command line's page.
pub const GDT: u64 = 0x8f00;
/// Page tables that map the first GiB to itself: one page each of PML4, PDPT and PD.
pub const PML4: u64 = 0x9000;
/// See [`PML4`].
pub const PDPT: u64 = 0xa000;
/// See [`PML4`].
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// End of the RAM below 640 KiB that is told to the kernel.
pub const LOW_RAM_END: u64 = 0x9_fc00;

/// In a block of 2 MiB of which a booted guest has used a tenth: Linux puts dentries and inodes there and nothing else.
pub const SPARSE_BLOCK: u64 = 0x40_0000;

/// ACPI tables, RSDP first: where a PC's firmware has them, so that a kernel that is not told finds them too.
pub const ACPI: u64 = 0xe_0000;
/// Bytes kept for ACPI tables.
pub const ACPI_SIZE: u64 = 0x2_0000;

/// Start of the hole below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole: more RAM from here on.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Window in which BARs are placed.
pub const BAR_WINDOW: u64 = HOLE_START;
/// Bytes of the BAR window.
pub const BAR_WINDOW_SIZE: u64 = 0x2000_0000;
/// PCI Express configuration space of bus 0.
pub const ECAM: u64 = 0xe800_0000;
/// Bytes of configuration space of one bus: 32 devices of 8 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Page KVM needs on Intel hosts to run real mode: an identity map, then three pages of TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + PAGE_SIZE;

/// A byte written here is a time stamp: 0 is the guest's first instruction, any other a milestone of its own.
pub const BOOT_TIMER_PORT: u16 = 0x3f0;
/// First serial port, 8 registers.
pub const SERIAL_PORT: u16 = 0x3f8;
/// pvpanic: the guest says that it crashed.
pub const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// Value that resets when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x01;
/// Sleep type of soft off, in `\_S5` and in the sleep control register.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Keyboard controller's command and status port: kernels without ACPI reset through it.
pub const KEYBOARD_PORT: u16 = 0x64;

/// What the memory that comes later is added in, by guests of less than [`LARGE_RAM`]: blocks of Linux.
pub const MEMORY_BLOCK: u64 = 128 << 20;
/// From here on Linux may choose larger blocks, up to [`LARGE_MEMORY_BLOCK`].
pub const LARGE_RAM: u64 = 64 << 30;
/// See [`LARGE_RAM`].
pub const LARGE_MEMORY_BLOCK: u64 = 2 << 30;

/// Where memory begins that can be plugged into a machine of `ram` bytes: above everything else, where the guest's
/// largest blocks begin.
pub fn pluggable(ram: u64) -> u64 {
    HOLE_END.saturating_add(ram.saturating_sub(HOLE_START)).next_multiple_of(LARGE_MEMORY_BLOCK)
}

/// Bytes that must be there for a guest of `ram` bytes to plug `bytes`: it looks at whole blocks only.
pub fn plugged_in(ram: u64, bytes: u64) -> u64 {
    bytes.next_multiple_of(if ram < LARGE_RAM { MEMORY_BLOCK } else { LARGE_MEMORY_BLOCK })
}

/// Where RAM lies: `(start, length)` of each region, in order of address.
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    let below = size.min(HOLE_START);
    let above = size.saturating_sub(HOLE_START);
    let mut regions = vec![(0, below)];
    if above > 0 {
        regions.push((HOLE_END, above));
    }
    regions
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ram_regions_sum_to_the_size_and_leave_the_hole(pages in 1u64..(1 << 26)) {
            let size = pages * PAGE_SIZE;
            let regions = ram_regions(size);
            prop_assert_eq!(regions.iter().map(|(_, length)| length).sum::<u64>(), size);
            for (start, length) in regions {
                prop_assert!(length > 0);
                prop_assert!(start + length <= HOLE_START || start >= HOLE_END);
            }
        }
    }

    #[test]
    fn pluggable_memory_is_above_the_hole_and_all_ram() {
        for mib in [4, 128, 3072, 3073, 4096, 65536, 512 << 10] {
            let (start, ram) = (pluggable(mib << 20), ram_regions(mib << 20));
            let end = ram.last().map_or(0, |(start, length)| start + length);
            assert!(start >= end.max(HOLE_END) && start.is_multiple_of(LARGE_MEMORY_BLOCK), "{mib}");
        }
        assert_eq!(plugged_in(128 << 20, 1), MEMORY_BLOCK);
        assert_eq!(plugged_in(128 << 20, 3 * MEMORY_BLOCK), 3 * MEMORY_BLOCK);
        assert_eq!(plugged_in(LARGE_RAM, 1), LARGE_MEMORY_BLOCK);
    }

    #[test]
    fn nothing_in_the_hole_overlaps() {
        let parts = [
            (BAR_WINDOW, BAR_WINDOW_SIZE),
            (ECAM, ECAM_SIZE),
            (LOCAL_APIC, PAGE_SIZE),
            (KVM_IDENTITY_MAP, PAGE_SIZE),
            (KVM_TSS, 3 * PAGE_SIZE),
        ];
        for pair in parts.windows(2) {
            assert!(pair[0].0 >= HOLE_START);
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        const { assert!(KVM_TSS + 3 * PAGE_SIZE <= HOLE_END) };
    }
}
