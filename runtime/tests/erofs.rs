//! The EROFS writer against independent readers: one of our own, and `fsck.erofs`.

#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use mvm_runtime::erofs::{Content, Dirent, Kind, Meta, Mtime, Node, NodeId, Tree, Writer, Xattrs};
use proptest::prelude::*;
use support::erofs_reader::{Seen, list};

/// A tree under construction together with what a reader must find.
struct Sketch {
    writer: Writer,
    tree: Tree,
    bodies: BTreeMap<NodeId, Vec<u8>>,
}

impl Sketch {
    fn new(dir: &std::path::Path) -> Self {
        let image = File::options().read(true).write(true).create_new(true).open(dir.join("image")).unwrap();
        let spool = tempfile::tempfile_in(dir).unwrap();
        let root = Meta { mode: 0o755, ..Meta::default() };
        Self { writer: Writer::new(image, spool), tree: Tree::new(root), bodies: BTreeMap::new() }
    }

    fn file(&mut self, parent: NodeId, name: &[u8], meta: Meta, body: &[u8]) -> NodeId {
        let content = self.writer.append(&mut &*body, body.len() as u64).unwrap();
        assert_eq!(content.size(), body.len() as u64);
        let id = self.node(parent, name, meta, Kind::File(content));
        self.bodies.insert(id, body.to_vec());
        id
    }

    fn node(&mut self, parent: NodeId, name: &[u8], meta: Meta, kind: Kind) -> NodeId {
        let id = self.tree.add(Node { meta, kind }).unwrap();
        self.link(parent, name, id);
        id
    }

    fn directory(&mut self, parent: NodeId, name: &[u8], meta: Meta) -> NodeId {
        self.node(parent, name, meta, Kind::Directory(BTreeMap::new()))
    }

    fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let children = self.tree[parent].children_mut().unwrap();
        children.insert(name.into(), Dirent { node, layer: 0 });
    }

    /// What a reader must see, inode numbers and placement apart.
    fn expected(&self) -> BTreeMap<Vec<u8>, Seen> {
        let mut links = BTreeMap::new();
        self.count(Tree::ROOT, &mut links);
        *links.entry(Tree::ROOT).or_default() += 2;
        let mut seen = BTreeMap::new();
        self.describe(Tree::ROOT, Vec::new(), &links, &mut seen);
        seen
    }

    fn count(&self, id: NodeId, links: &mut BTreeMap<NodeId, u32>) {
        for dirent in self.tree[id].children().unwrap().values() {
            *links.entry(dirent.node).or_default() += 1;
            if self.tree[dirent.node].children().is_some() {
                *links.entry(dirent.node).or_default() += 1;
                *links.entry(id).or_default() += 1;
                self.count(dirent.node, links);
            }
        }
    }

    fn describe(
        &self,
        id: NodeId,
        path: Vec<u8>,
        links: &BTreeMap<NodeId, u32>,
        seen: &mut BTreeMap<Vec<u8>, Seen>,
    ) {
        let node = &self.tree[id];
        let (kind, body, device) = match &node.kind {
            Kind::Directory(_) => (0o040_000, Vec::new(), None),
            Kind::File(_) => (0o100_000, self.bodies[&id].clone(), None),
            Kind::Symlink(target) => (0o120_000, target.to_vec(), None),
            Kind::CharDevice { major, minor } => (0o020_000, Vec::new(), Some((*major, *minor))),
            Kind::BlockDevice { major, minor } => (0o060_000, Vec::new(), Some((*major, *minor))),
            Kind::Fifo => (0o010_000, Vec::new(), Some((0, 0))),
            Kind::Socket => (0o140_000, Vec::new(), Some((0, 0))),
        };
        for (name, dirent) in node.children().into_iter().flatten() {
            let below = if path.is_empty() { name.to_vec() } else { [&path, &b"/"[..], name].concat() };
            self.describe(dirent.node, below, links, seen);
        }
        let meta = &node.meta;
        let entry = Seen {
            nid: 0,
            mode: kind | meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            nlink: links[&id],
            mtime: (meta.mtime.seconds, meta.mtime.nanoseconds),
            xattrs: meta.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
            body,
            device,
            mappable: false,
        };
        seen.insert(path, entry);
    }

    /// Finishes the image and compares it with what was put in.
    fn check(self, dir: &std::path::Path) -> BTreeMap<Vec<u8>, Seen> {
        let expected = self.expected();
        self.writer.finish(&self.tree, [7; 16]).unwrap();
        fsck(dir);
        let found = list(&std::fs::read(dir.join("image")).unwrap());
        let plain =
            found.iter().map(|(path, seen)| (path.clone(), Seen { nid: 0, mappable: false, ..seen.clone() }));
        assert_eq!(plain.collect::<BTreeMap<_, _>>(), expected);
        found
    }
}

/// `fsck.erofs` (Debian's erofs-utils) must find nothing to complain about.
fn fsck(dir: &std::path::Path) {
    let output = Command::new("fsck.erofs").arg("--extract").arg(dir.join("image")).output();
    let output = output.expect("fsck.erofs of erofs-utils is needed");
    assert!(output.status.success(), "{output:?}");
}

fn meta(mode: u16) -> Meta {
    Meta { mode, ..Meta::default() }
}

#[test]
fn an_empty_tree_is_a_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let found = Sketch::new(dir.path()).check(dir.path());
    assert_eq!(found.len(), 1);
}

#[test]
fn bodies_of_every_awkward_size_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    let sizes =
        [0, 1, 31, 32, 33, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 70_000, 1 << 20, (1 << 20) + 1];
    for size in sizes {
        let body: Vec<u8> = (0..size).map(|at: usize| (at * 31 % 251) as u8).collect();
        sketch.file(Tree::ROOT, format!("f{size}").as_bytes(), meta(0o644), &body);
    }
    let found = sketch.check(dir.path());
    assert!(found[&b"f4097"[..]].mappable, "bodies of more than a block can be mapped");
    assert!(!found[&b"f33"[..]].mappable, "small bodies share their inode's block");
}

#[test]
fn a_small_body_beside_large_attributes_gets_a_block() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    let mut heavy = meta(0o644);
    assert!(heavy.xattrs.set(b"user.note", &[b'n'; 3000]));
    sketch.file(Tree::ROOT, b"heavy", heavy.clone(), &[1; 2000]);
    sketch.node(Tree::ROOT, b"link", heavy.clone(), Kind::Symlink(vec![b't'; 2000].into()));
    assert!(heavy.xattrs.set(b"user.more", &[b'm'; 60_000]));
    sketch.file(Tree::ROOT, b"heavier", heavy.clone(), &[2; 10]);
    let inner = sketch.directory(Tree::ROOT, b"inner", heavy);
    sketch.file(inner, b"f", meta(0o600), b"x");
    let found = sketch.check(dir.path());
    assert!(found[&b"heavy"[..]].mappable);
}

#[test]
fn directories_of_many_blocks_keep_every_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    for (name, count) in [("few", 14), ("one-block", 15), ("two", 16), ("many", 5000)] {
        let parent = sketch.directory(Tree::ROOT, name.as_bytes(), meta(0o755));
        for index in 0..count {
            let name = format!("{index:0>255}");
            sketch.node(parent, name.as_bytes(), meta(0o644), Kind::File(Content::EMPTY));
        }
    }
    // `Content::EMPTY` bypasses the sketch's record of bodies.
    let empty: Vec<NodeId> = sketch.tree_files();
    sketch.bodies.extend(empty.into_iter().map(|id| (id, Vec::new())));
    assert_eq!(sketch.check(dir.path()).len(), 5 + 14 + 15 + 16 + 5000);
}

impl Sketch {
    fn tree_files(&self) -> Vec<NodeId> {
        let mut pending = vec![Tree::ROOT];
        let mut files = Vec::new();
        while let Some(id) = pending.pop() {
            match &self.tree[id].kind {
                Kind::Directory(children) => pending.extend(children.values().map(|dirent| dirent.node)),
                Kind::File(_) => files.push(id),
                _ => {}
            }
        }
        files
    }
}

#[test]
fn two_names_of_one_file_are_one_inode() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    let file = sketch.file(Tree::ROOT, b"a", meta(0o4755), b"shared");
    let sub = sketch.directory(Tree::ROOT, b"sub", meta(0o700));
    sketch.link(sub, b"b", file);
    let found = sketch.check(dir.path());
    assert_eq!(found[&b"a"[..]].nid, found[&b"sub/b"[..]].nid);
    assert_eq!(found[&b"a"[..]].nlink, 2);
}

#[test]
fn a_body_nobody_names_becomes_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    sketch.file(Tree::ROOT, b"gone", meta(0o644), &[0xaa; 1 << 20]);
    sketch.file(Tree::ROOT, b"kept", meta(0o644), &[0xbb; 8192]);
    sketch.tree[Tree::ROOT].children_mut().unwrap().remove(&b"gone"[..]);
    let summary = sketch.writer.finish(&sketch.tree, [0; 16]).unwrap();
    assert_eq!(summary.dead_bytes, 1 << 20);
    let bytes = std::fs::read(dir.path().join("image")).unwrap();
    assert!(!bytes.contains(&0xaa), "a deleted body must not be in the image");
    assert_eq!(list(&bytes)[&b"kept"[..]].body, [0xbb; 8192]);
}

#[test]
fn a_sparse_body_takes_no_room_for_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    let len = 64 << 20;
    let extents = [0..4, (32 << 20) + 1..(32 << 20) + 5];
    let content = sketch.writer.append_sparse(&mut &b"headtail"[..], len, &extents).unwrap();
    sketch.node(Tree::ROOT, b"sparse", meta(0o644), Kind::File(content));
    let small = sketch.writer.append_sparse(&mut &b"xy"[..], 10, &[2..3, 8..9]).unwrap();
    sketch.node(Tree::ROOT, b"small", meta(0o644), Kind::File(small));
    let summary = sketch.writer.finish(&sketch.tree, [0; 16]).unwrap();
    assert!(summary.file.metadata().unwrap().blocks() * 512 < 4 << 20);
    let found = list(&std::fs::read(dir.path().join("image")).unwrap());
    let body = &found[&b"sparse"[..]].body;
    assert_eq!(body.len() as u64, len);
    assert_eq!(&body[..4], b"head");
    assert_eq!(&body[(32 << 20) + 1..(32 << 20) + 5], b"tail");
    assert_eq!(body.iter().filter(|byte| **byte != 0).count(), 8);
    assert_eq!(found[&b"small"[..]].body, b"\0\0x\0\0\0\0\0y\0");
}

#[test]
fn a_body_that_ends_early_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut sketch = Sketch::new(dir.path());
    for len in [100, 10_000] {
        let error = sketch.writer.append(&mut &[0; 99][..], len).unwrap_err();
        assert_eq!(error.to_string(), format!("a file body ends after 99 of {len} bytes"));
    }
}

/// What a random tree is grown from: each step adds one thing below an earlier directory.
#[derive(Clone, Debug)]
enum Step {
    Directory,
    File(Vec<u8>),
    Link,
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Directory),
        4 => (0..9000_usize, any::<u8>()).prop_map(|(len, byte)| Step::File(vec![byte; len])),
        1 => Just(Step::Link),
        1 => proptest::collection::vec(1..=255_u8, 1..4096).prop_map(Step::Symlink),
        1 => (0..4096_u32, 0..(1_u32 << 20)).prop_map(|(major, minor)| Step::Char(major, minor)),
        1 => (0..4096_u32, 0..(1_u32 << 20)).prop_map(|(major, minor)| Step::Block(major, minor)),
        1 => Just(Step::Fifo),
        1 => Just(Step::Socket),
    ]
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("not in a name", |byte| !matches!(byte, 0 | b'/'));
    proptest::collection::vec(byte, 1..=255)
        .prop_filter("dots", |name| !matches!(name.as_slice(), b"." | b".."))
}

fn metas() -> impl Strategy<Value = Meta> {
    let xattrs = proptest::collection::vec((0..4_usize, "[a-z]{1,40}", 0..3000_usize), 0..3);
    let ids = prop_oneof![Just(0_u32), any::<u32>()];
    let times = prop_oneof![Just((0_i64, 0_u32)), (any::<i64>(), 0..1_000_000_000_u32)];
    (0..=0o7777_u16, ids.clone(), ids, times, xattrs).prop_map(|(mode, uid, gid, time, attributes)| {
        let mut xattrs = Xattrs::default();
        for (space, name, len) in attributes {
            let space = ["user.", "trusted.", "security.", "user.x."][space];
            assert!(xattrs.set(format!("{space}{name}").as_bytes(), &vec![b'v'; len]));
        }
        Meta { mode, uid, gid, mtime: Mtime { seconds: time.0, nanoseconds: time.1 }, xattrs }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tree_reads_back_as_it_was(
        plan in proptest::collection::vec((any::<prop::sample::Index>(), names(), metas(), steps()), 0..80),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut sketch = Sketch::new(dir.path());
        let (mut directories, mut others) = (vec![Tree::ROOT], Vec::new());
        for (parent, name, meta, step) in plan {
            let parent = *parent.get(&directories);
            if sketch.tree[parent].children().unwrap().contains_key(&name[..]) {
                continue;
            }
            let kind = match step {
                Step::Directory => {
                    directories.push(sketch.directory(parent, &name, meta));
                    continue;
                }
                Step::File(body) => {
                    others.push(sketch.file(parent, &name, meta, &body));
                    continue;
                }
                Step::Link => {
                    if let Some(other) = others.last() {
                        sketch.link(parent, &name, *other);
                    }
                    continue;
                }
                Step::Symlink(mut target) => {
                    target.truncate(4095);
                    Kind::Symlink(target.into())
                }
                Step::Char(major, minor) => Kind::CharDevice { major, minor },
                Step::Block(major, minor) => Kind::BlockDevice { major, minor },
                Step::Fifo => Kind::Fifo,
                Step::Socket => Kind::Socket,
            };
            others.push(sketch.node(parent, &name, meta, kind));
        }
        sketch.check(dir.path());
    }
}
