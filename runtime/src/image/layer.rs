//! One layer, put on the tree in a single pass.

use std::io::Read as _;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, printable};
use super::merge::Merger;
use super::progress::Progress;
use super::slice::FileSlice;
use super::stream::{self, BUFFER, Unpacked};
use super::tarball::{Entry, EntryKind, Tarball};
use crate::erofs::{self, Kind, Meta, Node, Writer};

/// Names that begin like this are not files: they hide files of lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// Names that begin like this are notes of an old union file system.
const NOTE: &[u8] = b".wh..wh.";
/// Hides everything lower layers have in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A layer as an image names it.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) blob: FileSlice,
    /// Digest of the blob as it is stored; archives of `docker save` have none.
    pub(super) digest: Option<Digest>,
    /// Digest of the tar stream.
    pub(super) diff_id: Digest,
}

impl Layer {
    /// Puts the layer on the tree; bodies go to `writer`. Nothing of it may be used unless this
    /// succeeds: digests are known at the end only.
    pub(super) fn apply(
        &self,
        merger: &mut Merger,
        writer: &mut Writer,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let applied = stream::unpack(self, progress, |stream| {
            let mut tarball = Tarball::new(stream);
            while let Some(entry) = tarball.next()? {
                apply_entry(entry, &mut tarball, merger, writer)?;
            }
            Ok(())
        });
        match applied {
            // Nonsense may come from damage, which is the more helpful thing to say.
            Err(error @ (Error::Tar { .. } | Error::Read { .. })) => Err(self.damage().unwrap_or(error)),
            other => other,
        }
    }

    /// The difference between the stored blob and its digest, if there is one.
    fn damage(&self) -> Option<Error> {
        let digest = self.digest.as_ref()?;
        let mut hasher = digest.hasher();
        let mut blob = self.blob.clone();
        let mut buffer = vec![0; BUFFER];
        loop {
            let got = blob.read(&mut buffer).ok()?;
            if got == 0 {
                return matches_digest("the layer", hasher, digest).err();
            }
            hasher.update(buffer.get(..got)?);
        }
    }
}

fn apply_entry(
    entry: Entry,
    tarball: &mut Tarball<&mut Unpacked<'_>>,
    merger: &mut Merger,
    writer: &mut Writer,
) -> Result<()> {
    let Entry { path, meta, kind } = entry;
    let trimmed = path.strip_suffix(b"/").unwrap_or(&path);
    let (parent, name) = match trimmed.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => {
            (trimmed.get(..slash).unwrap_or_default(), trimmed.get(slash + 1..).unwrap_or_default())
        }
        None => (&b""[..], trimmed),
    };
    if name == OPAQUE {
        return merger.opaque(&path, parent);
    }
    if name.starts_with(NOTE) {
        return Ok(());
    }
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        return merger.whiteout(&path, parent, hidden);
    }
    let kind = match kind {
        EntryKind::HardLink(target) => return merger.hard_link(&path, &target),
        EntryKind::File { size, extents } => {
            merger.charge_data(size)?;
            Kind::File(writer.append_sparse(tarball, size, &extents).map_err(|error| body(error, &path))?)
        }
        EntryKind::Directory => return merger.insert(&path, Node::directory(meta)).map(drop),
        EntryKind::Symlink(target) => Kind::Symlink(target.into()),
        EntryKind::CharDevice { major, minor } => Kind::CharDevice { major, minor },
        EntryKind::BlockDevice { major, minor } => Kind::BlockDevice { major, minor },
        EntryKind::Fifo => Kind::Fifo,
    };
    let meta = if matches!(kind, Kind::Symlink(_)) { Meta { mode: 0o777, ..meta } } else { meta };
    merger.insert(&path, Node { meta, kind }).map(drop)
}

/// Failures of the layer are the layer's, not those of the image being written.
fn body(error: erofs::Error, path: &[u8]) -> Error {
    match error {
        erofs::Error::ReadBody { source, .. } => match source.downcast::<Error>() {
            Ok(error) => error,
            Err(source) => Error::Read { what: printable(path), source },
        },
        erofs::Error::ShortBody { .. } => {
            Error::Entry { path: printable(path), reason: "the layer ends in the middle of it" }
        }
        other => Error::Erofs(other),
    }
}

/// Ends a hash and holds it against what it should be.
pub(super) fn matches_digest(what: &str, hasher: Hasher, expected: &Digest) -> Result<()> {
    let found = hasher.finish();
    if found == *expected {
        return Ok(());
    }
    Err(Error::Digest { what: what.to_owned(), expected: expected.to_string(), found: found.to_string() })
}
