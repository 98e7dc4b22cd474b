//! Machines that have what one before them needed in memory beforehand.

use mvm_vmm::snapshot::{Error, Needed, Recorded, record};

use super::*;

#[test]
fn a_machine_goes_on_with_the_pages_brought_in_that_one_before_it_needed() {
    let mut counting = boot_counting(1);
    counting.wait_for(10);
    let (saved, _) = save(&mut counting.vm, false, "").unwrap();
    let before = *counting.numbers().last().unwrap();
    let Answer::MemoryMap(map) = counting.vm.control.call(&Request::MemoryMap).unwrap() else { panic!() };
    assert_eq!((map.snapshot, map.regions.len()), (None, 0), "it booted");
    counting.stop();

    let mut first = restore_counting(&saved);
    first.wait_for(10);
    let set = tempfile::tempfile().unwrap();
    let recorded = record_pages(&mut first.vm, &set).unwrap();
    // What it counts in, at least.
    assert!((1..100).contains(&recorded.written), "{recorded:?}");
    first.stop();

    let with = |set: &File| {
        count(|serial| {
            restore(&saved, |config, files| {
                let Start::Restore(restore) = &mut config.start else { panic!("{config:?}") };
                restore.working_set = Some(files.add(set.try_clone().unwrap()));
                serial(config, files);
            })
        })
    };
    let mut second = with(&set);
    let numbers = second.wait_for(10);
    assert!(follows(before, &numbers), "{before} and {numbers:?}");
    // No guest writes less than it did, and nothing else became its own.
    let again = record_pages(&mut second.vm, &tempfile::tempfile().unwrap()).unwrap();
    assert!(again.written >= recorded.written && again.written <= recorded.written + 4, "{again:?}");
    second.stop();

    set.write_all_at(&[0xff], 50).unwrap();
    let why = refused(with(&set).vm);
    assert!(why.contains("the working set is of no use: it is damaged"), "{why}");
}

/// Records in `to` what a machine has touched.
fn record_pages(vm: &mut Vm, to: &File) -> Result<Recorded, Error> {
    let Answer::MemoryMap(map) = vm.control.call(&Request::MemoryMap).unwrap() else { panic!() };
    record(&File::open(format!("/proc/{}/pagemap", vm.child.pid)).unwrap(), &map, Needed::Touched, to)
}
