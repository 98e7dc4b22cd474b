//! ACPI tables: hardware-reduced, local APICs only, PCI by ECAM.
//!
//! Linux needs a MADT or it never starts the local APIC timer, a FADT that says "hardware-reduced" or it
//! looks for a PIC and a PIT, and a DSDT with the PCI root or it finds no PCI without ports 0xcf8/0xcfc.

use mvm_devices::memory::Memory;

use super::aml::{self, Resource};
use super::{Result, write as put};
use crate::layout;

/// What the tables depend on.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Virtual CPUs; their APIC identifiers are 0, 1, …
    pub cpus: u8,
    /// Whether the serial port exists.
    pub serial: bool,
}

/// FADT, IA-PC boot flags: no VGA, no PCIe ASPM, no CMOS clock; 0 in the rest: no legacy devices, no 8042.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4 | 1 << 5;
/// FADT flags: WBINVD works, no power or sleep button, no fixed RTC, reset register, hardware-reduced.
const FADT_FLAGS: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10 | 1 << 20;
/// Bytes of a FADT of revision 6.
const FADT_SIZE: usize = 276;
/// Bytes of a RSDP of revision 2.
const RSDP_SIZE: usize = 36;

/// Writes all tables at [`layout::ACPI`], RSDP first.
pub(super) fn write(memory: &Memory, platform: &Platform) -> Result<()> {
    put(memory, layout::ACPI, &build(platform), "ACPI tables")
}

fn build(platform: &Platform) -> Vec<u8> {
    let mut image = vec![0; RSDP_SIZE];
    let mut place = |table: Vec<u8>| {
        let address = layout::ACPI + image.len() as u64;
        image.extend(table);
        image.resize(image.len().next_multiple_of(8), 0);
        address
    };
    place(vec![]);
    let dsdt = place(table(b"DSDT", 2, &dsdt(platform)));
    let listed = [fadt(dsdt), madt(platform), mcfg()].map(&mut place);
    let pointers: Vec<u8> = listed.iter().flat_map(|address| address.to_le_bytes()).collect();
    let xsdt = place(table(b"XSDT", 1, &pointers));
    let rsdp = rsdp(xsdt);
    if let Some(start) = image.get_mut(..RSDP_SIZE) {
        start.copy_from_slice(&rsdp);
    }
    image
}

/// A system description table: header, `body`, checksum.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(36 + body.len()).unwrap_or(u32::MAX);
    let mut bytes = signature.to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend([revision, 0]); // the checksum comes last
    bytes.extend(b"MVM   MVM     ");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(b"MVM ");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(body);
    set_checksum(&mut bytes, 9, length as usize);
    bytes
}

/// Makes the first `length` bytes sum to 0 by the byte at `at`.
fn set_checksum(bytes: &mut [u8], at: usize, length: usize) {
    let sum = bytes.iter().take(length).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

fn rsdp(xsdt: u64) -> [u8; RSDP_SIZE] {
    let mut bytes = [0; RSDP_SIZE];
    let fields = [
        b"RSD PTR ".as_slice(),
        &[0],
        b"MVM   ",
        &[2],
        &0u32.to_le_bytes(),
        &36u32.to_le_bytes(),
        &xsdt.to_le_bytes(),
    ]
    .concat();
    bytes.iter_mut().zip(fields).for_each(|(byte, value)| *byte = value);
    set_checksum(&mut bytes, 8, 20);
    set_checksum(&mut bytes, 32, RSDP_SIZE);
    bytes
}

/// Generic address structure of a one-byte I/O register.
fn port(address: u16) -> Vec<u8> {
    let mut bytes = vec![1, 8, 0, 1];
    bytes.extend(u64::from(address).to_le_bytes());
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut body = vec![0; FADT_SIZE - 36];
    let mut set = |offset: usize, value: &[u8]| {
        let field = body.iter_mut().skip(offset - 36);
        field.zip(value).for_each(|(byte, value)| *byte = *value);
    };
    set(40, &u32::try_from(dsdt).unwrap_or(0).to_le_bytes());
    set(109, &BOOT_ARCHITECTURE.to_le_bytes());
    set(112, &FADT_FLAGS.to_le_bytes());
    set(116, &port(layout::RESET_PORT));
    set(128, &[layout::RESET_VALUE]);
    set(131, &[5]); // minor version: ACPI 6.5
    set(140, &dsdt.to_le_bytes());
    set(244, &port(layout::SLEEP_CONTROL_PORT));
    set(256, &port(layout::SLEEP_STATUS_PORT));
    set(268, b"MVM     "); // hypervisor vendor
    table(b"FACP", 6, &body)
}

/// Local APICs only: no IOAPIC and no address override, and no 8259 (flags 0).
fn madt(platform: &Platform) -> Vec<u8> {
    let mut body = u32::try_from(layout::LOCAL_APIC).unwrap_or(0).to_le_bytes().to_vec();
    body.extend(0u32.to_le_bytes());
    for id in 0..platform.cpus {
        body.extend([0, 8, id, id]); // processor local APIC
        body.extend(1u32.to_le_bytes()); // enabled
    }
    table(b"APIC", 6, &body)
}

fn mcfg() -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(layout::ECAM.to_le_bytes());
    body.extend([0, 0, 0, 0, 0, 0, 0, 0]); // segment 0, buses 0 to 0
    table(b"MCFG", 1, &body)
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let root = aml::device(
        b"PCI0",
        &[
            aml::name(b"_HID", &aml::eisa_id(b"PNP0A08")),
            aml::name(b"_CID", &aml::eisa_id(b"PNP0A03")),
            aml::name(b"_UID", &aml::byte(0)),
            aml::resources(&[
                Resource::Bus0,
                Resource::Window { start: small(layout::BAR_WINDOW), length: small(layout::BAR_WINDOW_SIZE) },
            ]),
        ],
    );
    // Without this reservation Linux rejects the MCFG once it looks again.
    let board = aml::device(
        b"MBRD",
        &[
            aml::name(b"_HID", &aml::eisa_id(b"PNP0C02")),
            aml::resources(&[Resource::Memory {
                start: small(layout::ECAM),
                length: small(layout::ECAM_SIZE),
            }]),
        ],
    );
    let panic = aml::device(
        b"PEVT",
        &[
            aml::name(b"_HID", &aml::string("QEMU0001")),
            aml::resources(&[Resource::Ports { start: layout::PANIC_PORT, length: 1 }]),
        ],
    );
    let mut devices = vec![root, board, panic];
    if platform.serial {
        // No interrupt: the driver polls. Without this entry it would ask for an interrupt nobody raises.
        devices.push(aml::device(
            b"COM1",
            &[
                aml::name(b"_HID", &aml::eisa_id(b"PNP0501")),
                aml::resources(&[Resource::Ports { start: layout::SERIAL_PORT, length: 8 }]),
            ],
        ));
    }
    let soft_off =
        aml::package(&[aml::byte(layout::SLEEP_TYPE_S5), aml::byte(0), aml::byte(0), aml::byte(0)]);
    [aml::system_bus(&devices), aml::name(b"_S5_", &soft_off)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table_at(image: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - layout::ACPI).unwrap();
        let length = u32::from_le_bytes(image[start + 4..start + 8].try_into().unwrap());
        &image[start..start + length as usize]
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        let image = build(&Platform { cpus: 32, serial: true });
        assert!(image.len() as u64 <= layout::ACPI_SIZE);
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = table_at(&image, u64_at(&image, 24));
        assert_eq!(sum(xsdt), 0);
        let mut names = Vec::new();
        for pointer in xsdt[36..].chunks_exact(8) {
            let table = table_at(&image, u64_at(pointer, 0));
            assert_eq!(sum(table), 0);
            names.push(table[..4].to_vec());
            if table.starts_with(b"FACP") {
                assert_eq!(table.len(), FADT_SIZE);
                let dsdt = table_at(&image, u64_at(table, 140));
                assert!(dsdt.starts_with(b"DSDT"));
                assert_eq!(sum(dsdt), 0);
            }
        }
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
    }

    #[test]
    fn the_madt_lists_local_apics_and_nothing_else() {
        let image = madt(&Platform { cpus: 3, serial: false });
        let entries: Vec<_> = image[44..].chunks(8).map(|entry| (entry[0], entry[3], entry[4])).collect();
        assert_eq!(entries, [(0, 0, 1), (0, 1, 1), (0, 2, 1)]);
    }
}
