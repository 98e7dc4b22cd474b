//! Memory that is saved as what differs from another's: with that it is what it was, and without it nothing.

use std::os::unix::fs::{FileExt, MetadataExt};

use mvm_devices::memory::{Bytes, GuestAddress};
use nix::fcntl::{FallocateFlags, fallocate};
use proptest::prelude::*;

use super::*;
use crate::layout::PAGE_SIZE;
use crate::snapshot::base::Base;
use crate::snapshot::pages::Backed;

const RAM: usize = 4 << 20;
const OTHER: SnapshotId = [0xa5; 16];

fn again(file: &File) -> File {
    file.try_clone().unwrap()
}

/// Saves what differs from `base`, and how many bytes that took.
fn save_above(memory: &Memory, backed: &[Backed], base: &File) -> (File, u64) {
    let file = tempfile::tempfile().unwrap();
    let base = Base::new(again(base), size()).unwrap();
    let written = pages::save(memory, backed, Some(base), &OTHER, &file).unwrap();
    (file, written)
}

fn lay(file: &File, base: &File) -> Result<(Memory, Vec<Backed>), Error> {
    pages::map(size(), again(file), Some(again(base)), &OTHER)
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; RAM];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn put(memory: &Memory, page: u64, value: u8) {
    memory.write_slice(&[value; PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE)).unwrap();
}

/// Pages in a row that become one value, often zero.
fn writes() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
    proptest::collection::vec((0..1024_u64, 1..60_u64, prop_oneof![Just(0_u8), 1..4_u8]), 0..12)
}

fn apply(memory: &Memory, writes: &[(u64, u64, u8)]) {
    for &(first, count, value) in writes {
        (first..(first + count).min(1024)).for_each(|page| put(memory, page, value));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_base_and_what_differs_from_it_are_the_memory_that_was_saved(
        (before, after, later) in (writes(), writes(), writes()),
        goes_on in any::<bool>(),
    ) {
        let first = memory::create(size()).unwrap();
        apply(&first, &before);
        let base = tempfile::tempfile().unwrap();
        pages::save(&first, &[], None, &ID, &base).unwrap();
        // The machine that was saved goes on, or another one from there.
        let restored = pages::map(size(), again(&base), None, &ID).unwrap();
        let (machine, backed) = if goes_on { (first, Vec::new()) } else { restored };
        apply(&machine, &after);
        let (changes, written) = save_above(&machine, &backed, &base);
        let whole = tempfile::tempfile().unwrap();
        pages::save(&machine, &backed, None, &OTHER, &whole).unwrap();
        let (laid, backed) = lay(&changes, &base).unwrap();
        prop_assert!(bytes(&laid) == bytes(&machine));
        let (mapped, _) = pages::map(size(), whole, None, &OTHER).unwrap();
        prop_assert!(bytes(&laid) == bytes(&mapped));
        let differ = std::iter::zip(bytes(&machine).chunks(4096), base_bytes(&base).chunks(4096))
            .filter(|(ours, theirs)| ours != theirs && ours.iter().any(|byte| *byte != 0))
            .count() as u64;
        prop_assert_eq!(written, (differ + 2) * PAGE_SIZE, "no page more than differs, and the end");
        // And saved once more, whole or above the same.
        apply(&laid, &later);
        let (changes, _) = save_above(&laid, &backed, &base);
        prop_assert!(bytes(&lay(&changes, &base).unwrap().0) == bytes(&laid));
        let whole = tempfile::tempfile().unwrap();
        pages::save(&laid, &backed, None, &ID, &whole).unwrap();
        prop_assert!(bytes(&pages::map(size(), whole, None, &ID).unwrap().0) == bytes(&laid));
    }
}

fn base_bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; RAM];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_nobody_wrote_takes_nothing_and_machines_do_not_see_each_other() {
    let (memory, base) = saved_memory();
    let (file, written) = save_above(&memory, &[], &base);
    assert_eq!(written, 2 * PAGE_SIZE);
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10, "it has holes");
    (256..300).for_each(|page| put(&memory, page, 7));
    let (file, _) = save_above(&memory, &[], &base);
    let [(one, _), (other, _)] = [lay(&file, &base).unwrap(), lay(&file, &base).unwrap()];
    put(&one, 256, 8);
    put(&one, 0, 8);
    assert!(bytes(&other) == bytes(&memory));
    assert_eq!(one.read_obj::<u8>(GuestAddress(256 * PAGE_SIZE)).unwrap(), 8);
}

#[test]
fn a_page_is_whose_it_was_whether_or_not_a_copy_of_the_file_has_holes_for_it() {
    let (memory, base) = saved_memory();
    put(&memory, 0, 0);
    put(&memory, 5, 6);
    let (file, _) = save_above(&memory, &[], &base);
    for page in [0, 1023] {
        // Zeroes that are written, in place of a hole.
        file.write_all_at(&[0; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap();
        assert!(bytes(&lay(&file, &base).unwrap().0) == bytes(&memory), "page {page}");
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, (page * PAGE_SIZE) as i64, PAGE_SIZE as i64).unwrap();
        assert!(bytes(&lay(&file, &base).unwrap().0) == bytes(&memory), "page {page}");
    }
}

#[test]
fn changes_in_short_runs_are_read() {
    let memory = memory::create(size()).unwrap();
    let base = tempfile::tempfile().unwrap();
    pages::save(&memory, &[], None, &ID, &base).unwrap();
    (0..1024).filter(|page| page % 2 == 1).for_each(|page| put(&memory, page, page as u8 | 1));
    let (file, written) = save_above(&memory, &[], &base);
    assert_eq!(written, 514 * PAGE_SIZE);
    assert!(bytes(&lay(&file, &base).unwrap().0) == bytes(&memory));
}

#[test]
fn changes_in_more_runs_than_a_process_may_map_are_what_they_were() {
    let size = MemSize::try_from(164).unwrap();
    let memory = memory::create(size).unwrap();
    let base = tempfile::tempfile().unwrap();
    pages::save(&memory, &[], None, &ID, &base).unwrap();
    let changed = |page: u64| !page.is_multiple_of(5);
    let value = |memory: &Memory, page: u64| memory.read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap();
    for page in (0..164 * 256).filter(|page| changed(*page)) {
        memory.write_obj(page, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let above = Base::new(again(&base), size).unwrap();
    pages::save(&memory, &[], Some(above), &OTHER, &file).unwrap();
    let (laid, _) = pages::map(size, file, Some(base), &OTHER).unwrap();
    for page in 0..164 * 256 {
        assert_eq!(value(&laid, page), if changed(page) { page } else { 0 });
    }
}

#[test]
fn a_base_that_is_another_or_none_is_refused() {
    let (memory, base) = saved_memory();
    put(&memory, 9, 9);
    let (file, _) = save_above(&memory, &[], &base);
    lay(&file, &base).unwrap();
    let refused = |result: Result<(Memory, Vec<Backed>), Error>| result.unwrap_err().to_string();
    let (_, other) = saved_memory();
    other.write_all_at(&[0; 16], (RAM + 16) as u64).unwrap();
    assert!(refused(lay(&file, &other)).contains("base does not fit the memory: it is another snapshot's"));
    let none = "base does not fit the memory: it is no whole memory of the same size";
    assert!(refused(lay(&file, &file)).contains(none), "changes of changes");
    assert!(refused(lay(&file, &File::open("/dev/null").unwrap())).contains(none));
    assert!(Base::new(again(&file), size()).unwrap_err().to_string().contains(none));
    assert!(Base::new(again(&base), MemSize::try_from(8).unwrap()).unwrap_err().to_string().contains(none));
    // Each where the other is expected.
    assert!(refused(lay(&base, &base)).contains("right size"));
    assert!(refused(pages::map(size(), again(&file), None, &OTHER)).contains("right size"));
    assert!(refused(pages::map(size(), file, Some(base), &ID)).contains("another snapshot"));
}

#[test]
fn changes_whose_end_was_changed_or_cut_are_refused_and_lead_nowhere_else() {
    let (memory, base) = saved_memory();
    put(&memory, 9, 9);
    let (file, _) = save_above(&memory, &[], &base);
    let length = file.metadata().unwrap().len();
    let end = RAM as u64;
    let mut words = [0; 56];
    file.read_exact_at(&mut words, end).unwrap();
    for at in 0..words.len() {
        for bit in 0..8 {
            let mut changed = words;
            changed[at] ^= 1 << bit;
            file.write_all_at(&changed, end).unwrap();
            assert!(matches!(lay(&file, &base), Err(Error::Memory(_) | Error::Base(_))), "byte {at}");
        }
    }
    file.write_all_at(&words, end).unwrap();
    for at in 0..128 {
        let (at, mut byte) = (end + PAGE_SIZE + at, [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        assert!(matches!(lay(&file, &base), Err(Error::Memory(_))), "bits at {at}");
        file.write_all_at(&byte, at).unwrap();
    }
    lay(&file, &base).unwrap();
    // As many pages as there are, and of the file alone.
    file.write_all_at(&1024_u64.to_le_bytes(), end + 48).unwrap();
    file.write_all_at(&[0xff; 128], end + PAGE_SIZE).unwrap();
    assert!(bytes(&lay(&file, &base).unwrap().0)[..RAM] == base_bytes(&file)[..]);
    for wrong in [0, end, end + PAGE_SIZE, length - 1, length + 1, 1 << 40] {
        file.set_len(wrong).unwrap();
        assert!(matches!(lay(&file, &base), Err(Error::Memory(_))), "{wrong} bytes");
    }
}
