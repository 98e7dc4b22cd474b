//! The on-disk structures: superblock, compact and extended inodes (`erofs_fs.h`).

use super::tree::Mtime;

/// Size of a block in bytes; what every kernel with 4 KiB pages can mount.
pub const BLOCK_SIZE: u64 = 4096;
/// [`BLOCK_SIZE`] where lengths of buffers are meant.
pub(super) const BLOCK: usize = 4096;
const BLOCK_BITS: u8 = 12;

/// Byte offset of the superblock in the image.
pub const SUPER_OFFSET: usize = 1024;
/// First field of the superblock.
pub const MAGIC: u32 = 0xe0f5_e1e2;

/// `EROFS_FEATURE_COMPAT_SB_CHKSUM`: the superblock's block carries a crc32c.
const COMPAT_CHECKSUM: u32 = 0x1;
/// `EROFS_FEATURE_COMPAT_MTIME`: times of inodes are modification times.
const COMPAT_MTIME: u32 = 0x2;

/// Inodes are addressed in units of this many bytes.
pub(super) const SLOT: u64 = 32;
pub(super) const COMPACT_INODE: usize = 32;
pub(super) const EXTENDED_INODE: usize = 64;

/// What a mount sees first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Number of the root directory's inode, in slots of 32 bytes from `meta_block`.
    pub root_nid: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Time of all compact inodes.
    pub build_time: Mtime,
    /// Length of the file system in blocks.
    pub blocks: u32,
    /// Block at which inode numbers start to count.
    pub meta_block: u32,
    /// Identity of the file system.
    pub uuid: [u8; 16],
}

impl Superblock {
    /// Block 0 of the image, with its checksum.
    pub(super) fn encode(&self) -> [u8; BLOCK] {
        let mut fields = Vec::with_capacity(128);
        put(&mut fields, MAGIC.to_le_bytes());
        put(&mut fields, [0; 4]); // checksum, below
        put(&mut fields, (COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(&mut fields, [BLOCK_BITS, 0]); // sb_extslots
        put(&mut fields, self.root_nid.to_le_bytes());
        put(&mut fields, self.inodes.to_le_bytes());
        put(&mut fields, self.build_time.seconds.to_le_bytes());
        put(&mut fields, self.build_time.nanoseconds.to_le_bytes());
        put(&mut fields, self.blocks.to_le_bytes());
        put(&mut fields, self.meta_block.to_le_bytes());
        put(&mut fields, [0; 4]); // xattr_blkaddr: no shared attributes
        put(&mut fields, self.uuid);
        // The rest is zero: volume name, incompatible features, extra devices, compression.
        let mut block = [0; BLOCK];
        block[SUPER_OFFSET..SUPER_OFFSET + fields.len()].copy_from_slice(&fields);
        let checksum = crc32c(&block[SUPER_OFFSET..]);
        block[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// Reads the superblock back from the first block of an image; `None` if it is not one of ours
    /// or does not match its checksum.
    pub fn decode(first: &[u8; BLOCK_SIZE as usize]) -> Option<Self> {
        let field = |at: usize, len: usize| first.get(SUPER_OFFSET + at..SUPER_OFFSET + at + len);
        let u32_at = |at| Some(u32::from_le_bytes(field(at, 4)?.try_into().ok()?));
        let u64_at = |at| Some(u64::from_le_bytes(field(at, 8)?.try_into().ok()?));
        let superblock = Self {
            root_nid: u16::from_le_bytes(field(14, 2)?.try_into().ok()?),
            inodes: u64_at(16)?,
            build_time: Mtime { seconds: u64_at(24)?.cast_signed(), nanoseconds: u32_at(32)? },
            blocks: u32_at(36)?,
            meta_block: u32_at(40)?,
            uuid: field(48, 16)?.try_into().ok()?,
        };
        // One encoding per superblock, so equal bytes prove magic, features and checksum at once.
        (superblock.encode()[SUPER_OFFSET..] == first[SUPER_OFFSET..]).then_some(superblock)
    }
}

/// Where the bytes of an inode's body are (`i_format` bits 1–3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// All in blocks, the last one padded.
    Plain,
    /// Whole blocks first, the rest behind the inode.
    Inline,
}

/// An inode before it is known how many bytes it takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode {
    pub(super) layout: Layout,
    pub(super) xattr_count: u16,
    pub(super) mode: u16,
    pub(super) nlink: u32,
    pub(super) size: u64,
    /// First block of the body, or the device number.
    pub(super) union: u32,
    /// Number shown by a 32-bit `stat`.
    pub(super) ino: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Mtime,
}

impl Inode {
    /// Whether the 32-byte form can hold this inode: it has no time of its own.
    pub(super) fn is_compact(&self, build_time: Mtime) -> bool {
        self.mtime == build_time && self.compact().is_some()
    }

    pub(super) fn len(&self, build_time: Mtime) -> usize {
        if self.is_compact(build_time) { COMPACT_INODE } else { EXTENDED_INODE }
    }

    pub(super) fn encode(&self, build_time: Mtime, out: &mut Vec<u8>) {
        match self.compact().filter(|_| self.mtime == build_time) {
            Some(bytes) => out.extend_from_slice(&bytes),
            None => self.extended(out),
        }
    }

    fn format(&self, version: u16) -> [u8; 2] {
        let layout: u16 = match self.layout {
            Layout::Plain => 0,
            Layout::Inline => 2,
        };
        (version | layout << 1).to_le_bytes()
    }

    /// `struct erofs_inode_compact`, if size, links and owner fit.
    fn compact(&self) -> Option<[u8; COMPACT_INODE]> {
        let mut out = Vec::with_capacity(COMPACT_INODE);
        put(&mut out, self.format(0));
        put(&mut out, self.xattr_count.to_le_bytes());
        put(&mut out, self.mode.to_le_bytes());
        put(&mut out, u16::try_from(self.nlink).ok()?.to_le_bytes());
        put(&mut out, u32::try_from(self.size).ok()?.to_le_bytes());
        put(&mut out, [0; 4]);
        put(&mut out, self.union.to_le_bytes());
        put(&mut out, self.ino.to_le_bytes());
        put(&mut out, u16::try_from(self.uid).ok()?.to_le_bytes());
        put(&mut out, u16::try_from(self.gid).ok()?.to_le_bytes());
        put(&mut out, [0; 4]);
        out.try_into().ok()
    }

    /// `struct erofs_inode_extended`.
    fn extended(&self, out: &mut Vec<u8>) {
        put(out, self.format(1));
        put(out, self.xattr_count.to_le_bytes());
        put(out, self.mode.to_le_bytes());
        put(out, [0; 2]);
        put(out, self.size.to_le_bytes());
        put(out, self.union.to_le_bytes());
        put(out, self.ino.to_le_bytes());
        put(out, self.uid.to_le_bytes());
        put(out, self.gid.to_le_bytes());
        put(out, self.mtime.seconds.to_le_bytes());
        put(out, self.mtime.nanoseconds.to_le_bytes());
        put(out, self.nlink.to_le_bytes());
        put(out, [0; 16]);
    }
}

fn put<const N: usize>(out: &mut Vec<u8>, bytes: [u8; N]) {
    out.extend_from_slice(&bytes);
}

/// The kernel's crc32c: seeded with ones, not inverted at the end. Bit by bit is quick enough for
/// the one block it is used on.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| {
                if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0x82f6_3b78 }
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        Superblock {
            root_nid: 7,
            inodes: 3,
            build_time: Mtime { seconds: -5, nanoseconds: 9 },
            blocks: 12,
            meta_block: 4,
            uuid: *b"0123456789abcdef",
        }
    }

    #[test]
    fn crc32c_of_the_check_string_is_the_published_value() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_superblock_reads_back() {
        assert_eq!(Superblock::decode(&superblock().encode()), Some(superblock()));
    }

    #[test]
    fn a_superblock_with_any_byte_changed_is_refused() {
        for at in SUPER_OFFSET..BLOCK {
            let mut block = superblock().encode();
            block[at] ^= 0x10;
            assert_eq!(Superblock::decode(&block), None, "byte {at}");
        }
    }

    #[test]
    fn an_inode_that_shares_the_build_time_is_compact() {
        let mtime = Mtime { seconds: 1, nanoseconds: 0 };
        let inode = Inode {
            layout: Layout::Plain,
            xattr_count: 0,
            mode: 0o100_644,
            nlink: 1,
            size: 5,
            union: 1,
            ino: 1,
            uid: 0,
            gid: 0,
            mtime,
        };
        assert_eq!(inode.len(mtime), 32);
        assert_eq!(inode.len(Mtime::default()), 64);
        assert_eq!(Inode { uid: 65_536, ..inode }.len(mtime), 64);
        assert_eq!(Inode { nlink: 65_536, ..inode }.len(mtime), 64);
        assert_eq!(Inode { size: 1 << 32, ..inode }.len(mtime), 64);
    }
}
