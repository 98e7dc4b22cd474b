//! Reads an uncompressed EROFS image into a list of paths, checking what a kernel relies on. It
//! shares no code with the writer.

use std::collections::BTreeMap;

const BLOCK: usize = 4096;

/// One path of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) nid: u64,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Body of a file, target of a link, empty for others.
    pub(crate) body: Vec<u8>,
    /// `i_u` of devices, as the kernel decodes it.
    pub(crate) device: Option<(u32, u32)>,
    /// Whether every byte of the body is in blocks of its own.
    pub(crate) mappable: bool,
}

/// Every path of the image, the root being empty.
pub(crate) fn list(image: &[u8]) -> BTreeMap<Vec<u8>, Seen> {
    let image = Image::open(image);
    let mut seen = BTreeMap::new();
    image.directory(&mut seen, Vec::new(), image.root, image.root);
    assert_eq!(image.inodes, distinct(&seen), "number of inodes in the superblock");
    seen
}

fn distinct(seen: &BTreeMap<Vec<u8>, Seen>) -> u64 {
    let mut nids: Vec<u64> = seen.values().map(|seen| seen.nid).collect();
    nids.sort_unstable();
    nids.dedup();
    nids.len() as u64
}

struct Image<'a> {
    bytes: &'a [u8],
    meta: usize,
    root: u64,
    inodes: u64,
    build_time: (i64, u32),
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl<'a> Image<'a> {
    fn open(bytes: &'a [u8]) -> Self {
        let sb = &bytes[1024..1152];
        assert_eq!(u32_at(sb, 0), 0xe0f5_e1e2, "magic");
        assert_eq!(sb[12], 12, "block size");
        assert_eq!(u32_at(sb, 80), 0, "incompatible features");
        assert_eq!(u32_at(sb, 36) as usize * BLOCK, bytes.len(), "length in blocks");
        Self {
            bytes,
            meta: u32_at(sb, 40) as usize * BLOCK,
            root: u64::from(u16_at(sb, 14)),
            inodes: u64_at(sb, 16),
            build_time: (u64_at(sb, 24) as i64, u32_at(sb, 32)),
        }
    }

    fn inode(&self, nid: u64) -> Seen {
        let at = self.meta + nid as usize * 32;
        let raw = &self.bytes[at..];
        let format = u16_at(raw, 0);
        let extended = format & 1 == 1;
        let mode = u16_at(raw, 4);
        let size = if extended { u64_at(raw, 8) as usize } else { u32_at(raw, 8) as usize };
        let union = u32_at(raw, 16);
        let (uid, gid, mtime, nlink) = if extended {
            (u32_at(raw, 24), u32_at(raw, 28), (u64_at(raw, 32) as i64, u32_at(raw, 40)), u32_at(raw, 44))
        } else {
            (u16_at(raw, 24).into(), u16_at(raw, 26).into(), self.build_time, u16_at(raw, 6).into())
        };
        let count = usize::from(u16_at(raw, 2));
        let xattrs_at = at + if extended { 64 } else { 32 };
        let xattrs_len = if count == 0 { 0 } else { 12 + (count - 1) * 4 };
        let tail_at = xattrs_at + xattrs_len;
        let has_body = matches!(mode & 0o170_000, 0o100_000 | 0o040_000 | 0o120_000);
        let inline = match format >> 1 {
            0 => false,
            2 => true,
            layout => panic!("inode {nid}: layout {layout}"),
        };
        Seen {
            nid,
            mode,
            uid,
            gid,
            nlink,
            mtime,
            xattrs: xattrs(&self.bytes[xattrs_at..tail_at]),
            body: if has_body { self.body(size, union, tail_at, inline) } else { Vec::new() },
            device: (!has_body)
                .then_some(((union >> 8) & 0xfff, (union & 0xff) | ((union >> 12) & 0xf_ff00))),
            mappable: !inline,
        }
    }

    fn body(&self, size: usize, first: u32, tail_at: usize, inline: bool) -> Vec<u8> {
        let start = first as usize * BLOCK;
        if !inline {
            if size > 0 {
                assert!(first > 0, "a body in the superblock's block");
            }
            return self.bytes[start..start + size].to_vec();
        }
        let whole = size / BLOCK * BLOCK;
        let tail = size - whole;
        assert!(tail > 0 && tail_at % BLOCK + tail <= BLOCK, "a tail of {tail} at {tail_at} crosses a block");
        [&self.bytes[start..start + whole], &self.bytes[tail_at..tail_at + tail]].concat()
    }

    fn directory(&self, seen: &mut BTreeMap<Vec<u8>, Seen>, path: Vec<u8>, nid: u64, parent: u64) {
        let inode = self.inode(nid);
        assert_eq!(inode.mode & 0o170_000, 0o040_000, "{path:?} is no directory");
        let entries = entries(&inode.body);
        assert!(entries.windows(2).all(|pair| pair[0].0 < pair[1].0), "names of {path:?} are not sorted");
        let find = |name: &[u8]| entries.iter().find(|entry| entry.0 == name).map(|entry| entry.1);
        assert_eq!(find(b"."), Some(nid));
        assert_eq!(find(b".."), Some(parent));
        for (name, child, file_type) in &entries {
            if matches!(name.as_slice(), b"." | b"..") {
                continue;
            }
            let below = if path.is_empty() { name.clone() } else { [&path, &b"/"[..], name].concat() };
            let found = self.inode(*child);
            let expected_type = match found.mode & 0o170_000 {
                0o100_000 => 1,
                0o040_000 => 2,
                0o020_000 => 3,
                0o060_000 => 4,
                0o010_000 => 5,
                0o140_000 => 6,
                0o120_000 => 7,
                other => panic!("{below:?}: type {other:o}"),
            };
            assert_eq!(*file_type, expected_type, "{below:?}: type in the directory");
            if expected_type == 2 {
                self.directory(seen, below, *child, nid);
            } else {
                seen.insert(below, found);
            }
        }
        seen.insert(path, Seen { body: Vec::new(), ..inode });
    }
}

fn entries(body: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
    let mut entries = Vec::new();
    for block in body.chunks(BLOCK) {
        let count = usize::from(u16_at(block, 8)) / 12;
        for index in 0..count {
            let at = index * 12;
            let start = usize::from(u16_at(block, at + 8));
            let end = if index + 1 < count { usize::from(u16_at(block, at + 20)) } else { block.len() };
            let name = block[start..end].split(|byte| *byte == 0).next().unwrap().to_vec();
            assert!(!name.is_empty());
            entries.push((name, u64_at(block, at), block[at + 10]));
        }
    }
    entries
}

fn xattrs(bytes: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut found = BTreeMap::new();
    if bytes.is_empty() {
        return found;
    }
    assert_eq!(bytes[4], 0, "shared attributes");
    let mut rest = &bytes[12..];
    while rest.len() >= 4 {
        let (name_len, value_len) = (usize::from(rest[0]), usize::from(u16_at(rest, 2)));
        let prefix: &[u8] = match rest[1] {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            other => panic!("attribute prefix {other}"),
        };
        let name = [prefix, &rest[4..4 + name_len]].concat();
        found.insert(name, rest[4 + name_len..4 + name_len + value_len].to_vec());
        rest = &rest[(4 + name_len + value_len).next_multiple_of(4)..];
    }
    assert!(rest.is_empty());
    found
}
