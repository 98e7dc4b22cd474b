//! Trees of mounts as descriptors: copied in one place, attached in another.
#![allow(unsafe_code)] // open_tree, move_mount and mount_setattr have no form in nix or the C library

use std::{
    ffi::CStr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{Result, errno::Errno, fcntl::AT_FDCWD, mount::MsFlags};

/// linux/mount.h.
const OPEN_TREE_CLONE: i32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOVE_MOUNT_T_SYMLINKS: u32 = 0x10;

/// Attributes of a mount (`MOUNT_ATTR_*` of linux/mount.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
}

impl Attributes {
    /// No writes through this mount.
    pub(crate) const READ_ONLY: Self = Self { set: 1, clear: 0 };

    /// Those that flags of mount(2) ask for; all others stay what they are.
    pub(crate) fn of(flags: MsFlags) -> Self {
        const EACH: [(MsFlags, u64, u64); 8] = [
            (MsFlags::MS_RDONLY, 0x1, 0),
            (MsFlags::MS_NOSUID, 0x2, 0),
            (MsFlags::MS_NODEV, 0x4, 0),
            (MsFlags::MS_NOEXEC, 0x8, 0),
            // The three times are one field, which is cleared before it is set.
            (MsFlags::MS_RELATIME, 0, 0x70),
            (MsFlags::MS_NOATIME, 0x10, 0x70),
            (MsFlags::MS_STRICTATIME, 0x20, 0x70),
            (MsFlags::MS_NODIRATIME, 0x80, 0),
        ];
        let chosen = EACH.into_iter().filter(|(flag, ..)| flags.contains(*flag));
        let mut all = chosen.fold(Self::default(), |all, (_, set, clear)| Self {
            set: all.set | set,
            clear: all.clear | clear,
        });
        // MS_NOSYMFOLLOW, which nix does not name.
        if flags.bits() & 256 != 0 {
            all.set |= 0x20_0000;
        }
        all
    }
}

/// A copy of the tree of mounts at a path, attached nowhere. It must be of the caller's name space.
pub(crate) fn copy(path: &CStr, recursive: bool) -> Result<OwnedFd> {
    copy_at(AT_FDCWD, path, recursive)
}

/// A copy of the tree of mounts at a descriptor.
pub(crate) fn copy_from(at: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    copy_at(at, c"", recursive)
}

fn copy_at(at: impl AsFd, path: &CStr, recursive: bool) -> Result<OwnedFd> {
    let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_EMPTY_PATH | depth;
    let at = at.as_fd().as_raw_fd();
    // SAFETY: open_tree reads a path that ends in NUL.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_open_tree, at, path.as_ptr(), flags) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a copied tree at a path, whose links are followed.
pub(crate) fn attach(tree: BorrowedFd<'_>, target: &CStr) -> Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS;
    let (from, none) = (tree.as_raw_fd(), c"".as_ptr());
    let (at, target) = (libc::AT_FDCWD, target.as_ptr());
    // SAFETY: move_mount reads two paths that end in NUL.
    Errno::result(unsafe { libc::syscall(libc::SYS_move_mount, from, none, at, target, flags) }).map(drop)
}

/// Changes the attributes of the topmost mount of a tree.
pub(crate) fn change(tree: BorrowedFd<'_>, attributes: Attributes) -> Result<()> {
    if attributes == Attributes::default() {
        return Ok(());
    }
    // struct mount_attr: set, clear, propagation, user name space.
    let attr: [u64; 4] = [attributes.set, attributes.clear, 0, 0];
    let (tree, none, flags) = (tree.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH);
    let size = size_of_val(&attr);
    // SAFETY: mount_setattr reads a path that ends in NUL and `size` bytes of `attr`.
    Errno::result(unsafe { libc::syscall(libc::SYS_mount_setattr, tree, none, flags, attr.as_ptr(), size) })
        .map(drop)
}
