//! The order of writing: bodies as they come, then the metadata, then the superblock.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::blocks::BlockFile;
use super::body::{Bodies, Content, Place, Spool};
use super::dirent::{self, Name};
use super::error::Error;
use super::format::{BLOCK_SIZE, Layout, SLOT, Superblock};
use super::plan::{Placed, Plan, own_blocks};
use super::tree::{Kind, Node, Tree};

/// Writes one image.
pub struct Writer {
    bodies: Bodies,
}

/// What has been written.
#[derive(Debug)]
pub struct Summary {
    /// The image, complete but not synced.
    pub file: File,
    /// Its superblock.
    pub superblock: Superblock,
    /// Bytes of bodies that were appended but that no name leads to. They are holes in the file.
    pub dead_bytes: u64,
}

impl Writer {
    /// Starts an image in the empty file `image`; `spool` is another empty file, for the time of
    /// writing only.
    pub fn new(image: File, spool: File) -> Self {
        Self { bodies: Bodies::new(image, spool) }
    }

    /// Takes in the body of a regular file, `len` bytes of `body`.
    pub fn append(&mut self, body: &mut dyn Read, len: u64) -> Result<Content, Error> {
        let whole = 0..len;
        self.bodies.append(body, len, std::slice::from_ref(&whole))
    }

    /// Takes in the body of a sparse file of `len` bytes: `body` yields the `extents` one after the
    /// other, which are in order and do not overlap; all else is zero and takes no room on the host.
    pub fn append_sparse(
        &mut self,
        body: &mut dyn Read,
        len: u64,
        extents: &[Range<u64>],
    ) -> Result<Content, Error> {
        self.bodies.append(body, len, extents)
    }

    /// Writes the metadata of `tree`, whose bodies this writer has taken in.
    pub fn finish(self, tree: &Tree, uuid: [u8; 16]) -> Result<Summary, Error> {
        let (mut out, spool, runs) = self.bodies.into_parts()?;
        let meta_block = out.next_block()?;
        let plan = Plan::new(tree, meta_block)?;
        let dead_bytes = punch_dead(out.file(), &plan.body_starts(tree), &runs)?;
        let metadata = Metadata { tree, plan: &plan, spool: &spool };
        metadata.write_inodes(&mut out, meta_block)?;
        metadata.write_blocks(&mut out)?;
        out.skip(u64::from(plan.end_block) * BLOCK_SIZE - out.position())?;
        let superblock = Superblock {
            root_nid: plan.root_nid,
            inodes: plan.placed.len() as u64,
            build_time: plan.build_time,
            blocks: plan.end_block,
            meta_block,
            uuid,
        };
        let file = out.into_file()?;
        file.write_all_at(&superblock.encode(), 0).map_err(Error::Write)?;
        Ok(Summary { file, superblock, dead_bytes })
    }
}

/// What inodes are written from.
struct Metadata<'a> {
    tree: &'a Tree,
    plan: &'a Plan,
    spool: &'a Spool,
}

impl Metadata<'_> {
    fn write_inodes(&self, out: &mut BlockFile, meta_block: u32) -> Result<(), Error> {
        let start = u64::from(meta_block) * BLOCK_SIZE;
        let mut record = Vec::new();
        for placed in &self.plan.placed {
            record.clear();
            let node = &self.tree[placed.id];
            placed.inode.encode(self.plan.build_time, &mut record);
            node.meta.xattrs.encode(&mut record);
            if placed.inode.layout == Layout::Inline {
                self.tail(node, placed, &mut record)?;
            }
            out.skip(start + placed.nid * SLOT - out.position())?;
            out.append(&record)?;
        }
        out.pad()
    }

    /// What lies behind the inode: a small body, a target, the end of a directory.
    fn tail(&self, node: &Node, placed: &Placed, record: &mut Vec<u8>) -> Result<(), Error> {
        match &node.kind {
            Kind::Directory(_) => {
                let mut index = 0;
                let whole = own_blocks(&node.kind, &placed.inode);
                self.directory(placed, |block| {
                    if index == whole {
                        record.extend_from_slice(block);
                    }
                    index += 1;
                    Ok(())
                })
            }
            _ => self.small(node, record),
        }
    }

    /// Blocks that belong to inodes, in the order the plan gave them out.
    fn write_blocks(&self, out: &mut BlockFile) -> Result<(), Error> {
        for placed in &self.plan.placed {
            let node = &self.tree[placed.id];
            let mut left = own_blocks(&node.kind, &placed.inode);
            if left == 0 {
                continue;
            }
            if let Kind::Directory(_) = node.kind {
                self.directory(placed, |block| {
                    if left > 0 {
                        left -= 1;
                        out.append(block)?;
                    }
                    Ok(())
                })?;
            } else {
                let mut body = Vec::new();
                self.small(node, &mut body)?;
                out.append(&body)?;
            }
            out.pad()?;
        }
        Ok(())
    }

    fn small(&self, node: &Node, out: &mut Vec<u8>) -> Result<(), Error> {
        match &node.kind {
            Kind::Symlink(target) => out.extend_from_slice(target),
            Kind::File(Content(Place::Small { offset, len })) => self.spool.read(*offset, *len, out)?,
            _ => {}
        }
        Ok(())
    }

    fn directory(&self, placed: &Placed, block: impl FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let children = self.tree[placed.id].children().into_iter().flatten();
        let names = children.map(|(name, dirent)| (&**name, dirent.node));
        let names = dirent::with_dots(placed.id, placed.parent, names);
        let entries = names.map(|(name, id)| Name {
            name,
            nid: self.plan.nid(id),
            file_type: file_type(&self.tree[id].kind),
        });
        dirent::encode(entries, block)
    }
}

/// `EROFS_FT_*`.
fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink(_) => 7,
    }
}

/// Turns runs of blocks no file of the tree has into holes, so that what a later layer deleted is
/// neither kept nor shown. Returns their size.
fn punch_dead(image: &File, alive: &HashSet<u32>, runs: &[Range<u32>]) -> Result<u64, Error> {
    let mut dead = 0;
    for run in runs.iter().filter(|run| !alive.contains(&run.start)) {
        let start = u64::from(run.start) * BLOCK_SIZE;
        let len = u64::from(run.end - run.start) * BLOCK_SIZE;
        punch(image, start, len)?;
        dead += len;
    }
    Ok(dead)
}

fn punch(image: &File, start: u64, len: u64) -> Result<(), Error> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // 2^32 blocks of 4 KiB end far below 2^63.
    match fallocate(image, flags, start.cast_signed(), len.cast_signed()) {
        // A file system without holes: the bytes stay where nothing points to them.
        Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
        Err(errno) => Err(Error::Write(errno.into())),
    }
}
