//! An EROFS writer: a tree of files becomes one uncompressed, read-only file system image.
//!
//! The image is written in one pass. File bodies stream in first, each at a block boundary, so that
//! the guest can map them without a copy; the tree is handed over last and becomes the metadata
//! behind them. Bodies of less than a block do not deserve a block of their own: they are packed
//! behind their inodes, as are symlink targets and the ends of directories.
//!
//! ```text
//! block 0      superblock
//! block 1..    bodies of regular files, in the order they were appended
//! meta_blkaddr inodes, each followed by its extended attributes and its tail
//! ..           blocks of directories larger than one block
//! ```
//!
//! Only features known to Linux 5.4 are used, so any kernel with `CONFIG_EROFS_FS` reads it. The
//! format is described in the kernel's `Documentation/filesystems/erofs.rst` and `erofs_fs.h`.
//! The same appends and the same tree give the same bytes.

mod blocks;
mod body;
mod dirent;
mod error;
mod format;
mod plan;
mod tree;
mod writer;
mod xattr;

pub use body::Content;
pub use error::Error;
pub use format::{BLOCK_SIZE, MAGIC, SUPER_OFFSET, Superblock};
pub use tree::{Dirent, Kind, Meta, Mtime, Node, NodeId, Tree};
pub use writer::{Summary, Writer};
pub use xattr::{MAX_XATTR_BYTES, Xattrs};

/// Version of what this writer makes of a tree. It is part of every cache key: raise it when the
/// same input would give other bytes.
pub const WRITER_VERSION: u32 = 1;
