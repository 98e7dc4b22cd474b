//! Snapshots as files: no machine goes on here.

use super::super::manifest::tests::manifest;
use super::*;

fn make(snapshots: &Snapshots, name: &str) -> Result<(), Failure> {
    make_above(snapshots, name, None)
}

fn make_above(snapshots: &Snapshots, name: &str, base: Option<&str>) -> Result<(), Failure> {
    let held = base.map(|base| snapshots.hold_base(base)).transpose()?;
    let new = snapshots.begin()?;
    for (file, text) in [("state", "state"), ("memory", "memory"), ("disk-0", "disk"), ("disk-1", "writes")] {
        fs::write(new.path().join(file), text).unwrap();
    }
    let mut manifest = manifest(name);
    manifest.run.machine.contents = format!("of {name}");
    manifest.run.machine.base = held.as_ref().map(|held| held.memory.base.clone());
    snapshots.install(new, &manifest)
}

#[test]
fn a_snapshot_is_listed_by_its_age_has_its_name_alone_and_goes_whole() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    assert!(snapshots.list().unwrap().0.is_empty());
    make(&snapshots, "a").unwrap();
    let again = make(&snapshots, "a").unwrap_err().report();
    assert!(
        again.contains("there is a snapshot a already") && again.contains("mvm snapshot rm a"),
        "{again}"
    );
    make(&snapshots, "b").unwrap();
    let (list, broken) = snapshots.list().unwrap();
    let names: Vec<_> = list.iter().map(|it| it.manifest.name.to_string()).collect();
    assert_eq!((names, broken.len()), (vec!["b".to_owned(), "a".to_owned()], 0));
    snapshots.remove("a").unwrap();
    assert!(snapshots.get("a").unwrap_err().report().contains("there is no snapshot a"));
    assert_eq!(fs::read_dir(dir.path().join(DIRECTORY)).unwrap().count(), 1, "nothing of it is left");
}

#[test]
fn names_lead_nowhere_else_and_a_directory_without_a_manifest_is_told_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    for name in ["", ".", "..", "../x", "a/b", ".new-left"] {
        assert!(snapshots.get(name).is_err() && snapshots.remove(name).is_err(), "{name}");
    }
    make(&snapshots, "a").unwrap();
    fs::remove_file(snapshots.catalog.manifest("a")).unwrap();
    let (list, broken) = snapshots.list().unwrap();
    assert_eq!((list.len(), broken.len()), (0, 1));
    assert!(broken[0].report().contains("manifest.json"), "{}", broken[0].report());
    snapshots.remove("a").unwrap();
    assert!(snapshots.list().unwrap().1.is_empty());
}

#[test]
fn a_machine_gets_a_disk_of_writes_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    make(&snapshots, "a").unwrap();
    let writes = dir.path().join("writes.ext4");
    let stdio = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };
    let going = snapshots.get("a").unwrap().going(&writes, stdio, &Memory::AsTouched).unwrap();
    assert_eq!(fs::read(&writes).unwrap(), b"writes");
    assert_eq!((going.disks[1].path.clone(), going.disks[1].read_only), (writes.clone(), false));
    let again = snapshots.get("a").unwrap().going(&writes, stdio, &Memory::AsTouched).unwrap_err().report();
    assert!(again.contains("cannot copy a disk"), "it is another's: {again}");
}

#[test]
fn what_one_machine_needed_is_recorded_once_and_brought_in_for_those_that_are_to_have_it() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    make(&snapshots, "a").unwrap();
    let file = snapshots.catalog.path("a").join("working-set");
    let stdio = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };
    let mut number = 0;
    let mut going = |memory: &Memory| {
        number += 1;
        let writes = dir.path().join(format!("writes-{number}"));
        let going = snapshots.get("a").unwrap().going(&writes, stdio, memory);
        going.map(|going| (going.snapshot.working_set, going.record)).map_err(|failure| failure.report())
    };
    assert_eq!(going(&Memory::Beforehand), Ok((None, Some(file.clone()))));
    fs::write(&file, "pages").unwrap();
    assert_eq!(going(&Memory::AsTouched), Ok((None, None)));
    assert_eq!(going(&Memory::Beforehand), Ok((Some(file.clone()), None)));
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
    let refused = going(&Memory::Beforehand).unwrap_err();
    assert!(refused.contains("is no file"), "{refused}");
}

fn going(snapshots: &Snapshots, name: &str) -> Result<Option<PathBuf>, String> {
    let writes = tempfile::tempdir().unwrap();
    let stdio = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };
    let going = snapshots.get(name).unwrap().going(&writes.path().join("w"), stdio, &Memory::AsTouched);
    going.map(|going| going.snapshot.base).map_err(|failure| failure.report())
}

#[test]
fn memory_that_is_elsewhere_need_not_be_here_and_has_no_base() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    make(&snapshots, "full").unwrap();
    make_above(&snapshots, "above", Some("full")).unwrap();
    let source: MemorySource = "unix:/run/pages".parse().unwrap();
    let stdio = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };
    let going = |name: &str, memory: &Memory| {
        let writes = tempfile::tempdir().unwrap();
        let going = snapshots.get(name).unwrap().going(&writes.path().join("w"), stdio, memory);
        going.map(|going| going.snapshot.source).map_err(|failure| failure.report())
    };
    let elsewhere = Memory::Source(source.clone());
    let refused = going("above", &elsewhere).unwrap_err();
    assert!(refused.contains("differs from that of snapshot full"), "{refused}");
    fs::remove_file(memory_file(&snapshots.catalog.path("full"))).unwrap();
    assert_eq!(going("full", &elsewhere), Ok(Some(source)));
    assert!(going("full", &Memory::AsTouched).unwrap_err().contains("cannot look at"));
}

#[test]
fn one_that_others_need_is_removed_after_them() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    make(&snapshots, "full").unwrap();
    make(&snapshots, "other").unwrap();
    make_above(&snapshots, "b", Some("full")).unwrap();
    make_above(&snapshots, "a", Some("full")).unwrap();
    assert_eq!(going(&snapshots, "full"), Ok(None));
    assert_eq!(going(&snapshots, "a"), Ok(Some(snapshots.catalog.path("full").join("memory"))));
    let refused = snapshots.remove("full").unwrap_err().report();
    assert_eq!(
        refused,
        "cannot remove snapshot full\n  because: 2 snapshots need it as their base: a b\n  \
         help:    remove what needs it first: mvm snapshot rm a b"
    );
    snapshots.remove("other").unwrap();
    snapshots.remove("a").unwrap();
    let refused = snapshots.remove("full").unwrap_err().report();
    assert!(refused.contains("1 snapshot needs it as its base: b\n"), "{refused}");
    snapshots.remove("b").unwrap();
    snapshots.remove("full").unwrap();
}

#[test]
fn a_base_is_whole_and_stays_while_another_is_saved_above_it() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    make(&snapshots, "full").unwrap();
    make_above(&snapshots, "above", Some("full")).unwrap();
    let said = |name| snapshots.hold_base(name).unwrap_err().report();
    assert!(said("none").contains("there is no snapshot none"));
    let itself = said("above");
    assert!(itself.contains("changes to snapshot full itself") && itself.contains("--base full"), "{itself}");
    snapshots.remove("above").unwrap();
    let held = [snapshots.hold_base("full").unwrap(), snapshots.hold_base("full").unwrap()];
    assert_eq!(held[0].memory.base.contents, "of full");
    let busy = snapshots.remove("full").unwrap_err().report();
    assert!(busy.contains("another is being saved with it as its base"), "{busy}");
    drop(held);
    snapshots.remove("full").unwrap();
}

#[test]
fn one_whose_base_is_gone_or_another_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::of(dir.path());
    make(&snapshots, "full").unwrap();
    make_above(&snapshots, "above", Some("full")).unwrap();
    let (full, aside) = (snapshots.catalog.path("full"), dir.path().join("aside"));
    fs::rename(&full, &aside).unwrap();
    let gone = going(&snapshots, "above").unwrap_err();
    assert!(gone.contains("cannot use snapshot above"), "{gone}");
    assert!(gone.contains("snapshot full, its base, is gone"), "{gone}");
    assert!(gone.contains("mvm snapshot rm above"), "{gone}");
    let text = fs::read_to_string(aside.join("manifest.json")).unwrap();
    let another = text.replace("of full", "of somebody");
    let itself = fs::read_to_string(snapshots.catalog.manifest("above")).unwrap();
    for manifest in [another, itself.replace("\"of above\"", "\"of full\"")] {
        fs::create_dir_all(&full).unwrap();
        fs::write(full.join("manifest.json"), manifest).unwrap();
        let other = going(&snapshots, "above").unwrap_err();
        assert!(other.contains("snapshot full is another than the one that was its base"), "{other}");
    }
    fs::write(full.join("manifest.json"), text).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", full.join("memory")).unwrap();
    assert!(going(&snapshots, "above").unwrap_err().contains("is no file"));
    fs::remove_file(full.join("memory")).unwrap();
    fs::write(full.join("memory"), "memory").unwrap();
    going(&snapshots, "above").unwrap();
}
