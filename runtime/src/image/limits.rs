//! How much an image may ask of us. Images are strangers' files: each bound stops an input that
//! would fill memory, a disk or an afternoon, and is far above what real images need.

/// Longest index, manifest or configuration, in bytes.
pub const MAX_JSON_BYTES: u64 = 4 << 20;
/// Most layers of an image; overlay file systems stop at about as many.
pub const MAX_LAYERS: usize = 128;
/// Most entries in all layers of an image together, or files in a directory.
pub const MAX_ENTRIES: u64 = 1_000_000;
/// Longest path in a layer, in bytes: the kernel's `PATH_MAX`.
pub const MAX_PATH_BYTES: usize = 4096;
/// Longest name of a file, in bytes: the kernel's `NAME_MAX`.
pub const MAX_NAME_BYTES: usize = 255;
/// Most symbolic links followed, inside the image, to find the directory of one entry: the
/// kernel's bound.
pub const MAX_SYMLINKS: usize = 40;
/// Most names looked up on the way to all entries of an image together: a layer of a few megabytes
/// can ask for hours of following links otherwise.
pub const MAX_LOOKUPS: u64 = 100_000_000;
/// Most bytes in all layers of an image, unpacked; holes of sparse files count.
pub const MAX_TOTAL_BYTES: u64 = 20 << 30;
/// Most bytes unpacked for each byte of a compressed layer ...
pub const MAX_RATIO: u64 = 200;
/// ... once this many are unpacked: a small layer of zeros is no attack.
pub const RATIO_FREE_BYTES: u64 = 64 << 20;
/// Most bytes of extended attributes of one file.
pub const MAX_XATTR_BYTES: usize = crate::erofs::MAX_XATTR_BYTES;
/// Most extended attributes of one file.
pub const MAX_XATTRS: usize = 1024;
/// Most bytes of names, link targets and attributes in an image: they are held in memory.
pub const MAX_METADATA_BYTES: u64 = 512 << 20;
/// Most bytes of one extended header of a tar entry: attributes, a path, a link and a little.
pub const MAX_HEADER_BYTES: u64 = 256 << 10;
/// Most pieces of a sparse file.
pub const MAX_EXTENTS: usize = 64 << 10;
/// Most files in an image archive: blobs and their directories.
pub const MAX_ARCHIVE_MEMBERS: usize = 10_000;
