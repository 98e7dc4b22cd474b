//! Ways in for the fuzz targets: what is in a template, and what a host says of its processor.

use super::manifest::Manifest;
use super::{Key, processor};
use crate::snapshot::fuzzing::at_a_path;

/// A manifest.
pub fn manifest(bytes: &[u8]) -> bool {
    matches!(at_a_path(bytes, Manifest::read), Ok(Ok(_)))
}

/// A key.
pub fn key(text: &str) -> bool {
    Key::try_from(text.to_owned()).is_ok_and(|key| key.short().len() <= key.as_str().len())
}

/// `/proc/cpuinfo`.
pub fn cpuinfo(text: &str) -> bool {
    processor::describe(text).contains('/')
}
