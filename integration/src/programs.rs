//! What is under test, and a small image to run.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the programs under test are laid out as installed. Machines that tests start themselves come from there as
/// well: every part of mvm looks below `MVM_PREFIX` first.
///
/// # Panics
/// Nobody said where.
#[must_use]
pub fn programs() -> PathBuf {
    let prefix = std::env::var_os("MVM_PREFIX");
    prefix.map(PathBuf::from).expect("MVM_PREFIX names the programs: run tests by `make`")
}

/// Makes the layout of two images of busybox at `path`, where nothing is yet.
///
/// # Errors
/// The script cannot be run, or failed and has said why.
pub fn demo_image(path: &Path) -> io::Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/demo-image/build.sh");
    let status = Command::new(script).arg(path).stdout(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("cannot make the image")) }
}
