//! Tests of loading, with files made here.
use std::io::Write;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::config::MemSize;
use crate::memory;

const MIB: u64 = 1 << 20;
const PLATFORM: Platform = Platform { cpus: 1, serial: false };

/// An ELF image of one segment: `content` at `address`, with room to `memory_size`.
fn elf(address: u64, content: &[u8], memory_size: u64) -> File {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    for word in [address, 64, 0] {
        image.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    for word in [4096, address, address, content.len() as u64, memory_size, 4096] {
        image.extend(word.to_le_bytes());
    }
    image.resize(4096, 0);
    image.extend(content);
    file(&image)
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

#[test]
fn what_a_kernel_never_writes_is_told_by_its_file() {
    assert_eq!(read_only(&elf(0x20_0000, &[5; 5000], 9000)).unwrap(), Some(0x20_0000..0x20_0000 + 5000));
    let writable = elf(0x20_0000, &[5; 5000], 9000);
    writable.write_all_at(&[7], 68).unwrap();
    assert!(read_only(&writable).unwrap_err().to_string().contains("only read"));
    assert_eq!(read_only(&file(&[7; 4096])).unwrap(), None, "another format does not say");
    assert!(read_only(&file(b"\x7f")).is_err());
}

fn try_load(mib: u64, kernel: &File, initrd: Option<&File>) -> (Memory, Result<Entry>) {
    let memory = memory::create(MemSize::try_from(mib).unwrap()).unwrap();
    let images = Images { kernel, initrd, cmdline: "quiet", protocol: Protocol::Linux64, image: Image::Map };
    let placed = load(&memory, mib * MIB, &images, &PLATFORM);
    (memory, placed.map(|placed| placed.entry))
}

fn read<const N: usize>(memory: &Memory, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn a_kernel_is_where_it_wants_to_be_and_its_bss_is_zero() {
    let content: Vec<u8> = (0..10_000u32).map(|index| (index % 251) as u8 + 1).collect();
    let (memory, entry) = try_load(8, &elf(2 * MIB, &content, 20_000), None);
    assert_eq!(entry.unwrap(), Entry::Long { rip: 2 * MIB });
    assert_eq!(read::<10_000>(&memory, 2 * MIB)[..], content[..]);
    assert_eq!(read::<10_000>(&memory, 2 * MIB + 10_000), [0; 10_000]);
}

#[test]
fn an_initial_ram_disk_lies_at_the_end_of_ram_and_is_told() {
    let initrd = file(&[0xa5; 5000]);
    let (memory, entry) = try_load(8, &elf(MIB, b"\xf4", 4096), Some(&initrd));
    entry.unwrap();
    let start = 8 * MIB - 8192;
    assert_eq!(read::<5000>(&memory, start), [0xa5; 5000]);
    let told = u32::from_le_bytes(read(&memory, layout::BOOT_PARAMS + 0x218));
    assert_eq!(u64::from(told), start);
    assert_eq!(u32::from_le_bytes(read(&memory, layout::BOOT_PARAMS + 0x21c)), 5000);
}

#[test]
fn too_little_memory_names_an_amount_that_is_enough() {
    let kernel = elf(MIB, &[0x90; 4096], 5 * MIB);
    let initrd = file(&vec![1; 3 << 20]);
    let (_, entry) = try_load(4, &kernel, Some(&initrd));
    let Err(Error::TooLittleMemory { needed_mib, mib: 4 }) = entry else { panic!("{entry:?}") };
    let (_, entry) = try_load(needed_mib, &kernel, Some(&initrd));
    entry.unwrap();
}

#[test]
fn files_that_are_no_kernels_are_refused_by_name() {
    for content in [&b""[..], b"MZ", &[0; 8192]] {
        let (_, entry) = try_load(8, &file(content), None);
        assert!(matches!(entry, Err(Error::UnknownFormat)), "{entry:?}");
    }
    let (_, entry) = try_load(8, &elf(0x8000, b"\xf4", 4096), None);
    assert!(matches!(entry, Err(Error::Elf(_))), "a kernel over the tables: {entry:?}");
}

#[test]
fn pvh_without_a_note_is_refused() {
    let memory = memory::create(MemSize::try_from(8).unwrap()).unwrap();
    let kernel = elf(MIB, b"\xf4", 4096);
    let images =
        Images { kernel: &kernel, initrd: None, cmdline: "", protocol: Protocol::Pvh, image: Image::Map };
    let entry = load(&memory, 8 * MIB, &images, &PLATFORM);
    assert!(matches!(entry, Err(Error::NoPvhEntry)), "{entry:?}");
}

proptest! {
    #[test]
    fn an_initial_ram_disk_never_overlaps_the_kernel(
        top in 1u64..1 << 36, length in 0u64..1 << 36, floor in 0u64..1 << 36,
    ) {
        if let Some(span) = place_below(top, length, floor) {
            prop_assert!(span.start >= floor && span.start >= layout::HIGH_MEMORY);
            prop_assert!(span.start + span.length <= top);
            prop_assert_eq!(span.start % PAGE_SIZE, 0);
        }
    }

    #[test]
    fn any_header_is_loaded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 120), tail in 0usize..9000) {
        let mut image = b"\x7fELF\x02\x01\x01".to_vec();
        image.resize(16, 0);
        image.extend([2, 0, 62, 0]);
        image.extend(bytes);
        image.resize(image.len() + tail, 0xcc);
        image[54..58].copy_from_slice(&[56, 0, 1, 0]);
        let _ = try_load(4, &file(&image), None);
    }

    #[test]
    fn any_setup_header_is_loaded_or_refused(fields in proptest::collection::vec(any::<u8>(), 123), sectors in 0u8..4) {
        let mut image = vec![0; 0x1f1];
        image.extend(fields);
        image.resize(4096, 0);
        image[0x1f1] = sectors;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x236] |= 1;
        let _ = try_load(4, &file(&image), None);
    }
}
