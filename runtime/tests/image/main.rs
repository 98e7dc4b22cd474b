//! Images of every format, well-formed and hostile, through the store to the file system.

#![allow(missing_docs, clippy::print_stderr)]

mod directories;
mod formats;
mod hostile;
mod names;
mod store;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mvm_runtime::image::{Error, Rootfs, Source, Store};
use support::erofs_reader::{Seen, list};
use support::images::{Layer, layout};

type Listing = BTreeMap<Vec<u8>, Seen>;

/// Builds the image and reads it back.
fn build(dir: &Path, source: &Source) -> Result<(Rootfs, Listing), Error> {
    let rootfs = Store::open(dir.join("store")).unwrap().rootfs(source, &mut ())?;
    let listing = list(&fs::read(&rootfs.path).unwrap());
    Ok((rootfs, listing))
}

/// The file system of one image made of these layers.
fn unpack(layers: Vec<Vec<u8>>) -> Result<Listing, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = layout(&dir.path().join("image"), layers);
    let result = build(dir.path(), &Source::open(path)?).map(|(_, listing)| listing);
    if result.is_err() {
        let left: Vec<_> =
            fs::read_dir(dir.path().join("store")).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.iter().all(|path| path.extension().unwrap() == "lock"), "left behind: {left:?}");
    }
    result
}

fn paths(listing: &Listing) -> Vec<String> {
    listing.keys().map(|path| path.escape_ascii().to_string()).collect()
}

fn refusal(layers: Vec<Vec<u8>>) -> String {
    let mut error: &dyn std::error::Error = &unpack(layers).unwrap_err();
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn demo() -> Vec<Vec<u8>> {
    let base = Layer::new()
        .directory("bin/")
        .file("bin/busybox", &[7; 10_000])
        .hard_link("bin/sh", "bin/busybox")
        .symlink("sbin", "bin")
        .directory("etc/")
        .file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")
        .file("etc/old", b"old")
        .directory("var/cache/")
        .file("var/cache/low", b"low");
    let top = Layer::new()
        .file("etc/.wh.old", b"")
        .file("var/cache/.wh..wh..opq", b"")
        .file("var/cache/new", b"new")
        .file("sbin/init", b"#!/bin/sh\n");
    vec![base.bytes(), top.bytes()]
}

const DEMO_PATHS: [&str; 11] = [
    "",
    "bin",
    "bin/busybox",
    "bin/init",
    "bin/sh",
    "etc",
    "etc/passwd",
    "sbin",
    "var",
    "var/cache",
    "var/cache/new",
];
