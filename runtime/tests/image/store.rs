//! Building once, finding again, removing.

use std::fs;

use mvm_runtime::image::{Error, Phase, Progress, Source, Store};

use crate::demo;
use crate::support::images::{docker_archive, layout};

/// Remembers what it was told.
#[derive(Default)]
struct Told {
    phases: Vec<Phase>,
    bytes: u64,
}

impl Progress for Told {
    fn begin(&mut self, phase: Phase, _: Option<u64>) {
        self.phases.push(phase);
    }

    fn advance(&mut self, bytes: u64) {
        self.bytes += bytes;
    }
}

#[test]
fn the_second_use_builds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(layout(&dir.path().join("image"), demo())).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut told = Told::default();
    let first = store.rootfs(&source, &mut told).unwrap();
    let layer = |number| Phase::Layer { number, count: 2 };
    assert_eq!(told.phases, [layer(1), layer(2), Phase::Finishing]);
    assert!(told.bytes > 0 && first.built);
    let mut told = Told::default();
    let second = store.rootfs(&source, &mut told).unwrap();
    assert!(told.phases.is_empty() && !second.built);
    assert_eq!((first.key, first.bytes, first.config), (second.key, second.bytes, second.config));
}

#[test]
fn a_damaged_cache_is_noticed_and_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(layout(&dir.path().join("image"), demo())).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let path = store.rootfs(&source, &mut ()).unwrap().path;
    let good = fs::read(&path).unwrap();
    let mut damaged = good.clone();
    damaged[1030] ^= 1;
    for bad in [&good[..good.len() - 4096], &damaged, b""] {
        fs::write(&path, bad).unwrap();
        assert!(store.rootfs(&source, &mut ()).unwrap().built);
        assert_eq!(fs::read(&path).unwrap(), good);
    }
    fs::write(path.with_extension("json"), "{").unwrap();
    assert!(store.rootfs(&source, &mut ()).unwrap().built);
}

#[test]
fn two_that_come_together_build_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = layout(&dir.path().join("image"), demo());
    let store = Store::open(dir.path().join("store")).unwrap();
    let built: Vec<bool> = std::thread::scope(|scope| {
        let start = || store.rootfs(&Source::open(&path).unwrap(), &mut ()).unwrap().built;
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(built.iter().filter(|built| **built).count(), 1);
}

#[test]
fn a_listing_shows_what_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let one = Source::open(layout(&dir.path().join("one"), demo())).unwrap();
    docker_archive(&dir.path().join("d.tar"), &[("two:1", demo()[..1].to_vec())]);
    let two = Source::open(dir.path().join("d.tar")).unwrap();
    let rootfs = store.rootfs(&one, &mut ()).unwrap();
    store.rootfs(&two, &mut ()).unwrap();
    let listed = store.list().unwrap();
    assert_eq!(
        listed.iter().map(|cached| cached.images[0].name.as_deref().unwrap()).collect::<Vec<_>>(),
        ["two:1", "latest"]
    );
    assert!(listed.iter().all(|cached| cached.bytes > 0 && cached.disk_bytes > 0));
    assert_eq!(store.get("two:1").unwrap().config.cmd, ["run", "two:1"]);
    assert!(matches!(store.get("three").unwrap_err(), Error::NotCached { .. }));
    assert!(matches!(store.remove("").unwrap_err(), Error::NotCached { .. }));
    assert_eq!(store.remove(&rootfs.key[..12]).unwrap().cached.key, rootfs.key);
    assert_eq!(rootfs.file.metadata().unwrap().len(), rootfs.bytes, "who has it open keeps it");
    assert_eq!(store.list().unwrap().len(), 1);
    let left: Vec<_> = fs::read_dir(dir.path().join("store")).unwrap().collect();
    assert_eq!(left.len(), 3, "image, record and lock of the other: {left:?}");
    assert!(store.rootfs(&one, &mut ()).unwrap().built);
}

#[test]
fn what_a_dead_builder_left_is_swept_and_a_live_one_is_not_disturbed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for name in ["dead.tmp", "dead.new", "dead.lock", "live.tmp", "live.lock", "done.erofs"] {
        fs::write(dir.path().join(name), b"x").unwrap();
    }
    let live = fs::File::open(dir.path().join("live.lock")).unwrap();
    let _held = nix::fcntl::Flock::lock(live, nix::fcntl::FlockArg::LockExclusive).unwrap();
    store.sweep().unwrap();
    let mut left: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["dead.lock", "done.erofs", "live.lock", "live.tmp"]);
}

#[test]
fn images_of_the_same_layers_share_a_file_system_under_all_their_names() {
    let dir = tempfile::tempdir().unwrap();
    docker_archive(&dir.path().join("d.tar"), &[("one:1", demo()), ("two:1", demo())]);
    let store = Store::open(dir.path().join("store")).unwrap();
    let open = |name: &str| Source::open(format!("{}/d.tar:{name}", dir.path().display())).unwrap();
    assert!(store.rootfs(&open("one:1"), &mut ()).unwrap().built);
    let second = store.rootfs(&open("two:1"), &mut ()).unwrap();
    assert!(!second.built);
    assert_eq!(second.config.cmd, ["run", "two:1"]);
    assert_eq!(store.get("one:1").unwrap().config.cmd, ["run", "one:1"]);
    assert_eq!(store.get("two:1").unwrap().config.cmd, ["run", "two:1"]);
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].images.len(), 2);
    store.rootfs(&open("one:1"), &mut ()).unwrap();
    assert_eq!(store.list().unwrap()[0].images.len(), 2, "nobody is listed twice");
}

/// Ends the builder in the last phase, as a kill would: nothing tidies up after it.
struct Fatal;

impl Progress for Fatal {
    fn begin(&mut self, phase: Phase, _: Option<u64>) {
        assert!(phase != Phase::Finishing, "killed");
    }

    fn advance(&mut self, _: u64) {}
}

#[test]
fn a_builder_that_dies_leaves_nothing_that_would_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(layout(&dir.path().join("image"), demo())).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let build = std::panic::AssertUnwindSafe(|| store.rootfs(&source, &mut Fatal));
    assert!(std::panic::catch_unwind(build).is_err());
    let unfinished = |extension: &str| {
        let mut paths = fs::read_dir(dir.path().join("store")).unwrap().map(|entry| entry.unwrap().path());
        paths.any(|path| path.extension().is_some_and(|found| found == extension))
    };
    assert!(unfinished("tmp") && !unfinished("erofs"));
    assert!(store.list().unwrap().is_empty());
    assert!(store.rootfs(&source, &mut ()).unwrap().built);
    assert!(!unfinished("tmp"));
}
