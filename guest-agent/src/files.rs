//! Files given to the guest and taken from it: volumes that are copied, and `cp`.
//!
//! Paths lead through trees that containers write to, so they are resolved by the kernel with the tree as
//! root, and the last part of one is never followed.

use std::{
    ffi::CString,
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use mvm_protocol::{
    Get, Got, GotContent, Place, Put, PutContent, PutEntry,
    limits::{MAX_PART, MAX_PUT_ENTRIES},
};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat, renameat},
    sys::{
        stat::{FchmodatFlags, Mode, SFlag, fchmod, fchmodat, fstat, mkdirat},
        uio::{pread, pwrite},
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat},
};

use crate::{
    containers::Containers,
    error::{Context, Error, Result},
    user::open_in_root,
};

/// What a file is called until it is whole, before its own name.
const UNFINISHED: &str = ".mvm-put-";

/// Deepest tree that is removed; each level holds a descriptor.
const MAX_DEPTH: usize = 128;

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY);

/// A directory and the name of something in it.
struct Spot {
    directory: OwnedFd,
    name: CString,
}

/// Makes all entries in order; stops at the first that cannot be made.
pub(crate) fn put(containers: &Containers, put: &Put) -> Result<()> {
    if put.entries.len() > MAX_PUT_ENTRIES {
        return Err(Error::Invalid("more files than are allowed in one request".into()));
    }
    put.entries.iter().try_for_each(|entry| {
        let spot = find(containers, &put.place, &entry.path, entry.content != PutContent::Remove)?;
        put_entry(&spot, entry).context(|| format!("cannot put {:?}", entry.path))
    })
}

/// Reads a part of what is at a path.
pub(crate) fn get(containers: &Containers, get: &Get) -> Result<Got> {
    let (tree, path) = tree(containers, &get.place, &get.path, false)?;
    let path = if path.is_empty() { "." } else { path.as_str() };
    read_at(tree.as_fd(), path, get.offset).context(|| format!("cannot read {:?}", get.path))
}

/// The directory a path is resolved in as if it were the root, and the path from there.
fn tree(containers: &Containers, place: &Place, path: &str, make: bool) -> Result<(OwnedFd, String)> {
    let bad = |part: &str| matches!(part, "" | "." | "..");
    if path.contains('\0') || (!path.is_empty() && path.split('/').any(bad)) {
        return Err(Error::Invalid(format!("{path:?} is no path below a place")));
    }
    let directory = match place {
        Place::Root(id) => {
            let directory = containers.root(id)?.directory.try_clone();
            return Ok((directory.context(|| "cannot open the root".into())?, path.to_owned()));
        }
        Place::Shared(name) => containers.storage.shared(name)?,
    };
    let (directory, path) = match (path, directory.parent(), directory.file_name()) {
        ("", Some(parent), Some(name)) => (parent.to_path_buf(), name.to_string_lossy().into_owned()),
        _ => (directory, path.to_owned()),
    };
    let what = || format!("cannot open {}", directory.display());
    if make {
        fs::create_dir_all(&directory).context(what)?;
    }
    let opened = nix::fcntl::open(&directory, DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).context(what)?;
    Ok((opened, path))
}

/// Where an entry goes; the directories above it are made if they are missing.
fn find(containers: &Containers, place: &Place, path: &str, make: bool) -> Result<Spot> {
    let (tree, path) = tree(containers, place, path, make)?;
    if path.is_empty() {
        return Err(Error::Invalid("a container's root cannot be put".into()));
    }
    spot(tree.as_fd(), &path, make).context(|| format!("cannot find {path:?}"))
}

fn spot(tree: BorrowedFd<'_>, path: &str, make: bool) -> nix::Result<Spot> {
    let (above, name) = path.rsplit_once('/').unwrap_or((".", path));
    let directory = match open_in_root(tree, above, DIRECTORY) {
        Err(Errno::ENOENT) if make => {
            let up = spot(tree, above, true)?;
            match mkdirat(&up.directory, up.name.as_c_str(), Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => open_in_root(tree, above, DIRECTORY)?,
                Err(errno) => return Err(errno),
            }
        }
        opened => opened?,
    };
    Ok(Spot { directory, name: CString::new(name).map_err(|_| Errno::EINVAL)? })
}

/// Which mount a descriptor is of.
fn mount_id(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).map_err(|_| Errno::EIO)?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    id.and_then(|id| id.trim().parse().ok()).ok_or(Errno::EIO)
}

/// Refuses to replace or remove what something is mounted on: from outside the container's mount name space
/// the kernel would let it happen, and take the mount away.
fn check_replaceable(directory: BorrowedFd<'_>, name: &CString) -> nix::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(directory, name.as_c_str(), flags, Mode::empty()) {
        Ok(there) if mount_id(there.as_fd())? != mount_id(directory)? => Err(Errno::EBUSY),
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn put_entry(spot: &Spot, entry: &PutEntry) -> nix::Result<()> {
    let mode = Mode::from_bits_truncate(entry.mode & 0o7777);
    let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    let Spot { directory, name } = spot;
    if entry.content != PutContent::Directory {
        check_replaceable(directory.as_fd(), name)?;
    }
    match &entry.content {
        PutContent::Directory => {
            match mkdirat(directory, name.as_c_str(), mode) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let made = openat(directory, name.as_c_str(), flags, Mode::empty())?;
            fchown(&made, uid, gid)?;
            fchmod(&made, mode)
        }
        PutContent::File { offset, bytes, last } => {
            let unfinished = spot.unfinished()?;
            write_part(directory.as_fd(), &unfinished, *offset, bytes)?;
            if !last {
                return Ok(());
            }
            fchownat(directory, unfinished.as_c_str(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            fchmodat(directory, unfinished.as_c_str(), mode, FchmodatFlags::FollowSymlink)?;
            renameat(directory, unfinished.as_c_str(), directory, name.as_c_str())
        }
        PutContent::Link(target) => {
            let unfinished = spot.unfinished()?;
            let _ = unlinkat(directory, unfinished.as_c_str(), UnlinkatFlags::NoRemoveDir);
            symlinkat(target.as_str(), directory, unfinished.as_c_str())?;
            fchownat(directory, unfinished.as_c_str(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            renameat(directory, unfinished.as_c_str(), directory, name.as_c_str())
        }
        PutContent::Remove => match remove(directory.as_fd(), name, 0) {
            Err(Errno::ENOENT) => Ok(()),
            other => other,
        },
    }
}

impl Spot {
    fn unfinished(&self) -> nix::Result<CString> {
        let bytes = [UNFINISHED.as_bytes(), self.name.as_bytes()].concat();
        CString::new(bytes).map_err(|_| Errno::EINVAL)
    }
}

/// Writes one part, which must follow those before it.
fn write_part(directory: BorrowedFd<'_>, name: &CString, offset: u64, bytes: &[u8]) -> nix::Result<()> {
    if bytes.len() > MAX_PART {
        return Err(Errno::E2BIG);
    }
    let mut flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    if offset == 0 {
        match unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => flags |= OFlag::O_CREAT | OFlag::O_EXCL,
            Err(errno) => return Err(errno),
        }
    }
    let file = openat(directory, name.as_c_str(), flags, Mode::from_bits_truncate(0o600))?;
    let found = fstat(&file)?;
    let follows = u64::try_from(found.st_size).is_ok_and(|size| size == offset);
    if found.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() || !follows {
        return Err(Errno::ESPIPE);
    }
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        let at = i64::try_from(offset.saturating_add(written as u64)).map_err(|_| Errno::EFBIG)?;
        written = written.saturating_add(pwrite(&file, rest, at)?);
    }
    Ok(())
}

/// Removes whatever a name means, without following it.
fn remove(directory: BorrowedFd<'_>, name: &CString, depth: usize) -> nix::Result<()> {
    match unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => {}
        other => return other,
    }
    if depth >= MAX_DEPTH {
        return Err(Errno::ELOOP);
    }
    check_replaceable(directory, name)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut inner = Dir::openat(directory, name.as_c_str(), flags, Mode::empty())?;
    let names: Vec<CString> = names_in(&mut inner).collect::<nix::Result<_>>()?;
    names.iter().try_for_each(|name| remove(inner.as_fd(), name, depth + 1))?;
    unlinkat(directory, name.as_c_str(), UnlinkatFlags::RemoveDir)
}

/// The names in a directory but its own and its parent's.
fn names_in(directory: &mut Dir) -> impl Iterator<Item = nix::Result<CString>> + '_ {
    directory.iter().filter_map(|entry| match entry {
        Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => None,
        Ok(entry) => Some(Ok(entry.file_name().to_owned())),
        Err(errno) => Some(Err(errno)),
    })
}

fn read_at(tree: BorrowedFd<'_>, path: &str, offset: u64) -> nix::Result<Got> {
    let found = open_in_root(tree, path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
    let stat = fstat(&found)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let content = match kind {
        SFlag::S_IFREG => GotContent::File(read_part(tree, path, offset)?),
        SFlag::S_IFDIR => GotContent::Directory(list_part(tree, path, offset)?),
        SFlag::S_IFLNK => {
            let target = readlinkat(&found, c"")?;
            GotContent::Link(target.to_string_lossy().into_owned())
        }
        _ => GotContent::Other,
    };
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(Got { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid, size, content })
}

fn read_part(tree: BorrowedFd<'_>, path: &str, offset: u64) -> nix::Result<Vec<u8>> {
    let file = open_in_root(tree, path, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK)?;
    if fstat(&file)?.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(Errno::EAGAIN);
    }
    let mut bytes = vec![0; MAX_PART];
    let at = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    let count = pread(&file, &mut bytes, at)?;
    bytes.truncate(count);
    Ok(bytes)
}

fn list_part(tree: BorrowedFd<'_>, path: &str, offset: u64) -> nix::Result<Vec<String>> {
    let directory = open_in_root(tree, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW)?;
    let mut directory = Dir::from_fd(directory)?;
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    let mut room = MAX_PART;
    names_in(&mut directory)
        .skip(skip)
        .map_while(|name| match name {
            Ok(name) => {
                room = room.checked_sub(name.as_bytes().len().saturating_add(1))?;
                Some(Ok(name.to_string_lossy().into_owned()))
            }
            Err(errno) => Some(Err(errno)),
        })
        .collect()
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
