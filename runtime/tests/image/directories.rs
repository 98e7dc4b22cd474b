//! Plain directories and overlays of them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use mvm_runtime::image::{Source, Stability, Store};

use crate::support::erofs_reader::list;
use crate::{build, paths};

fn key(path: &Path) -> String {
    Source::open(path).unwrap().key().unwrap().hex()
}

#[test]
fn a_directory_becomes_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::write(root.join("a/small"), b"small").unwrap();
    fs::write(root.join("a/large"), vec![3; 100_000]).unwrap();
    fs::hard_link(root.join("a/large"), root.join("a/b/same")).unwrap();
    symlink("/etc/shadow", root.join("link")).unwrap();
    fs::set_permissions(root.join("a/small"), fs::Permissions::from_mode(0o2750)).unwrap();
    let pipe = nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRUSR);
    pipe.unwrap();
    let (_, seen) = build(dir.path(), &Source::open(&root).unwrap()).unwrap();
    assert_eq!(paths(&seen), ["", "a", "a/b", "a/b/same", "a/large", "a/small", "link", "pipe"]);
    assert_eq!(seen[&b"link"[..]].body, b"/etc/shadow");
    assert_eq!(seen[&b"a/b/same"[..]].body, vec![3; 100_000]);
    assert_eq!(seen[&b"a/b/same"[..]].nid, seen[&b"a/large"[..]].nid);
    for (path, seen) in &seen {
        let on_host = root.join(std::str::from_utf8(path).unwrap()).symlink_metadata().unwrap();
        assert_eq!(u32::from(seen.mode), on_host.mode(), "{path:?}");
        assert_eq!((seen.uid, seen.gid), (on_host.uid(), on_host.gid()));
        assert_eq!(seen.mtime, (on_host.mtime(), u32::try_from(on_host.mtime_nsec()).unwrap()));
    }
}

#[test]
fn a_sparse_file_of_the_host_stays_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let file = fs::File::create(root.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"in the middle", 20 << 20).unwrap();
    file.set_len(40 << 20).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let rootfs = store.rootfs(&Source::open(&root).unwrap(), &mut ()).unwrap();
    assert!(rootfs.bytes > 40 << 20);
    assert!(rootfs.file.metadata().unwrap().blocks() * 512 < 1 << 20);
    let seen = list(&fs::read(&rootfs.path).unwrap());
    assert!(seen[&b"sparse"[..]].body == fs::read(root.join("sparse")).unwrap());
}

#[test]
fn any_change_of_a_directory_changes_its_key() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"1").unwrap();
    let mut keys = vec![key(dir.path())];
    assert_eq!(key(dir.path()), keys[0]);
    let mut note = || keys.push(key(dir.path()));
    fs::write(dir.path().join("file"), b"22").unwrap();
    note();
    fs::set_permissions(dir.path().join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    note();
    fs::rename(dir.path().join("file"), dir.path().join("other")).unwrap();
    note();
    fs::create_dir(dir.path().join("sub")).unwrap();
    note();
    fs::write(dir.path().join("sub/inner"), b"").unwrap();
    note();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 6);
}

/// The kernel's own overlay file system makes the layers, and judges what they merge to.
#[test]
fn an_overlay_is_merged_as_the_kernel_merges_it() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not tested: only root can mount the judge");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let make = r#"
        set -e
        mkdir -p bottom/d/sub bottom/opaque middle top work merged
        echo bottom > bottom/d/hidden; echo bottom > bottom/d/kept; echo bottom > bottom/d/sub/x
        echo bottom > bottom/opaque/gone; echo bottom > bottom/file; mkdir bottom/was-dir; touch bottom/was-dir/f
        mount -t overlay -o lowerdir=bottom,upperdir=middle,workdir=work none merged
        rm merged/d/hidden merged/file; echo middle > merged/d/kept
        umount merged
        mount -t overlay -o lowerdir=middle:bottom,upperdir=top,workdir=work none merged
        rm -r merged/was-dir merged/opaque; echo top > merged/was-dir
        mkdir merged/opaque merged/new; echo top > merged/opaque/fresh; ln merged/opaque/fresh merged/new/second
        umount merged
        mount -t overlay -o lowerdir=top:middle:bottom none merged
        find merged -mindepth 1 -printf '%P\n' | sort
    "#;
    // In a mount namespace of its own, so that nothing stays mounted.
    let mut command = Command::new("unshare");
    let judged = command.args(["-m", "sh", "-c", make]).current_dir(dir.path()).output().unwrap();
    assert!(judged.status.success(), "{judged:?}");
    let lower = ["top", "middle", "bottom"].map(|name| dir.path().join(name));
    let (_, seen) =
        build(dir.path(), &Source::overlay(lower.to_vec(), Stability::Changing).unwrap()).unwrap();
    let expected =
        ["", "d", "d/kept", "d/sub", "d/sub/x", "new", "new/second", "opaque", "opaque/fresh", "was-dir"];
    assert_eq!(paths(&seen), expected);
    assert_eq!(String::from_utf8(judged.stdout).unwrap(), expected[1..].join("\n") + "\n");
    assert_eq!(seen[&b"d/kept"[..]].body, b"middle\n");
    assert_eq!(seen[&b"was-dir"[..]].body, b"top\n");
    assert!(seen[&b"opaque"[..]].xattrs.is_empty(), "the overlay's notes are not copied");
}
