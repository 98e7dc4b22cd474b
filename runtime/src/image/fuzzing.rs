//! Ways in for the fuzz targets: images and their parts, as somebody else made them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};
use sha2::{Digest as _, Sha256};

use super::blobs::{Blobs, Member};
use super::digest::Digest;
use super::error::Result;
use super::layer::Layer;
use super::merge::Merger;
use super::oci::Resolved;
use super::pax::Extensions;
use super::progress::Progress;
use super::reference::{Choice, Wanted};
use super::slice::FileSlice;
use super::tarball::RECORD;
use super::{docker, oci, packed, sparse};
use crate::erofs::{BLOCK_SIZE, Writer};
use crate::hex::hex;

struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _: super::Phase, _: Option<u64>) {}
    fn advance(&mut self, _: u64) {}
}

fn file(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

fn slice(bytes: &[u8]) -> Option<FileSlice> {
    FileSlice::new(file(bytes).ok()?).ok()
}

/// `sha256:` and the digest of these bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Unpacks layers and writes the image.
///
/// # Panics
/// What was written is not as long as it says.
fn write(layers: &[Layer]) -> Result<()> {
    let empty =
        || file(&[]).map_err(|source| super::Error::Read { what: "a file in memory".to_owned(), source });
    let (mut merger, mut writer) = (Merger::new(), Writer::new(empty()?, empty()?));
    for layer in layers {
        merger.next_layer();
        layer.apply(&mut merger, &mut writer, &mut Silent)?;
    }
    let written = writer.finish(&merger.into_tree(), [7; 16])?;
    let bytes = written.file.metadata().map_or(0, |it| it.len());
    assert_eq!(bytes, u64::from(written.superblock.blocks) * BLOCK_SIZE, "{:?}", written.superblock);
    Ok(())
}

/// One layer, packed or not; if not, its digest is right.
pub fn layer(bytes: &[u8]) -> bool {
    let (Some(blob), Ok(diff_id)) = (slice(bytes), digest(bytes).parse::<Digest>()) else { return false };
    write(&[Layer { blob, digest: None, diff_id }]).is_ok()
}

fn unpacked(resolved: Result<Resolved>) -> (bool, bool) {
    let Ok(resolved) = resolved else { return (false, false) };
    let _ = (&resolved.name, &resolved.digest, &resolved.config);
    (true, write(&resolved.layers).is_ok())
}

/// An archive, packed or not: whether there is an image in it, and whether it can be unpacked.
pub fn archive(bytes: &[u8]) -> (bool, bool) {
    let path = Path::new("archive");
    let unpack = |slice| packed::unpack(slice, path).and_then(Blobs::index);
    let Some(Ok(blobs)) = slice(bytes).map(unpack) else { return (false, false) };
    let choice = Choice { path, wanted: None };
    let found = match blobs.open("index.json") {
        Ok(Some(_)) => oci::resolve(&blobs, None, &choice),
        _ => docker::resolve(&blobs, None, &choice),
    };
    unpacked(found)
}

/// A layout of these files, by path: whether there is an image in it, and whether it can be unpacked.
pub fn layout(files: &[(&str, &[u8])]) -> (bool, bool) {
    let members: Option<HashMap<_, _>> =
        files.iter().map(|(path, bytes)| Some(((*path).to_owned(), Member::Body(slice(bytes)?)))).collect();
    let Some(blobs) = members.map(Blobs::Archive) else { return (false, false) };
    unpacked(oci::resolve(&blobs, None, &Choice { path: Path::new("layout"), wanted: None }))
}

/// The body of an extended header.
pub fn pax(bytes: &[u8]) -> bool {
    let mut extensions = Extensions::default();
    extensions.parse(bytes).is_ok()
}

/// The map of a sparse file: in an old header, or in an extended one, and what follows it.
pub fn sparse_map(bytes: &[u8]) -> (bool, bool) {
    let mut records = bytes.chunks_exact(RECORD).map(|record| record.try_into().unwrap_or([0; RECORD]));
    let none = || super::tarball::bad("no more");
    let header = tar::Header::from_byte_slice(&records.next().unwrap_or([0; RECORD])).clone();
    let old = sparse::gnu_map(&header, || records.next().ok_or_else(none));
    let mut extensions = Extensions::default();
    let (head, rest) = bytes.split_at(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    let mut records = rest.chunks_exact(RECORD).map(|record| record.try_into().unwrap_or([0; RECORD]));
    let new = extensions
        .parse(head)
        .and_then(|()| sparse::pax_map(&extensions.sparse, || records.next().ok_or_else(none)));
    for map in [&old, &new].into_iter().flatten().flatten() {
        assert!(map.stored() <= map.size, "{map:?}");
    }
    (matches!(old, Ok(Some(_))), matches!(new, Ok(Some(_))))
}

/// Names of images, digests, and what is wanted of several.
pub fn reference(text: &str) -> (bool, bool) {
    let name = super::full_name(text);
    if let Ok(name) = &name {
        assert_eq!(super::full_name(name).ok().as_ref(), Some(name), "a full name is its own");
    }
    let digest = text.parse::<Digest>();
    if let Ok(digest) = &digest {
        assert_eq!(digest.to_string(), text);
        assert!(!digest.blob_path().contains(".."));
    }
    for wanted in [Wanted::Name(text.to_owned()), Wanted::Digest(text.to_owned())] {
        let _ = wanted.fits(&["docker.io/library/busybox:latest", text], text);
    }
    (name.is_ok(), digest.is_ok())
}
