//! Files of a tree that somebody hostile can write to.

use std::{fs::File, os::unix::fs::symlink, path::Path};

use tempfile::TempDir;

use super::*;

fn put_at(tree: &Path, path: &str, content: PutContent) -> nix::Result<()> {
    let tree = File::open(tree).unwrap();
    let make = content != PutContent::Remove;
    let entry = PutEntry { path: path.to_owned(), mode: 0o640, uid: 0, gid: 0, content };
    put_entry(&spot(tree.as_fd(), path, make)?, &entry)
}

fn part(offset: u64, bytes: &[u8], last: bool) -> PutContent {
    PutContent::File { offset, bytes: bytes.to_vec(), last }
}

/// A tree and a directory outside of it.
fn tree() -> (TempDir, std::path::PathBuf, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "untouched").unwrap();
    (dir, tree, outside)
}

#[test]
fn a_file_has_its_name_only_when_it_is_whole() {
    let (_dir, tree, _) = tree();
    put_at(&tree, "a/b/f", part(0, b"new ", false)).unwrap();
    assert!(!tree.join("a/b/f").exists());
    put_at(&tree, "a/b/f", part(4, b"file", true)).unwrap();
    assert_eq!(fs::read_to_string(tree.join("a/b/f")).unwrap(), "new file");
    put_at(&tree, "a/b/f", part(0, b"newer", true)).unwrap();
    assert_eq!(fs::read_to_string(tree.join("a/b/f")).unwrap(), "newer");
    assert_eq!(fs::read_dir(tree.join("a/b")).unwrap().count(), 1);
}

#[test]
fn a_part_that_does_not_follow_those_before_it_is_refused() {
    let (_dir, tree, _) = tree();
    assert_eq!(put_at(&tree, "f", part(4, b"x", true)), Err(Errno::ENOENT));
    put_at(&tree, "f", part(0, b"1234", false)).unwrap();
    assert_eq!(put_at(&tree, "f", part(3, b"x", true)), Err(Errno::ESPIPE));
    assert_eq!(put_at(&tree, "f", part(5, b"x", true)), Err(Errno::ESPIPE));
    assert_eq!(put_at(&tree, "f", part(0, &vec![0; MAX_PART + 1], true)), Err(Errno::E2BIG));
}

#[test]
fn links_lead_nowhere_but_into_the_tree() {
    let (_dir, tree, outside) = tree();
    symlink(&outside, tree.join("absolute")).unwrap();
    symlink("../outside", tree.join("climbing")).unwrap();
    symlink(outside.join("file"), tree.join("name")).unwrap();
    symlink(outside.join("file"), tree.join(".mvm-put-name")).unwrap();
    for path in ["absolute/file", "climbing/file"] {
        let _ = put_at(&tree, path, part(0, b"changed", true));
    }
    put_at(&tree, "name", part(0, b"changed", true)).unwrap();
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(tree.join("name")).unwrap(), "changed");
    put_at(&tree, "absolute", PutContent::Remove).unwrap();
    assert!(outside.join("file").exists());
    let opened = File::open(&tree).unwrap();
    assert_eq!(read_at(opened.as_fd(), "climbing/file", 0), Err(Errno::ENOENT));
    let link = read_at(opened.as_fd(), "climbing", 0).unwrap();
    assert_eq!(link.content, GotContent::Link("../outside".into()));
}

#[test]
fn a_directory_that_is_a_link_is_not_a_directory() {
    let (_dir, tree, outside) = tree();
    symlink(&outside, tree.join("d")).unwrap();
    assert!(put_at(&tree, "d", PutContent::Directory).is_err());
    put_at(&tree, "e", PutContent::Directory).unwrap();
    put_at(&tree, "e", PutContent::Directory).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(tree.join("e")).unwrap().permissions());
    assert_eq!(mode & 0o7777, 0o640);
}

#[test]
fn a_tree_is_removed_and_what_its_links_mean_is_not() {
    let (_dir, tree, outside) = tree();
    fs::create_dir_all(tree.join("top/a/b")).unwrap();
    fs::write(tree.join("top/a/f"), "x").unwrap();
    symlink(&outside, tree.join("top/a/link")).unwrap();
    put_at(&tree, "top", PutContent::Remove).unwrap();
    assert_eq!(fs::read_dir(&tree).unwrap().count(), 0);
    assert!(outside.join("file").exists());
    put_at(&tree, "top", PutContent::Remove).unwrap();
    let deep = "d/".repeat(MAX_DEPTH + 2);
    fs::create_dir_all(tree.join(&deep)).unwrap();
    assert_eq!(put_at(&tree, "d", PutContent::Remove), Err(Errno::ELOOP));
}

#[test]
fn a_link_replaces_what_is_there() {
    let (_dir, tree, _) = tree();
    for target in ["one", "two"] {
        put_at(&tree, "l", PutContent::Link(target.into())).unwrap();
        assert_eq!(fs::read_link(tree.join("l")).unwrap(), Path::new(target));
    }
}

#[test]
fn files_and_directories_are_read_in_parts_and_a_pipe_is_not_waited_for() {
    let (_dir, tree, _) = tree();
    fs::write(tree.join("f"), b"0123456789").unwrap();
    nix::unistd::mkfifo(&tree.join("pipe"), Mode::S_IRWXU).unwrap();
    let opened = File::open(&tree).unwrap();
    let read = |path, offset| read_at(opened.as_fd(), path, offset).unwrap().content;
    assert_eq!(read("f", 7), GotContent::File(b"789".into()));
    assert_eq!(read("f", 10), GotContent::File(vec![]));
    assert_eq!(read("pipe", 0), GotContent::Other);
    let GotContent::Directory(mut names) = read(".", 0) else { panic!() };
    assert_eq!(read(".", 1), GotContent::Directory(names[1..].to_vec()));
    assert_eq!(read(".", 2), GotContent::Directory(vec![]));
    names.sort();
    assert_eq!(names, ["f", "pipe"]);
    assert_eq!(read_at(opened.as_fd(), "f", u64::MAX), Err(Errno::EFBIG));
}
