//! Snapshots become disks, and what a guest makes of the disks is what the host's overlay shows.

#![allow(missing_docs, clippy::print_stderr)]

mod snapshots;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mvm_protocol::Writable;
use mvm_runtime::image::Keep;
use mvm_runtime::machine::Disk;
use mvm_runtime::rootfs::{Prepared, Request, UPPER_BYTES, Upper, cache, prepare};
use mvm_runtime::sandbox::RootfsMount;
use snapshots::{LIST, Snapshots, overlay};
use support::erofs_reader::list;

const LAYERS: [&str; 3] = [
    "mkdir -p d/sub opaque was-dir; echo 0 > d/hidden; echo 0 > d/kept; echo 0 > d/sub/x; echo 0 > opaque/gone
     echo 0 > file; echo 0 > was-dir/f; ln -s /etc link; chown 7:8 file; chmod 4755 file
     head -c 100000 /dev/urandom > large; ln large second; setfattr -n user.note -v yes d/kept || true",
    "rm d/hidden file; echo 1 > d/kept; echo 1 > 'name with space'",
    "rm -r was-dir opaque; echo 2 > was-dir; mkdir opaque new; echo 2 > opaque/fresh; ln opaque/fresh new/second",
];

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("not tested: only root can mount");
    }
    root
}

#[test]
fn the_guests_overlay_of_the_disks_shows_what_the_hosts_overlay_shows() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    let expected = snapshots.run(&format!("{}; cd merged; {LIST}", overlay(3)));
    assert!(expected.contains("new/second f ") && !expected.contains("hidden"), "{expected}");
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    assert_eq!((prepared.lower.len(), prepared.disks.len(), prepared.read_only), (3, 4, false));
    assert_eq!(snapshots.in_guest(&prepared, LIST), expected);
}

#[test]
fn whiteouts_and_opaque_directories_are_kept_in_layers_and_other_notes_are_not() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    let top = list(&fs::read(&prepared.disks[0].path).unwrap());
    assert_eq!(top[&b"opaque"[..]].xattrs[&b"trusted.overlay.opaque"[..]], b"y");
    let middle = list(&fs::read(&prepared.disks[1].path).unwrap());
    let whiteout = &middle[&b"d/hidden"[..]];
    assert_eq!((u32::from(whiteout.mode) & libc::S_IFMT, whiteout.device), (libc::S_IFCHR, Some((0, 0))));
    let notes = top.values().chain(middle.values()).flat_map(|seen| seen.xattrs.keys());
    let notes: Vec<_> = notes.filter(|name| name.starts_with(b"trusted.overlay.")).collect();
    assert!(notes.iter().all(|name| name.ends_with(b".opaque")), "{notes:?}");
}

#[test]
fn a_layer_is_converted_once_and_shared() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    let first = snapshots.prepare(&[snapshots.mount()]);
    let inodes = |prepared: &Prepared| -> Vec<u64> {
        prepared.disks[..3].iter().map(|disk| disk.path.metadata().unwrap().ino()).collect()
    };
    let before = inodes(&first);
    assert_eq!(inodes(&snapshots.prepare(&[snapshots.mount()])), before);
    // In use, no pruning takes them away; then it does.
    let store = cache(&snapshots.path("state")).unwrap();
    let nothing = Keep { bytes: Some(0), ..Keep::default() };
    let pruned = store.prune(&nothing).unwrap();
    assert_eq!((pruned.removed.len(), pruned.in_use), (0, 3));
    drop(first);
    let pruned = store.prune(&nothing).unwrap();
    assert_eq!((pruned.removed.len(), pruned.in_use), (3, 0));
    assert!(pruned.freed_bytes > 0 && store.list().unwrap().is_empty());
    assert_eq!(inodes(&snapshots.prepare(&[snapshots.mount()])).len(), 3);
}

#[test]
fn layers_of_snapshots_that_are_gone_make_room() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    drop(snapshots.prepare(&[snapshots.mount()]));
    fs::remove_dir_all(snapshots.path("2")).unwrap();
    let store = cache(&snapshots.path("state")).unwrap();
    let pruned = store.prune(&Keep { only_with_origin: true, ..Keep::default() }).unwrap();
    assert_eq!(pruned.removed[0].images[0].origin, snapshots.fs(2));
    assert_eq!((pruned.removed.len(), store.list().unwrap().len()), (1, 2));
}

#[test]
fn a_container_made_again_of_its_snapshot_finds_its_writes() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    let first = snapshots.prepare(&[snapshots.mount()]);
    snapshots.in_guest(&first, "echo mine > d/written; rm large; sync");
    drop(first);
    let again = snapshots.prepare(&[snapshots.mount()]);
    assert_eq!(again.disks[3].path, snapshots.path("3/mvm-upper-fs.ext4"));
    assert_eq!(snapshots.in_guest(&again, "cat d/written; ls -d large || echo gone"), "mine\ngone\n");
    let left: Vec<_> = fs::read_dir(snapshots.fs(3)).unwrap().collect();
    assert!(left.is_empty(), "nothing is written to the snapshot itself: {left:?}");
}

#[test]
fn an_upper_directory_that_holds_something_is_one_more_layer() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    snapshots.run(&format!("{}; cd merged; rm d/kept; echo up > d/up", overlay(3)));
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    assert_eq!(prepared.lower.len(), 4);
    assert!(prepared.disks[0].path.starts_with(snapshots.path("container")));
    assert_eq!(snapshots.in_guest(&prepared, "ls d; cat d/up"), "sub\nup\nup\n");
    // It may change between two lives of a container.
    drop(prepared);
    snapshots.run(&format!("{}; echo changed > merged/d/up", overlay(3)));
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    assert_eq!(snapshots.in_guest(&prepared, "cat d/up"), "changed\n");
}

#[test]
fn a_hundred_layers_become_one() {
    if !root() {
        return;
    }
    let scripts: Vec<String> = (0..100)
        .map(|index| match index {
            0 => "echo 0 > first; mkdir d".to_owned(),
            50 => "rm first; rm -r d; mkdir d; echo 50 > d/f50".to_owned(),
            _ => format!("echo {index} > d/f{index}; echo {index} > last"),
        })
        .collect();
    let scripts: Vec<&str> = scripts.iter().map(String::as_str).collect();
    let snapshots = Snapshots::new(&scripts);
    let expected = snapshots.run(&format!("{}; cd merged; {LIST}", overlay(100)));
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    assert_eq!((prepared.lower.len(), prepared.disks.len()), (1, 2));
    assert_eq!(snapshots.in_guest(&prepared, LIST), expected);
    assert_eq!(snapshots.in_guest(&prepared, "cat last; ls d | wc -l; ls first || true"), "99\n50\n");
    let again = snapshots.prepare(&[snapshots.mount()]);
    assert_eq!(
        again.disks[0].path.metadata().unwrap().ino(),
        prepared.disks[0].path.metadata().unwrap().ino()
    );
}

#[test]
fn views_and_binds_are_layers_of_one_directory() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS[..1]);
    let bind = |mode: &str| RootfsMount {
        kind: "bind".to_owned(),
        source: snapshots.fs(0).display().to_string(),
        target: String::new(),
        options: vec!["rbind".to_owned(), mode.to_owned()],
    };
    let expected = snapshots.run(&format!("cd 0/fs; {LIST}"));
    let view = snapshots.prepare(&[bind("ro")]);
    assert!(view.read_only && matches!(view.writable, Writable::Tmpfs { size: 1.. }));
    assert_eq!(snapshots.in_guest(&view, LIST), expected);
    let native = snapshots.prepare(&[bind("rw")]);
    assert!(!native.read_only);
    assert!(native.disks[0].path.starts_with(snapshots.path("container")));
    assert_eq!(snapshots.in_guest(&native, &format!("{LIST}; echo 1 > new")), expected);
    assert!(!snapshots.fs(0).join("new").exists());
}

#[test]
fn a_bundles_root_directory_needs_no_mounts() {
    let dir = tempfile::tempdir().unwrap();
    let (state, root, directory) =
        (dir.path().join("state"), dir.path().join("rootfs"), dir.path().join("c"));
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir(&directory).unwrap();
    let request = Request {
        container: "bundle",
        mounts: &[],
        root: Some(&root),
        upper: Upper::default(),
        directory: &directory,
        layer_disks: 1,
    };
    let prepared = prepare(&request, &state, &mut ()).unwrap();
    let [layer, writes] = prepared.disks.as_slice() else { panic!("{prepared:?}") };
    assert_eq!(list(&fs::read(&layer.path).unwrap()).keys().collect::<Vec<_>>(), [&b""[..], b"bin"]);
    assert!(writes.path.starts_with(state.join("uppers")) && !writes.read_only);
    assert_eq!(writes.path.metadata().unwrap().len(), UPPER_BYTES);
    let memory = Request { upper: Upper::Memory { bytes: 5 }, ..request.clone() };
    assert_eq!(prepare(&memory, &state, &mut ()).unwrap().writable, Writable::Tmpfs { size: 5 });
    let nowhere = Request { upper: Upper::Nowhere, ..request };
    assert_eq!(prepare(&nowhere, &state, &mut ()).unwrap().writable, Writable::No);
}

#[test]
fn a_block_file_goes_through_as_it_is() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&[]);
    snapshots.run("mkdir tree; echo hello > tree/file; truncate -s 16M block; mkfs.ext4 -q -d tree block");
    let mount = |mode: &str| RootfsMount {
        kind: "ext4".to_owned(),
        source: snapshots.path("block").display().to_string(),
        target: String::new(),
        options: vec!["loop".to_owned(), mode.to_owned()],
    };
    let prepared = snapshots.prepare(&[mount("rw")]);
    let [Disk { path, read_only: false, serial, .. }] = prepared.disks.as_slice() else {
        panic!("{prepared:?}")
    };
    assert_eq!(
        (path, &prepared.writable),
        (&snapshots.path("block"), &Writable::Whole { serial: serial.clone() })
    );
    assert!(prepared.lower.is_empty());
    assert_eq!(snapshots.in_guest(&prepared, "cat file; echo more > file"), "hello\n");
    let view = snapshots.prepare(&[mount("ro")]);
    assert!(view.read_only && view.disks[0].read_only);
    assert_eq!(snapshots.in_guest(&view, "cat file"), "more\n");
    let gone = RootfsMount { source: snapshots.path("gone").display().to_string(), ..mount("rw") };
    let directory = snapshots.path("container");
    let request = Request {
        container: "c",
        mounts: &[gone],
        root: None,
        upper: Upper::default(),
        directory: &directory,
        layer_disks: 1,
    };
    let failure = prepare(&request, &snapshots.path("state"), &mut ()).unwrap_err();
    assert!(failure.report().contains("No such file"), "{}", failure.report());
}

/// The layout of containerd 2.1's EROFS snapshotter.
#[test]
fn images_beside_lower_directories_are_the_disks() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS);
    let made = snapshots.prepare(&[snapshots.mount()]);
    for index in 0..3 {
        let image = snapshots.path(&format!("{index}/layer.erofs"));
        fs::copy(&made.disks[2 - index].path, image).unwrap();
    }
    let expected = snapshots.run(&format!("{}; cd merged; {LIST}", overlay(3)));
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    let paths: Vec<&Path> = prepared.disks[..3].iter().map(|disk| disk.path.as_path()).collect();
    assert_eq!(paths, [2, 1, 0].map(|index| snapshots.path(&format!("{index}/layer.erofs"))));
    assert_eq!(snapshots.in_guest(&prepared, LIST), expected);
}

#[test]
fn a_full_disk_of_writes_is_the_guests_own_trouble() {
    if !root() {
        return;
    }
    let snapshots = Snapshots::new(&LAYERS[..1]);
    let prepared = snapshots.prepare(&[snapshots.mount()]);
    let said =
        snapshots.in_guest(&prepared, "head -c 100M /dev/zero 2>&1 > fill || true; rm fill; echo 1 > fits");
    assert!(said.contains("No space left on device"), "{said}");
    let disk = prepared.disks.last().unwrap().path.metadata().unwrap();
    assert_eq!(disk.len(), 64 << 20);
    assert!(disk.blocks() * 512 <= 64 << 20);
}
