//! Container images become read-only root file systems.
//!
//! A [`Source`] is an image as it lies on the host: an OCI image layout, an archive of one, an
//! archive of `docker save`, or a plain directory. A [`Store`] turns it into an EROFS image, once:
//! layers are decompressed, checked and merged in one pass, without ever being unpacked onto the
//! host's file system, and what comes out is kept under a name made from the layers' digests.
//!
//! Images are strangers' files. Every number in them is bounded ([`limits`]), every digest is
//! checked, paths and links are followed inside the image only.

mod blobs;
mod config;
mod digest;
mod directory;
mod docker;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod host_xattr;
mod layer;
pub mod limits;
mod merge;
mod name;
mod oci;
mod packed;
mod pax;
mod progress;
#[cfg(feature = "pull")]
pub mod pull;
mod reference;
mod slice;
mod source;
mod sparse;
mod store;
mod stream;
mod tarball;

pub use config::ImageConfig;
pub use error::{Error, Result};
pub use name::full_name;
pub use progress::{Phase, Progress};
pub use source::{Format, Key, Source, Stability};
pub use store::{Cached, Image, Keep, Pruned, Removed, Rootfs, Store};
