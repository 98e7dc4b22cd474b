//! Directories: blocks of sorted entries with their names behind them.

use super::format::BLOCK;

/// `struct erofs_dirent`: inode number, offset of the name, file type, reserved.
const ENTRY: usize = 12;

/// One name as it goes into a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Size of a directory with these names, in bytes: whole blocks, then what the last one needs.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut blocks, mut used) = (0, 0);
    for name in names {
        let need = ENTRY + name.len();
        if used + need > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += need;
    }
    blocks * BLOCK as u64 + used as u64
}

/// The names of a directory with `.` and `..`, which sort among them like any other: names that
/// come before dots are rare but real.
pub(super) fn with_dots<'a, T>(
    dot: T,
    dot_dot: T,
    names: impl Iterator<Item = (&'a [u8], T)>,
) -> impl Iterator<Item = (&'a [u8], T)> {
    let mut dots = [(b".".as_slice(), dot), (b"..", dot_dot)].into_iter().peekable();
    let mut names = names.peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some((dot, _)), Some((name, _))) if name < dot => names.next(),
        (Some(_), _) => dots.next(),
        (None, _) => names.next(),
    })
}

/// Calls `block` with each block of the directory; all but the last are padded to a whole block.
/// `names` come sorted, `.` and `..` among them.
pub(super) fn encode<'a, E>(
    names: impl Iterator<Item = Name<'a>>,
    mut block: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut pending: Vec<Name<'a>> = Vec::new();
    let mut used = 0;
    let mut bytes = Vec::with_capacity(BLOCK);
    for name in names {
        let need = ENTRY + name.name.len();
        if used + need > BLOCK {
            fill(&pending, &mut bytes);
            bytes.resize(BLOCK, 0);
            block(&bytes)?;
            pending.clear();
            used = 0;
        }
        used += need;
        pending.push(name);
    }
    fill(&pending, &mut bytes);
    block(&bytes)
}

fn fill(names: &[Name<'_>], bytes: &mut Vec<u8>) {
    bytes.clear();
    let mut offset = names.len() * ENTRY;
    for name in names {
        bytes.extend_from_slice(&name.nid.to_le_bytes());
        // Offsets stay below the block size.
        bytes.extend_from_slice(&u16::try_from(offset).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(&[name.file_type, 0]);
        offset += name.name.len();
    }
    for name in names {
        bytes.extend_from_slice(name.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(names: &[String]) -> Vec<Vec<u8>> {
        let names = names.iter().map(|name| Name { name: name.as_bytes(), nid: 1, file_type: 1 });
        let mut blocks = Vec::new();
        encode(names, |block| {
            blocks.push(block.to_vec());
            Ok::<_, ()>(())
        })
        .unwrap();
        blocks
    }

    #[test]
    fn the_size_is_what_is_encoded() {
        for count in [1, 2, 15, 16, 17, 100, 1000] {
            let names: Vec<String> = (0..count).map(|n| format!("{n:0>240}")).collect();
            let blocks = blocks(&names);
            let total: usize = blocks.iter().map(Vec::len).sum();
            assert_eq!(size(names.iter().map(String::as_bytes)), total as u64, "{count} names");
            assert!(blocks.iter().rev().skip(1).all(|block| block.len() == BLOCK));
        }
    }

    #[test]
    fn dots_sort_among_the_names() {
        let names = [b"!".as_slice(), b"-", b".a", b"a"].map(|name| (name, 1));
        let sorted: Vec<_> = with_dots(2, 3, names.into_iter()).collect();
        let expected: [(&[u8], u8); 6] = [(b"!", 1), (b"-", 1), (b".", 2), (b"..", 3), (b".a", 1), (b"a", 1)];
        assert_eq!(sorted, expected);
    }

    #[test]
    fn names_lie_behind_the_entries() {
        let blocks = blocks(&["a".to_owned(), "bc".to_owned()]);
        assert_eq!(blocks.len(), 1);
        assert_eq!(blocks[0][8..12], [24, 0, 1, 0]);
        assert_eq!(blocks[0][20..24], [25, 0, 1, 0]);
        assert_eq!(&blocks[0][24..], b"abc");
    }
}
