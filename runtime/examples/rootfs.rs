//! Turns an image into a root file system: `rootfs STORE IMAGE`, or `rootfs STORE DIR:DIR..` for
//! the lower directories of an overlay, topmost first, when they begin with `overlay=`.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use mvm_runtime::image::{Source, Stability, Store};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, image] = arguments.as_slice() else { return Err("usage: rootfs STORE IMAGE".into()) };
    let start = Instant::now();
    let source = match image.strip_prefix("overlay=") {
        Some(lower) => Source::overlay(lower.split(':').map(Into::into).collect(), Stability::Changing)?,
        None => Source::open(image)?,
    };
    let rootfs = Store::open(store)?.rootfs(&source, &mut ())?;
    let verb = if rootfs.built { "built" } else { "found" };
    println!("{verb} {} ({} bytes) in {:?}", rootfs.path.display(), rootfs.bytes, start.elapsed());
    Ok(())
}
