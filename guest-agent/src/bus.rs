//! PCI functions that are about to be unplugged.

use std::{fs, io::Write, path::Path};

use crate::error::{Context, Error, Result};

/// Takes the PCI function off the bus that carries the virtio device which the link `device` in sysfs leads to.
pub(crate) fn remove(device: &Path, failed: impl Fn() -> String) -> Result<()> {
    // The device's parent is the function.
    let device = fs::canonicalize(device).context(&failed)?;
    let function = device.parent().ok_or_else(|| Error::NotFound(failed()))?;
    let mut file = fs::File::options().write(true).open(function.join("remove")).context(&failed)?;
    file.write_all(b"1").context(failed)
}
