//! What images are called, and how they are found and removed by it.

use std::time::Duration;

use mvm_runtime::image::{Error, Keep, Source, Store, full_name};

use crate::support::images::{Layer, layout};

fn source(dir: &std::path::Path, name: &str, content: &[u8]) -> Source {
    let image = layout(&dir.join(name), vec![Layer::new().file("f", content).bytes()]);
    Source::open(image).unwrap()
}

fn named(source: Source, name: &str) -> Source {
    source.named(full_name(name).unwrap())
}

#[test]
fn an_image_is_found_by_any_way_to_say_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let image = source(dir.path(), "a", b"1");
    let digest = image.digest().unwrap().to_owned();
    let key = store.rootfs(&named(image, "tool"), &mut ()).unwrap().key;
    for name in ["tool", "tool:latest", "docker.io/library/tool", &digest, &digest[..19], &key, &key[..8]] {
        assert_eq!(store.get(name).unwrap().key, key, "{name}");
    }
    for name in ["tool:1", "me/tool", "", "to", "sha256:", "quay.io/tool"] {
        assert!(matches!(store.get(name).unwrap_err(), Error::NotCached { .. }), "{name}");
    }
}

#[test]
fn a_given_name_moves_to_the_newest_image() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let old = store.rootfs(&named(source(dir.path(), "a", b"1"), "tool"), &mut ()).unwrap().key;
    let new = store.rootfs(&named(source(dir.path(), "b", b"2"), "tool"), &mut ()).unwrap().key;
    assert_eq!(store.get("tool").unwrap().key, new);
    let nameless: Vec<_> =
        store.list().unwrap().into_iter().filter(|it| it.images[0].name.is_none()).collect();
    assert_eq!(nameless.iter().map(|it| it.key.as_str()).collect::<Vec<_>>(), [old.as_str()]);
    // And back.
    store.rootfs(&named(source(dir.path(), "c", b"1"), "tool"), &mut ()).unwrap();
    assert_eq!(store.get("tool").unwrap().key, old);
}

#[test]
fn removing_one_of_two_names_keeps_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    store.rootfs(&named(source(dir.path(), "a", b"1"), "one"), &mut ()).unwrap();
    store.rootfs(&named(source(dir.path(), "b", b"1"), "two"), &mut ()).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(!store.remove("one").unwrap().whole);
    assert!(matches!(store.get("one").unwrap_err(), Error::NotCached { .. }));
    assert!(store.remove("two").unwrap().whole);
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn pruning_goes_by_size_age_and_name_and_leaves_what_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let named_one = store.rootfs(&named(source(dir.path(), "a", b"1"), "one"), &mut ()).unwrap();
    let nameless = Source::directory(tempfile::tempdir_in(dir.path()).unwrap().keep()).unwrap();
    let nameless = store.rootfs(&nameless, &mut ()).unwrap();
    let keep = Keep { named: true, ..Keep::default() };
    assert_eq!(store.prune(&keep).unwrap().in_use, 1);
    drop(nameless);
    let pruned = store.prune(&keep).unwrap();
    assert_eq!((pruned.removed.len(), pruned.in_use), (1, 0));
    assert!(pruned.freed_bytes > 0);
    // Nothing is that old, or that large.
    let lenient = Keep { bytes: Some(1 << 30), unused: Some(Duration::from_secs(60)), ..Keep::default() };
    assert!(store.prune(&lenient).unwrap().removed.is_empty());
    let all = Keep { unused: Some(Duration::ZERO), ..Keep::default() };
    assert_eq!(store.prune(&all).unwrap().in_use, 1);
    drop(named_one);
    assert_eq!(store.prune(&all).unwrap().removed.len(), 1);
    let second = store.rootfs(&source(dir.path(), "d", &[4; 60_000]), &mut ()).unwrap().key;
    store.rootfs(&source(dir.path(), "e", &[5; 100_000]), &mut ()).unwrap();
    let pruned = store.prune(&Keep { bytes: Some(150_000), ..Keep::default() }).unwrap();
    assert_eq!(pruned.removed.iter().map(|it| it.key.as_str()).collect::<Vec<_>>(), [second.as_str()]);
}
