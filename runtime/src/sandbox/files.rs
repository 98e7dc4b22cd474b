//! Files of the host that are copied into the guest: read within bounds, compared, cut into messages.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mvm_protocol::limits::MAX_PART;
use mvm_protocol::{Place, Put, PutContent, PutEntry};

/// Most bytes of files that are copied for one mount.
pub(super) const MAX_BYTES: u64 = 1 << 20;
/// Most files, directories and links that are copied for one mount.
const MAX_ENTRIES: usize = 1024;
/// Entries of one message beside its bytes.
const MAX_BATCH: usize = 256;

/// A file, or a directory with all in it, as it was when it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tree(Vec<PutEntry>);

/// Why a tree is not copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotCopied {
    /// It is larger than what is copied.
    #[error("it holds more than {MAX_BYTES} bytes or {MAX_ENTRIES} files")]
    TooLarge,
    /// It holds something that is neither file, directory nor link.
    #[error("{0:?} in it is neither a file nor a directory")]
    Odd(String),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Tree {
    /// Reads what is at `source`, following it if it is a link itself.
    pub(super) fn read(source: &Path) -> Result<Self, NotCopied> {
        let mut reading = Reading { entries: Vec::new(), left: MAX_BYTES };
        reading.add(source, "", &fs::metadata(source)?)?;
        Ok(Self(reading.entries))
    }

    /// What makes `self` of `old`: what is new or has changed, parents first, then what is gone, children first.
    pub(super) fn changes_since(&self, old: &Self) -> Vec<PutEntry> {
        let mut changes: Vec<_> = self.0.iter().filter(|entry| !old.0.contains(entry)).cloned().collect();
        let gone = old.0.iter().rev().filter(|entry| !self.0.iter().any(|new| new.path == entry.path));
        changes.extend(gone.map(|entry| PutEntry { content: PutContent::Remove, ..entry.clone() }));
        changes
    }

    /// The bytes of what is one file.
    pub(super) fn file(&self) -> Option<&[u8]> {
        match self.0.as_slice() {
            [PutEntry { content: PutContent::File { bytes, .. }, .. }] => Some(bytes),
            _ => None,
        }
    }

    /// What is one file has these bytes now.
    pub(super) fn set_file(&mut self, new: Vec<u8>) {
        if let [PutEntry { content: PutContent::File { bytes, .. }, .. }] = self.0.as_mut_slice() {
            *bytes = new;
        }
    }

    /// All of it.
    pub(super) fn entries(&self) -> Vec<PutEntry> {
        self.0.clone()
    }
}

struct Reading {
    entries: Vec<PutEntry>,
    left: u64,
}

impl Reading {
    fn add(&mut self, at: &Path, path: &str, facts: &Metadata) -> Result<(), NotCopied> {
        if self.entries.len() >= MAX_ENTRIES {
            return Err(NotCopied::TooLarge);
        }
        let odd = || NotCopied::Odd(at.display().to_string());
        let content = if facts.is_dir() {
            PutContent::Directory
        } else if facts.is_symlink() {
            PutContent::Link(fs::read_link(at)?.to_str().ok_or_else(odd)?.to_owned())
        } else if facts.is_file() {
            PutContent::File { offset: 0, bytes: self.bytes(at)?, last: true }
        } else {
            return Err(odd());
        };
        let directory = content == PutContent::Directory;
        self.entries.push(PutEntry {
            path: path.to_owned(),
            mode: facts.mode() & 0o7777,
            uid: facts.uid(),
            gid: facts.gid(),
            content,
        });
        if directory { self.children(at, path) } else { Ok(()) }
    }

    fn children(&mut self, at: &Path, path: &str) -> Result<(), NotCopied> {
        let mut names = Vec::new();
        for entry in fs::read_dir(at)? {
            let name = entry?.file_name();
            names.push(name.into_string().map_err(|_| NotCopied::Odd(at.display().to_string()))?);
            if names.len() > MAX_ENTRIES {
                return Err(NotCopied::TooLarge);
            }
        }
        names.sort();
        for name in names {
            let child = at.join(&name);
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            self.add(&child, &path, &fs::symlink_metadata(&child)?)?;
        }
        Ok(())
    }

    /// The bytes of a file, if there is room for them; it may grow while it is read.
    fn bytes(&mut self, at: &Path) -> Result<Vec<u8>, NotCopied> {
        let mut bytes = Vec::new();
        File::open(at)?.take(self.left.saturating_add(1)).read_to_end(&mut bytes)?;
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.left = self.left.checked_sub(length).ok_or(NotCopied::TooLarge)?;
        Ok(bytes)
    }
}

/// Cuts entries into messages of a size that a frame holds.
pub(super) fn messages(name: &str, entries: Vec<PutEntry>) -> Vec<Put> {
    let mut batches: Vec<Vec<PutEntry>> = vec![Vec::new()];
    let mut room = MAX_PART;
    for entry in entries.into_iter().flat_map(parts) {
        let size = match &entry.content {
            PutContent::File { bytes, .. } => bytes.len(),
            _ => 0,
        };
        let full = batches.last().is_none_or(|batch| batch.len() >= MAX_BATCH);
        if full || size > room {
            batches.push(Vec::new());
            room = MAX_PART;
        }
        room = room.saturating_sub(size);
        if let Some(batch) = batches.last_mut() {
            batch.push(entry);
        }
    }
    batches.retain(|batch| !batch.is_empty());
    batches.into_iter().map(|entries| Put { place: Place::Shared(name.to_owned()), entries }).collect()
}

/// An entry, a file that is too large for one message in several.
fn parts(entry: PutEntry) -> Vec<PutEntry> {
    let PutContent::File { bytes, .. } = &entry.content else { return vec![entry] };
    if bytes.len() <= MAX_PART {
        return vec![entry];
    }
    let count = bytes.len().div_ceil(MAX_PART);
    let part = |(at, chunk): (usize, &[u8])| PutEntry {
        content: PutContent::File {
            offset: u64::try_from(at.saturating_mul(MAX_PART)).unwrap_or(u64::MAX),
            bytes: chunk.to_vec(),
            last: at.saturating_add(1) == count,
        },
        ..entry.clone()
    };
    bytes.chunks(MAX_PART).enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn paths(entries: &[PutEntry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.path.as_str()).collect()
    }

    #[test]
    fn a_directory_is_read_with_its_links_and_modes_parents_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..now")).unwrap();
        fs::write(dir.path().join("..now/key"), "secret").unwrap();
        fs::set_permissions(dir.path().join("..now/key"), fs::Permissions::from_mode(0o440)).unwrap();
        symlink("..now", dir.path().join("..data")).unwrap();
        symlink("..data/key", dir.path().join("key")).unwrap();
        let tree = Tree::read(dir.path()).unwrap();
        assert_eq!(paths(&tree.0), ["", "..data", "..now", "..now/key", "key"]);
        assert_eq!(tree.0[1].content, PutContent::Link("..now".into()));
        assert_eq!(tree.0[3].mode, 0o440);
        assert_eq!(tree.0[3].content, PutContent::File { offset: 0, bytes: b"secret".to_vec(), last: true });
    }

    #[test]
    fn a_link_that_is_mounted_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let tree = Tree::read(&dir.path().join("link")).unwrap();
        assert_eq!(paths(&tree.0), [""]);
        assert!(matches!(tree.0[0].content, PutContent::File { .. }));
    }

    #[test]
    fn what_is_too_large_or_odd_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![0; 1 << 20]).unwrap();
        assert!(Tree::read(dir.path()).is_ok());
        fs::write(dir.path().join("b"), "x").unwrap();
        assert!(matches!(Tree::read(dir.path()), Err(NotCopied::TooLarge)));
        let odd = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(odd.path().join("s")).unwrap();
        assert!(matches!(Tree::read(odd.path()), Err(NotCopied::Odd(_))));
        let many = tempfile::tempdir().unwrap();
        (0..1024).for_each(|n| fs::write(many.path().join(n.to_string()), "").unwrap());
        assert!(matches!(Tree::read(many.path()), Err(NotCopied::TooLarge)));
        assert!(matches!(Tree::read(Path::new("/no/such")), Err(NotCopied::Io(_))));
    }

    #[test]
    fn changes_are_what_is_new_then_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("old")).unwrap();
        fs::write(dir.path().join("old/x"), "1").unwrap();
        fs::write(dir.path().join("same"), "1").unwrap();
        let before = Tree::read(dir.path()).unwrap();
        assert_eq!(before.changes_since(&before), []);
        fs::remove_dir_all(dir.path().join("old")).unwrap();
        fs::write(dir.path().join("new"), "2").unwrap();
        let changes = Tree::read(dir.path()).unwrap().changes_since(&before);
        assert_eq!(paths(&changes), ["new", "old/x", "old"]);
        assert_eq!(changes[1].content, PutContent::Remove);
    }

    #[test]
    fn messages_hold_no_more_than_a_frame_and_all_of_it_in_order() {
        let file = |path: &str, length: usize| PutEntry {
            path: path.into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            content: PutContent::File { offset: 0, bytes: vec![7; length], last: true },
        };
        let puts = messages("v", vec![file("a", 10), file("b", MAX_PART + 1), file("c", MAX_PART - 1)]);
        let mut seen = Vec::new();
        for put in &puts {
            assert_eq!(put.place, Place::Shared("v".into()));
            let request = mvm_protocol::HostMessage::Request {
                id: 1,
                request: mvm_protocol::Request::Put(put.clone()),
            };
            assert!(mvm_protocol::encode(&request).is_ok());
            for entry in &put.entries {
                let PutContent::File { offset, bytes, last } = &entry.content else { panic!("no file") };
                seen.push((entry.path.clone(), *offset, bytes.len(), *last));
            }
        }
        let part = u64::try_from(MAX_PART).unwrap();
        let expected = [
            ("a", 0, 10, true),
            ("b", 0, MAX_PART, false),
            ("b", part, 1, true),
            ("c", 0, MAX_PART - 1, true),
        ];
        assert_eq!(
            seen,
            expected.map(|(path, offset, length, last)| (path.to_owned(), offset, length, last))
        );
    }
}
