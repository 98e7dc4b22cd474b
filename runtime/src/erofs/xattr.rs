//! Extended attributes, kept behind the inode they belong to.

use std::collections::BTreeMap;

use super::format::SLOT;

/// Most bytes of names and values one inode may carry; the kernel's own limit for one value.
pub const MAX_XATTR_BYTES: usize = 64 * 1024;

/// `struct erofs_xattr_ibody_header`: name filter, number of shared attributes, reserved.
const HEADER: usize = 12;
/// `struct erofs_xattr_entry`: length of the name, its prefix, length of the value.
const ENTRY: usize = 4;

/// Prefixes that have a number; the format can keep no others. Longer ones come first where one
/// starts like another.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// The extended attributes of one node, by full name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xattrs {
    entries: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// Bytes of names and values. Kept, as the next is: whoever sets many asks each time.
    bytes: usize,
    /// Bytes of all entries in an image.
    cost: usize,
}

impl Xattrs {
    /// Sets an attribute. False, and nothing is changed, if an image cannot hold it: an unknown
    /// name space, an over-long name, or more than [`MAX_XATTR_BYTES`] in all.
    #[must_use]
    pub fn set(&mut self, name: &[u8], value: &[u8]) -> bool {
        let fits = |name: &[u8]| split(name).is_some_and(|(_, rest)| rest.len() <= 255);
        let old = self.entries.get(name).map_or((0, 0), |old| (name.len() + old.len(), cost(name, old)));
        // What the old value takes is in the sums.
        let (bytes, others) = (self.bytes - old.0, self.cost - old.1);
        if !fits(name) || value.len() > usize::from(u16::MAX) || others + cost(name, value) > MAX_XATTR_BYTES
        {
            return false;
        }
        (self.bytes, self.cost) = (bytes + name.len() + value.len(), others + cost(name, value));
        self.entries.insert(name.into(), value.into());
        true
    }

    /// Names and values, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().map(|(name, value)| (&**name, &**value))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of names and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes taken behind the inode.
    pub(super) fn encoded_len(&self) -> usize {
        if self.is_empty() { 0 } else { HEADER + self.cost }
    }

    /// `i_xattr_icount`: the header counts as one, what follows in units of four bytes.
    pub(super) fn count(&self) -> u16 {
        match self.encoded_len() {
            0 => 0,
            // MAX_XATTR_BYTES / 4 is a quarter of what 16 bits hold.
            len => u16::try_from((len - HEADER) / 4 + 1).unwrap_or(u16::MAX),
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        if self.is_empty() {
            return;
        }
        out.extend_from_slice(&[0; HEADER]);
        for (name, value) in self.iter() {
            let start = out.len();
            // `set` let in only what these conversions keep.
            let (index, rest) = split(name).unwrap_or((0, name));
            out.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
            out.push(index);
            out.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
            out.extend_from_slice(rest);
            out.extend_from_slice(value);
            out.resize(start + cost(name, value), 0);
        }
    }
}

/// The number of a name's prefix, and the rest of the name.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    let (prefix, index) = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix))?;
    let rest = &name[prefix.len()..];
    // The two ACLs are whole names, the others name spaces.
    (rest.is_empty() != prefix.ends_with(b".")).then_some((*index, rest))
}

/// Bytes of one entry, padded to four.
fn cost(name: &[u8], value: &[u8]) -> usize {
    let rest = split(name).map_or(name, |(_, rest)| rest);
    (ENTRY + rest.len() + value.len()).next_multiple_of(4)
}

const _: () = assert!((MAX_XATTR_BYTES + HEADER) / 4 < u16::MAX as usize && SLOT.is_multiple_of(4));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_known_name_spaces_are_refused() {
        let mut xattrs = Xattrs::default();
        assert!(!xattrs.set(b"system.nfs4_acl", b"x"));
        assert!(!xattrs.set(b"user.", b"x"));
        assert!(!xattrs.set(b"system.posix_acl_access2", b"x"));
        assert!(xattrs.set(b"system.posix_acl_access", b"x"));
        assert!(xattrs.set(b"security.capability", b"x"));
    }

    #[test]
    fn one_inode_carries_no_more_than_the_limit() {
        let mut xattrs = Xattrs::default();
        assert!(xattrs.set(b"user.a", &[1; 60_000]));
        assert!(!xattrs.set(b"user.b", &[1; 6_000]));
        assert!(xattrs.set(b"user.a", &[1; 65_000]), "a value takes the place of the old one");
        assert!(!xattrs.set(b"user.c", &[1; 65_536]));
    }

    #[test]
    fn the_sums_are_those_of_what_is_kept_however_often_it_is_set() {
        let mut xattrs = Xattrs::default();
        let mut refused = 0;
        for n in 0..100_000_u32 {
            let (name, value) = (format!("user.{}", n % 10_000), vec![1; n as usize / 10_000]);
            refused += usize::from(!xattrs.set(name.as_bytes(), &value));
            assert!(xattrs.encoded_len() <= HEADER + MAX_XATTR_BYTES);
        }
        assert!(refused > 10_000, "not all of them fit");
        let (mut bytes, mut out) = (0, Vec::new());
        xattrs.iter().for_each(|(name, value)| bytes += name.len() + value.len());
        xattrs.encode(&mut out);
        assert_eq!((xattrs.bytes(), xattrs.encoded_len()), (bytes, out.len()));
    }

    #[test]
    fn the_encoding_has_the_announced_length() {
        let mut xattrs = Xattrs::default();
        assert!(xattrs.set(b"user.abc", b"12345"));
        assert!(xattrs.set(b"security.capability", &[7; 20]));
        let mut out = Vec::new();
        xattrs.encode(&mut out);
        assert_eq!(out.len(), xattrs.encoded_len());
        assert_eq!(usize::from(xattrs.count()), (out.len() - 12) / 4 + 1);
        assert_eq!(out[12..16], [10, 6, 20, 0], "`capability` under `security.`, 20 bytes");
    }
}
