//! Where each inode goes, before the first one is written.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::body::Place;
use super::dirent;
use super::error::Error;
use super::format::{BLOCK, BLOCK_SIZE, Inode, Layout, SLOT};
use super::tree::{Kind, Meta, Mtime, Node, NodeId, Tree};

/// Longest target of a symbolic link: a path with its end.
const MAX_TARGET: usize = 4095;

/// An inode with its place.
pub(super) struct Placed {
    pub(super) id: NodeId,
    /// The directory it was found in first: a directory's `..`.
    pub(super) parent: NodeId,
    /// Its number: slots of 32 bytes from the first metadata block.
    pub(super) nid: u64,
    pub(super) inode: Inode,
}

/// The metadata of an image, laid out.
pub(super) struct Plan {
    /// Inodes in the order of their numbers.
    pub(super) placed: Vec<Placed>,
    /// Number of each node's inode; 0 if no name leads to the node.
    nids: Vec<u64>,
    /// The time most nodes have, so that their inodes can do without.
    pub(super) build_time: Mtime,
    pub(super) root_nid: u16,
    /// First block after the image.
    pub(super) end_block: u32,
}

impl Plan {
    /// Lays out what is reachable in `tree` from block `meta_block` on.
    pub(super) fn new(tree: &Tree, meta_block: u32) -> Result<Self, Error> {
        let walk = Walk::new(tree);
        let build_time = most_frequent_mtime(tree, &walk.order);
        let mut slots = Slots::new();
        let mut nids = vec![0; tree.len()];
        let mut placed = Vec::with_capacity(walk.order.len());
        for id in &walk.order {
            let mut inode = describe(&tree[*id], walk.links[id.index()])?;
            let record = inode.len(build_time) + tree[*id].meta.xattrs.encoded_len();
            let tail = tail_len(inode.size);
            // A tail must not cross a block's end, nor is it worth breaking up its inode's block.
            if packs(&tree[*id].kind) && tail > 0 && record + tail <= BLOCK {
                inode.layout = Layout::Inline;
            }
            let inline = if inode.layout == Layout::Inline { tail } else { 0 };
            let nid = slots.take(record + inline);
            nids[id.index()] = nid;
            placed.push(Placed { id: *id, parent: walk.parents[id.index()], nid, inode });
        }
        placed.sort_unstable_by_key(|placed| placed.nid);
        let end_of_inodes = u64::from(meta_block) + slots.blocks();
        let mut next = end_of_inodes;
        for (index, placed) in placed.iter_mut().enumerate() {
            placed.inode.ino = u32::try_from(index + 1).unwrap_or(u32::MAX);
            let own = own_blocks(&tree[placed.id].kind, &placed.inode);
            if own > 0 {
                placed.inode.union = u32::try_from(next).map_err(|_| Error::TooLarge)?;
                next += own;
            }
        }
        // Readers may look for attributes behind any inode (fsck.erofs 1.5 does), so that none may
        // be the last thing in the image.
        let end_block = u32::try_from(next.max(end_of_inodes + 1)).map_err(|_| Error::TooLarge)?;
        // The root is placed first, in the first block.
        let root_nid = u16::try_from(nids[Tree::ROOT.index()]).map_err(|_| Error::TooLarge)?;
        Ok(Self { placed, nids, build_time, root_nid, end_block })
    }

    /// First blocks of all bodies a name leads to.
    pub(super) fn body_starts(&self, tree: &Tree) -> HashSet<u32> {
        let kinds = self.placed.iter().map(|placed| &tree[placed.id].kind);
        kinds
            .filter_map(|kind| match kind {
                Kind::File(content) => content.first_block(),
                _ => None,
            })
            .collect()
    }

    pub(super) fn nid(&self, id: NodeId) -> u64 {
        self.nids[id.index()]
    }
}

/// Blocks behind the inodes that belong to this one: of directories, and of bodies that found no
/// room behind their inode.
pub(super) fn own_blocks(kind: &Kind, inode: &Inode) -> u64 {
    match (packs(kind), inode.layout) {
        (false, _) => 0,
        (true, Layout::Inline) => inode.size / BLOCK_SIZE,
        (true, Layout::Plain) => inode.size.div_ceil(BLOCK_SIZE),
    }
}

/// Whether the body is written with the metadata; others are in the image already, or do not exist.
fn packs(kind: &Kind) -> bool {
    match kind {
        Kind::Directory(_) | Kind::Symlink(_) => true,
        Kind::File(content) => matches!(content.0, Place::Small { .. }),
        _ => false,
    }
}

fn tail_len(size: u64) -> usize {
    // Below the block size.
    (size % BLOCK_SIZE) as usize
}

/// The inode of a node, its body's place apart.
fn describe(node: &Node, links: u32) -> Result<Inode, Error> {
    let (file_mode, size, union) = match &node.kind {
        Kind::Directory(children) => {
            let names = children.keys().map(|name| (&**name, ()));
            (libc::S_IFDIR, dirent::size(dirent::with_dots((), (), names).map(|(name, ())| name)), 0)
        }
        Kind::File(content) => match content.0 {
            Place::Blocks { first, len } => (libc::S_IFREG, len, first),
            _ => (libc::S_IFREG, content.size(), 0),
        },
        Kind::Symlink(target) if target.len() > MAX_TARGET => {
            return Err(Error::LongTarget { len: target.len(), max: MAX_TARGET });
        }
        Kind::Symlink(target) => (libc::S_IFLNK, target.len() as u64, 0),
        Kind::CharDevice { major, minor } => (libc::S_IFCHR, 0, device(*major, *minor)),
        Kind::BlockDevice { major, minor } => (libc::S_IFBLK, 0, device(*major, *minor)),
        Kind::Fifo => (libc::S_IFIFO, 0, 0),
        Kind::Socket => (libc::S_IFSOCK, 0, 0),
    };
    let Meta { mode, uid, gid, mtime, xattrs } = &node.meta;
    // Types are in the upper four of 16 bits.
    let mode = (file_mode as u16 & 0o170_000) | (mode & 0o7777);
    Ok(Inode {
        layout: Layout::Plain,
        xattr_count: xattrs.count(),
        mode,
        nlink: links,
        size,
        union,
        ino: 0,
        uid: *uid,
        gid: *gid,
        mtime: *mtime,
    })
}

/// Device numbers as `new_encode_dev` of the kernel has them: 12 bits major, 20 bits minor.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// Everything a name leads to, with how many do.
struct Walk {
    order: Vec<NodeId>,
    links: Vec<u32>,
    parents: Vec<NodeId>,
}

impl Walk {
    /// Directory by directory, so that the inodes of one directory are neighbours.
    fn new(tree: &Tree) -> Self {
        let mut walk = Self {
            order: vec![Tree::ROOT],
            links: vec![0; tree.len()],
            parents: vec![Tree::ROOT; tree.len()],
        };
        walk.links[Tree::ROOT.index()] = 2;
        let mut directories = vec![Tree::ROOT];
        while let Some(directory) = directories.pop() {
            let first_new = directories.len();
            for dirent in tree[directory].children().into_iter().flat_map(|children| children.values()) {
                let links = &mut walk.links[dirent.node.index()];
                if *links == 0 {
                    walk.order.push(dirent.node);
                    walk.parents[dirent.node.index()] = directory;
                }
                *links = links.saturating_add(1);
                if *links == 1 && tree[dirent.node].children().is_some() {
                    *links = 2;
                    walk.links[directory.index()] = walk.links[directory.index()].saturating_add(1);
                    directories.push(dirent.node);
                }
            }
            directories[first_new..].reverse();
        }
        walk
    }
}

fn most_frequent_mtime(tree: &Tree, order: &[NodeId]) -> Mtime {
    let mut counts: HashMap<Mtime, usize> = HashMap::new();
    for id in order {
        *counts.entry(tree[*id].meta.mtime).or_default() += 1;
    }
    // The time itself decides a draw: the map's order must not.
    counts
        .into_iter()
        .max_by_key(|(mtime, count)| (*count, *mtime))
        .map(|(mtime, _)| mtime)
        .unwrap_or_default()
}

/// Hands out room in the metadata blocks.
struct Slots {
    /// Ends of blocks with room left, by how many slots.
    open: BTreeSet<(u64, u64)>,
    end: u64,
}

const SLOTS_PER_BLOCK: u64 = BLOCK_SIZE / SLOT;

impl Slots {
    fn new() -> Self {
        // The first slot stays empty: an inode number of 0 means "none" to too many programs.
        Self { open: BTreeSet::from([(SLOTS_PER_BLOCK - 1, SLOTS_PER_BLOCK)]), end: SLOTS_PER_BLOCK }
    }

    /// The first slot of `bytes` bytes: within one block, the fullest that has room, or from a
    /// block's start on if they need more than one.
    fn take(&mut self, bytes: usize) -> u64 {
        let need = (bytes as u64).div_ceil(SLOT);
        let found = self.open.range((need, 0)..).next().copied();
        let (room, end) = found.unwrap_or_else(|| {
            let room = need.next_multiple_of(SLOTS_PER_BLOCK);
            self.end += room;
            (room, self.end)
        });
        self.open.remove(&(room, end));
        if room > need {
            self.open.insert((room - need, end));
        }
        end - room
    }

    fn blocks(&self) -> u64 {
        self.end / SLOTS_PER_BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_never_cross_a_block_they_fit_in() {
        let mut slots = Slots::new();
        let mut taken = Vec::new();
        for bytes in (1..=4096).rev().chain(1..=4096) {
            let first = slots.take(bytes);
            let last = first + (bytes as u64).div_ceil(SLOT) - 1;
            assert_eq!(first / SLOTS_PER_BLOCK, last / SLOTS_PER_BLOCK, "{bytes} bytes");
            taken.push((first, last));
        }
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].1 < pair[1].0), "no two records overlap");
        assert!(taken[0].0 > 0, "inode number 0 is not given out");
    }

    #[test]
    fn a_record_larger_than_a_block_starts_one() {
        let mut slots = Slots::new();
        assert_eq!(slots.take(5000), 128);
        assert_eq!(slots.take(32), 285, "what it left of its last block is the fullest");
        assert_eq!(slots.take(4000), 1, "the first block still has room");
        assert_eq!(slots.blocks(), 3);
    }

    #[test]
    fn device_numbers_keep_twenty_bits_of_minor() {
        assert_eq!(device(8, 1), 0x801);
        assert_eq!(device(0xfff, 0xf_ffff), 0xffff_ffff);
        assert_eq!(device(1, 0x100), 0x0010_0100);
    }
}
