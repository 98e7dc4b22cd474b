//! The tree a file system image is made from: nodes in an arena, names in directories.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut};

use super::body::Content;
use super::xattr::Xattrs;

/// A time, since the epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtime {
    /// Whole seconds; negative before 1970.
    pub seconds: i64,
    /// Nanoseconds on top, below 10^9.
    pub nanoseconds: u32,
}

/// What every node has, whatever its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with set-uid, set-gid and sticky: 12 bits, others are ignored.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the body.
    pub mtime: Mtime,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

impl Meta {
    /// A directory nobody described: it exists because something is inside it.
    pub fn implied_directory() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// What it names.
    pub node: NodeId,
    /// The layer that last touched the name. Merging layers needs it, writing does not.
    pub layer: u16,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory. The order of names is the one the format wants: by bytes.
    Directory(BTreeMap<Box<[u8]>, Dirent>),
    /// A regular file, its body being in the image already.
    File(Content),
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket's place in the file system.
    Socket,
}

/// One inode to be. Several names may lead to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Owner, mode, time, attributes.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
}

impl Node {
    /// An empty directory.
    pub fn directory(meta: Meta) -> Self {
        Self { meta, kind: Kind::Directory(BTreeMap::new()) }
    }

    /// Its names, if it is a directory.
    pub fn children(&self) -> Option<&BTreeMap<Box<[u8]>, Dirent>> {
        match &self.kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Its names, if it is a directory.
    pub fn children_mut(&mut self) -> Option<&mut BTreeMap<Box<[u8]>, Dirent>> {
        match &mut self.kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }
}

/// Identifies a node in the tree that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    pub(super) fn index(self) -> usize {
        // Lossless: usize has 64 bits here.
        self.0 as usize
    }
}

/// All nodes of a file system. Nodes no name leads to are not written.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// The root directory; every tree has one.
    pub const ROOT: NodeId = NodeId(0);

    /// A tree of nothing but a root directory.
    pub fn new(root: Meta) -> Self {
        Self { nodes: vec![Node::directory(root)] }
    }

    /// Takes a node in, without a name yet. `None` if there are 2^32 nodes.
    pub fn add(&mut self, node: Node) -> Option<NodeId> {
        let id = u32::try_from(self.nodes.len()).ok()?;
        self.nodes.push(node);
        Some(NodeId(id))
    }

    /// Number of nodes, those without a name included.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }
}

impl Index<NodeId> for Tree {
    type Output = Node;

    fn index(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
}

impl IndexMut<NodeId> for Tree {
    fn index_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }
}
