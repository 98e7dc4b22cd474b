//! Where an image's documents and layers are: a directory, or a tar archive of one.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::digest::Digest;
use super::error::{Error, Result};
use super::layer::matches_digest;
use super::limits::{MAX_ARCHIVE_MEMBERS, MAX_JSON_BYTES, MAX_SYMLINKS};
use super::slice::FileSlice;
use super::tarball::{EntryKind, Tarball};

/// Files of an image, by path.
#[derive(Debug)]
pub(super) enum Blobs {
    Directory(PathBuf),
    Archive(HashMap<String, Member>),
}

/// A file in an archive.
#[derive(Debug)]
pub(super) enum Member {
    Body(FileSlice),
    /// `docker save` once wrote a layer that occurs twice as a link to the first.
    Link(String),
}

impl Blobs {
    /// Reads the headers of a tar archive, and remembers where its files are.
    pub(super) fn index(file: FileSlice) -> Result<Self> {
        let mut members = HashMap::new();
        let mut tarball = Tarball::new(file.clone());
        while let Some(entry) = tarball.next()? {
            let Some(path) = std::str::from_utf8(&entry.path).ok().and_then(clean) else { continue };
            let member = match entry.kind {
                EntryKind::File { size, .. } if size == tarball.body_len() => {
                    Member::Body(file.part(tarball.input().position(), size).ok_or_else(|| Error::Tar {
                        reason: "the archive ends in the middle of it".to_owned(),
                    })?)
                }
                EntryKind::HardLink(target) => Member::Link(String::from_utf8_lossy(&target).into_owned()),
                EntryKind::Symlink(target) => {
                    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                    Member::Link(format!("{parent}/{}", String::from_utf8_lossy(&target)))
                }
                _ => continue,
            };
            members.insert(path, member);
            if members.len() > MAX_ARCHIVE_MEMBERS {
                let limit = MAX_ARCHIVE_MEMBERS as u64;
                return Err(Error::Limit { what: "files of an image archive", limit });
            }
        }
        Ok(Self::Archive(members))
    }

    /// The file at `path`, which comes from us or was checked, if there is one.
    pub(super) fn open(&self, path: &str) -> Result<Option<FileSlice>> {
        match self {
            Self::Directory(directory) => open_if_there(&directory.join(path)),
            Self::Archive(members) => {
                let mut path = clean(path);
                for _ in 0..=MAX_SYMLINKS {
                    match path.as_ref().and_then(|path| members.get(path)) {
                        Some(Member::Body(slice)) => return Ok(Some(slice.clone())),
                        Some(Member::Link(target)) => path = clean(target),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }

    /// A JSON document without a digest of its own.
    pub(super) fn json<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let Some(slice) = self.open(path)? else { return Ok(None) };
        let bytes = read_document(slice, path)?;
        parse(&bytes, path).map(Some)
    }

    /// A JSON document found by its digest.
    pub(super) fn document<T: DeserializeOwned>(&self, what: &str, path: &str, digest: &Digest) -> Result<T> {
        let what = format!("{what} {digest}");
        let slice = self.open(path)?.ok_or_else(|| Error::MissingBlob { what: what.clone() })?;
        let bytes = read_document(slice, &what)?;
        let mut hasher = digest.hasher();
        hasher.update(&bytes);
        matches_digest(&what, hasher, digest)?;
        parse(&bytes, &what)
    }
}

fn open_if_there(path: &Path) -> Result<Option<FileSlice>> {
    match FileSlice::open(path) {
        Ok(slice) => Ok(Some(slice)),
        Err(Error::Open { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_document(slice: FileSlice, what: &str) -> Result<Vec<u8>> {
    if slice.len() > MAX_JSON_BYTES {
        return Err(Error::Limit { what: "bytes of a document of an image", limit: MAX_JSON_BYTES });
    }
    let mut bytes = Vec::new();
    slice
        .take(MAX_JSON_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|source| Error::Read { what: what.to_owned(), source })?;
    Ok(bytes)
}

pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| Error::Json { what: what.to_owned(), source })
}

/// A path as the index spells it: no `.`, no `..`, no slash in front. `None` if it leaves the archive.
fn clean(path: &str) -> Option<String> {
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop()?;
            }
            name => names.push(name),
        }
    }
    Some(names.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_spelled_one_way_and_stay_inside() {
        assert_eq!(clean("./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(clean("/a").as_deref(), Some("a"));
        assert_eq!(clean("a/../../b"), None);
    }
}
