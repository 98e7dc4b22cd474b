//! What is recorded is brought in, and files that say something else are refused.

use std::os::unix::fs::FileExt;

use mvm_devices::memory::GuestMemoryBackend;
use proptest::prelude::*;

use super::*;
use crate::config::MemSize;
use crate::control::MappedRegion;
use crate::memory;
use crate::snapshot::pages;

const ID: SnapshotId = [7; 16];
const RAM: u64 = 4 << 20;

fn extent() -> Extent {
    MemSize::try_from(4).unwrap().into()
}

fn run(first: u32, pages: u32, written: bool) -> Run {
    Run { first, pages, written }
}

/// Memory of a machine, every page of which has something in it.
fn saved() -> File {
    let memory = memory::create(extent()).unwrap();
    for at in (0..RAM).step_by(PAGE_SIZE as usize) {
        memory.write_obj(at + 1, GuestAddress(at)).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    pages::save(&memory, &[], None, &ID, &file).unwrap();
    file
}

fn mapped(file: &File) -> Memory {
    pages::map(extent(), file.try_clone().unwrap(), None, &ID).unwrap().0
}

/// What is there of `memory`, in this process.
fn there(memory: &Memory) -> (WorkingSet, Recorded) {
    needed(memory, Needed::Touched)
}

fn needed(memory: &Memory, needed: Needed) -> (WorkingSet, Recorded) {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let regions =
        memory.iter().map(|region| MappedRegion { host: region.as_ptr() as u64, bytes: region.len() });
    let map = MemoryMap { snapshot: Some(ID), regions: regions.collect() };
    let file = tempfile::tempfile().unwrap();
    let recorded = record(&pagemap, &map, needed, &file).unwrap();
    (WorkingSet::read(&file, extent(), &ID).unwrap(), recorded)
}

fn written(set: &WorkingSet) -> Vec<Run> {
    set.runs.iter().copied().filter(|run| run.written).collect()
}

fn has(set: &WorkingSet, page: u32) -> bool {
    set.runs.iter().any(|run| (run.first..run.first + run.pages).contains(&page))
}

#[test]
fn what_was_touched_is_recorded_and_nothing_is_written_that_was_only_read() {
    let file = saved();
    let first = mapped(&file);
    assert_eq!(there(&first), (WorkingSet { runs: Vec::new() }, Recorded::default()));
    first.write_obj(9u64, GuestAddress(0x10_0000)).unwrap();
    first.write_obj(9u64, GuestAddress(0x10_1000)).unwrap();
    first.read_obj::<u64>(GuestAddress(0x30_0000)).unwrap();
    let (set, recorded) = there(&first);
    assert_eq!(written(&set), [run(0x100, 2, true)]);
    assert!(has(&set, 0x300), "{set:?}");
    assert_eq!(recorded.written, 2);
    assert!((1..1000).contains(&recorded.read), "{recorded:?}");
    let (set, recorded) = needed(&first, Needed::Written);
    assert_eq!(set.runs, [run(0x100, 2, true)]);
    assert_eq!(recorded, Recorded { read: 0, written: 2 });
}

#[test]
fn what_is_brought_in_is_there_as_it_was_recorded_and_as_it_was_saved() {
    let file = saved();
    let set = WorkingSet { runs: vec![run(3, 5, true), run(8, 1, false), run(0x3ff, 1, true)] };
    for (name, by) in [("asked for", populate as fn(&VolatileSlice<'_>, bool) -> _), ("touched", touch)] {
        let memory = mapped(&file);
        set.bring_in_by(&memory, by).unwrap();
        let (found, _) = there(&memory);
        assert_eq!(written(&found), [run(3, 5, true), run(0x3ff, 1, true)], "{name}");
        assert!(has(&found, 8), "{name}: {found:?}");
        for at in (0..RAM).step_by(PAGE_SIZE as usize) {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at + 1, "{name}");
        }
    }
}

#[test]
fn a_run_may_lie_in_two_regions() {
    let extent = Extent { ram: 4.try_into().unwrap(), pluggable: 128 << 20, shown: 128 << 20 };
    let memory = memory::create(extent).unwrap();
    let set = WorkingSet { runs: vec![run(0x3fe, 4, true), run(0x500, 1, true)] };
    set.bring_in(&memory).unwrap();
    assert_eq!(written(&there_of(&memory)), [run(0x3fe, 4, true), run(0x500, 1, true)]);
}

fn there_of(memory: &Memory) -> WorkingSet {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let (mut pages, mut first) = (Pages::default(), 0);
    for region in memory.iter() {
        walk(&pagemap, region.as_ptr() as u64, region.len(), |page, own| pages.add(first + page, own))
            .unwrap();
        first += region.len() / PAGE_SIZE;
    }
    pages.end();
    WorkingSet { runs: pages.runs }
}

#[test]
fn a_machine_that_booted_has_nothing_to_record() {
    let map = MemoryMap { snapshot: None, regions: Vec::new() };
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(record(&null, &map, Needed::Touched, &null), Err(Error::WorkingSet(_))));
}

#[test]
fn runs_that_are_empty_out_of_order_or_beyond_the_memory_are_refused() {
    let decode = |runs: &[Run]| WorkingSet::decode(&encode(&ID, RAM, runs), RAM, &ID);
    let fine = [run(0, 1, false), run(1, 2, true), run(0x3ff, 1, false)];
    assert_eq!(decode(&fine).unwrap().runs, fine);
    for wrong in [
        &[run(0, 0, false)][..],
        &[run(0x3ff, 2, false)],
        &[run(u32::MAX, u32::MAX >> 1, true)],
        &[run(5, 2, false), run(6, 1, false)],
        &[run(5, 2, false), run(1, 1, false)],
    ] {
        let why = decode(wrong).unwrap_err().to_string();
        assert!(why.contains("no order"), "{wrong:?}: {why}");
    }
}

#[test]
fn another_snapshots_another_size_another_format_or_a_changed_byte_is_refused() {
    let bytes = encode(&ID, RAM, &[run(1, 2, true)]);
    let why = |bytes: &[u8], ram, id| WorkingSet::decode(bytes, ram, id).unwrap_err().to_string();
    assert!(why(&bytes, RAM, &[8; 16]).contains("another snapshot's"));
    assert!(why(&bytes, RAM * 2, &ID).contains("another snapshot's"));
    assert!(why(b"mvm-snap", RAM, &ID).contains("it is none"));
    let mut other = bytes.clone();
    other[8] = 2;
    assert!(why(&other, RAM, &ID).contains("another format"));
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        why(&changed, RAM, &ID);
        why(&bytes[..at], RAM, &ID);
    }
    why(&[&bytes[..], &[0]].concat(), RAM, &ID);
}

#[test]
fn a_file_of_any_length_is_not_read_into_memory() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    let why = WorkingSet::read(&file, extent(), &ID).unwrap_err().to_string();
    assert!(why.contains("longer than any"), "{why}");
    file.set_len(0).unwrap();
    file.write_all_at(b"mvm", 0).unwrap();
    WorkingSet::read(&file, extent(), &ID).unwrap_err();
}

proptest! {
    #[test]
    fn no_list_of_runs_with_a_right_checksum_is_more_than_an_error_or_brings_in_more_than_the_memory(
        runs in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..4), claimed in any::<u64>(),
    ) {
        let runs: Vec<_> = runs.iter().map(|(first, pages)| {
            run(first % 2048, pages & !WRITTEN & 2047, pages & WRITTEN != 0)
        }).collect();
        let mut bytes = encode(&ID, RAM, &runs);
        if let Ok(set) = WorkingSet::decode(&bytes, RAM, &ID) {
            prop_assert!(set.runs.iter().all(|run| run.bytes().end <= RAM));
        }
        bytes[40..48].copy_from_slice(&claimed.to_le_bytes());
        let sum = format::checksum(&bytes).to_le_bytes();
        bytes[12..16].copy_from_slice(&sum);
        let decoded = WorkingSet::decode(&bytes, RAM, &ID);
        prop_assert!(decoded.is_err() || claimed == runs.len() as u64);
    }
}
