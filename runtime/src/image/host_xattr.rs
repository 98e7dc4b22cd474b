//! Extended attributes of open files of the host.

// nix wraps no calls for extended attributes.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;

use super::error::printable;
use crate::erofs::{MAX_XATTR_BYTES, Xattrs};

/// Says that a directory of an overlay hides the one below it.
const OPAQUE: &CStr = c"trusted.overlay.opaque";
/// Says where in lower layers a directory that was renamed has its content.
const REDIRECT: &CStr = c"trusted.overlay.redirect";
/// Says that a file has its content in a lower layer.
const METACOPY: &CStr = c"trusted.overlay.metacopy";
/// What overlays note about their layers.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// Of that, what another overlay of the same layers needs. The rest holds for the host's file system alone.
const MEANT: [&[u8]; 4] = [
    OPAQUE.to_bytes(),
    REDIRECT.to_bytes(),
    METACOPY.to_bytes(),
    // A whiteout in a layer that lies on an overlay itself.
    b"trusted.overlay.whiteout",
];
/// Labels of the host's own policy.
const LABEL: &[u8] = b"security.selinux";

/// Whether an attribute is not copied.
fn is_dropped(name: &[u8], for_overlay: bool) -> bool {
    let note = name.starts_with(OVERLAY) && !(for_overlay && MEANT.contains(&name));
    note || name.starts_with(LABEL)
}

/// All attributes worth keeping of an open file: with `for_overlay`, for another overlay to understand.
pub(super) fn read(file: BorrowedFd<'_>, for_overlay: bool) -> io::Result<Xattrs> {
    let mut xattrs = Xattrs::default();
    let mut list = vec![0; MAX_XATTR_BYTES];
    let names = match list_into(file, &mut list) {
        // No attributes on this file system.
        Err(Errno::EOPNOTSUPP) => return Ok(xattrs),
        other => other?,
    };
    for name in list[..names].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        let bytes = name.to_bytes();
        if is_dropped(bytes, for_overlay) {
            continue;
        }
        let mut value = vec![0; MAX_XATTR_BYTES];
        let len = match value_into(file, name, &mut value) {
            // Removed since it was listed.
            Err(Errno::ENODATA) => continue,
            other => other?,
        };
        if !xattrs.set(bytes, &value[..len]) {
            log::debug!("extended attribute {} cannot be kept", printable(bytes));
        }
    }
    Ok(xattrs)
}

/// Whether an open directory of an overlay hides what is below it.
pub(super) fn is_opaque(directory: BorrowedFd<'_>) -> bool {
    let mut value = [0; 2];
    value_into(directory, OPAQUE, &mut value).is_ok_and(|len| value[..len.min(2)] == *b"y")
}

/// Whether an open file or directory of an overlay has its content under another name of a lower layer.
pub(super) fn is_elsewhere(file: BorrowedFd<'_>) -> bool {
    // A value too long for the buffer is a value.
    let there =
        |name| !matches!(value_into(file, name, &mut [0; 1]), Err(Errno::ENODATA | Errno::EOPNOTSUPP));
    there(REDIRECT) || there(METACOPY)
}

fn list_into(file: BorrowedFd<'_>, list: &mut [u8]) -> nix::Result<usize> {
    // SAFETY: the kernel writes at most `list.len()` bytes to `list`, which we hold exclusively.
    let len = unsafe { libc::flistxattr(file.as_raw_fd(), list.as_mut_ptr().cast(), list.len()) };
    Errno::result(len).map(isize::unsigned_abs)
}

fn value_into(file: BorrowedFd<'_>, name: &CStr, value: &mut [u8]) -> nix::Result<usize> {
    let (pointer, len) = (value.as_mut_ptr().cast(), value.len());
    // SAFETY: the kernel reads `name` up to its zero byte and writes at most `len` bytes to `value`,
    // which we hold exclusively.
    let len = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), pointer, len) };
    Errno::result(len).map(isize::unsigned_abs)
}
