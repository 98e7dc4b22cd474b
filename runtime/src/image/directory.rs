//! Directories of the host as layers: a root directory, or the lower directories of an overlay.
//!
//! Everything is opened below the directory and without following a link (`openat2`), so that a
//! tree that changes meanwhile cannot lead elsewhere. Mount points are taken in empty, as a
//! container's root should not bring the host's /proc.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, major, minor};
use nix::unistd::{Whence, lseek};
use sha2::{Digest as _, Sha256};

use super::error::{Error, Result};
use super::host_xattr;
use super::limits::MAX_EXTENTS;
use super::merge::Merger;
use super::progress::Progress;
use crate::erofs::{self, Kind, Meta, Mtime, Node, NodeId, Writer};

/// Something in a directory of the host.
struct Found<'a> {
    /// Where it is, below the directory that is walked.
    path: &'a Path,
    directory: BorrowedFd<'a>,
    name: &'a CStr,
    stat: FileStat,
}

/// What is done with each thing found. A directory comes before what is in it.
trait Visitor {
    /// What a directory becomes.
    type Place: Copy;

    fn root(&mut self, directory: BorrowedFd<'_>, stat: &FileStat) -> Result<Self::Place>;

    /// Takes in one thing; its place if it is a directory to descend into.
    fn visit(&mut self, parent: Self::Place, found: &Found<'_>) -> Result<Option<Self::Place>>;
}

/// Hashes what `stat` tells about everything in a directory: if that is unchanged, so are the files.
pub(super) fn fingerprint(path: &Path) -> Result<[u8; 32]> {
    let mut fingerprint = Fingerprint(Sha256::new());
    walk(path, &mut fingerprint)?;
    Ok(fingerprint.0.finalize().into())
}

/// What the notes of an overlay in a directory, whiteouts among them, are taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notes {
    /// Files like any other; attributes are left out.
    Ignored,
    /// Orders: what is below is hidden.
    Obeyed,
    /// Notes for another overlay, which will obey them.
    Kept,
}

/// Hashes what tells a directory from any other that ever was at its path: that of a committed snapshot, in which
/// nothing changes any more.
pub(super) fn identity(path: &Path) -> Result<[u8; 32]> {
    let open = |source| Error::Open { path: path.to_owned(), source };
    let metadata = path.metadata().map_err(open)?;
    let mut hash = Sha256::new();
    hash.update(path.as_os_str().as_bytes());
    for number in [metadata.dev(), metadata.ino()] {
        hash.update(number.to_le_bytes());
    }
    for number in [metadata.ctime(), metadata.ctime_nsec()] {
        hash.update(number.to_le_bytes());
    }
    // Where the directory is the mount of an image, mounts of other images may look the same.
    let image = path.parent().and_then(|parent| parent.join("layer.erofs").metadata().ok());
    if let Some(image) = image {
        hash.update(image.ino().to_le_bytes());
        hash.update(image.ctime_nsec().to_le_bytes());
    }
    Ok(hash.finalize().into())
}

/// Puts a directory on the tree as one layer.
pub(super) fn take_in(
    path: &Path,
    notes: Notes,
    merger: &mut Merger,
    writer: &mut Writer,
    progress: &mut dyn Progress,
) -> Result<()> {
    walk(path, &mut Intake { notes, merger, writer, progress, links: HashMap::new() })
}

fn walk<V: Visitor>(top: &Path, visitor: &mut V) -> Result<()> {
    let fail = |below: &Path| {
        let path = top.join(below);
        move |errno: Errno| Error::Open { path, source: errno.into() }
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(top, flags, Mode::empty()).map_err(fail(Path::new("")))?;
    let stat = fstat(&root).map_err(fail(Path::new("")))?;
    let place = visitor.root(root.as_fd(), &stat)?;
    let mut pending = vec![(PathBuf::new(), place)];
    while let Some((below, place)) = pending.pop() {
        let Some(directory) = open_directory(&root, &below).map_err(fail(&below))? else { continue };
        for name in names(&directory).map_err(fail(&below))? {
            let path = below.join(OsStr::from_bytes(name.to_bytes()));
            let stat = match fstatat(&directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                // Gone since it was listed.
                Err(Errno::ENOENT) => continue,
                other => other.map_err(fail(&path))?,
            };
            let found = Found { path: &path, directory: directory.as_fd(), name: &name, stat };
            let taken = visitor.visit(place, &found);
            if let Some(place) = taken.map_err(|source| host_file(top.join(&path), source))? {
                pending.push((path, place));
            }
        }
    }
    Ok(())
}

fn host_file(path: PathBuf, source: Error) -> Error {
    Error::HostFile { path, source: Box::new(source) }
}

/// Opens a directory below `root`; `None` if something is mounted there.
fn open_directory(root: &OwnedFd, below: &Path) -> nix::Result<Option<OwnedFd>> {
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_XDEV,
    );
    match openat2(root, below, how) {
        Err(Errno::EXDEV) => Ok(None),
        other => other.map(Some),
    }
}

/// The names in a directory, sorted: the order on disk is nobody's business.
fn names(directory: &OwnedFd) -> nix::Result<Vec<CString>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut names = Vec::new();
    for entry in Dir::openat(directory, ".", flags, Mode::empty())?.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

struct Fingerprint(Sha256);

impl Fingerprint {
    fn stat(&mut self, stat: &FileStat) {
        for number in [stat.st_dev, stat.st_ino, stat.st_nlink, stat.st_rdev] {
            self.0.update(number.to_le_bytes());
        }
        for number in [stat.st_mode, stat.st_uid, stat.st_gid] {
            self.0.update(number.to_le_bytes());
        }
        // The change time cannot be set back by the file's owner.
        for number in [stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec] {
            self.0.update(number.to_le_bytes());
        }
    }
}

impl Visitor for Fingerprint {
    type Place = ();

    fn root(&mut self, _: BorrowedFd<'_>, stat: &FileStat) -> Result<()> {
        self.stat(stat);
        Ok(())
    }

    fn visit(&mut self, (): (), found: &Found<'_>) -> Result<Option<()>> {
        // A path ends with its zero byte, so that no two lists of paths hash alike.
        self.0.update(found.path.as_os_str().as_bytes());
        self.0.update([0]);
        self.stat(&found.stat);
        Ok((file_type(&found.stat) == SFlag::S_IFDIR).then_some(()))
    }
}

/// Puts what is found on the tree.
struct Intake<'a> {
    notes: Notes,
    merger: &'a mut Merger,
    writer: &'a mut Writer,
    progress: &'a mut dyn Progress,
    /// Files with several names, by device and inode.
    links: HashMap<(u64, u64), NodeId>,
}

impl Visitor for Intake<'_> {
    type Place = NodeId;

    fn root(&mut self, directory: BorrowedFd<'_>, stat: &FileStat) -> Result<NodeId> {
        let meta = self.meta(stat, Some(directory))?;
        self.merger.set_root(b"/", Node::directory(meta))
    }

    fn visit(&mut self, parent: NodeId, found: &Found<'_>) -> Result<Option<NodeId>> {
        let (name, stat) = (found.name.to_bytes(), &found.stat);
        let (major, minor) = (major(stat.st_rdev) as u32, minor(stat.st_rdev) as u32);
        let kind = match file_type(stat) {
            SFlag::S_IFDIR => return self.directory(parent, found).map(Some),
            SFlag::S_IFREG => return self.file(parent, found).map(|()| None),
            SFlag::S_IFCHR if self.notes == Notes::Obeyed && (major, minor) == (0, 0) => {
                self.merger.hide(parent, name);
                return Ok(None);
            }
            SFlag::S_IFLNK => Kind::Symlink(readlink(found)?.into()),
            SFlag::S_IFCHR => Kind::CharDevice { major, minor },
            SFlag::S_IFBLK => Kind::BlockDevice { major, minor },
            SFlag::S_IFIFO => Kind::Fifo,
            _ => Kind::Socket,
        };
        self.merger.put(parent, name, Node { meta: self.meta(stat, None)?, kind })?;
        Ok(None)
    }
}

impl Intake<'_> {
    fn directory(&mut self, parent: NodeId, found: &Found<'_>) -> Result<NodeId> {
        let file = open(found, OFlag::O_DIRECTORY)?;
        let node = Node::directory(self.meta(&found.stat, Some(file.as_fd()))?);
        let id = self.merger.put(parent, found.name.to_bytes(), node)?;
        if self.notes == Notes::Obeyed && host_xattr::is_opaque(file.as_fd()) {
            self.merger.clear(id);
        }
        Ok(id)
    }

    fn file(&mut self, parent: NodeId, found: &Found<'_>) -> Result<()> {
        let (name, inode) = (found.name.to_bytes(), (found.stat.st_dev, found.stat.st_ino));
        if let Some(known) = self.links.get(&inode) {
            return self.merger.link(parent, name, *known);
        }
        let file = open(found, OFlag::O_NONBLOCK)?;
        let stat = fstat(&file).map_err(|errno| read(errno.into()))?;
        if file_type(&stat) != SFlag::S_IFREG || (stat.st_dev, stat.st_ino) != inode {
            return Err(read(io::Error::other("it was replaced while it was read")));
        }
        let size = u64::try_from(stat.st_size).map_err(|_| read(io::ErrorKind::InvalidData.into()))?;
        self.merger.charge_data(size)?;
        let node_meta = self.meta(&stat, Some(file.as_fd()))?;
        let extents = extents(&file, &stat, size).map_err(|errno| read(errno.into()))?;
        let mut body = Body { file: &file, extents: extents.clone().into_iter(), current: 0..0 };
        let content = self.writer.append_sparse(&mut body, size, &extents).map_err(body_error)?;
        let id = self.merger.put(parent, name, Node { meta: node_meta, kind: Kind::File(content) })?;
        if stat.st_nlink > 1 {
            self.links.insert(inode, id);
        }
        self.progress.advance(size);
        Ok(())
    }

    fn meta(&self, stat: &FileStat, open: Option<BorrowedFd<'_>>) -> Result<Meta> {
        if self.notes == Notes::Obeyed && open.is_some_and(host_xattr::is_elsewhere) {
            return Err(read(io::Error::other(
                "its content lies elsewhere in the overlay (redirect, metacopy)",
            )));
        }
        let xattrs = open.map(|file| host_xattr::read(file, self.notes == Notes::Kept)).transpose();
        Ok(Meta {
            // Twelve bits are left.
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Mtime {
                seconds: stat.st_mtime,
                nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
            },
            xattrs: xattrs.map_err(read)?.unwrap_or_default(),
        })
    }
}

fn open(found: &Found<'_>, flags: OFlag) -> Result<File> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let fd = openat(found.directory, found.name, flags, Mode::empty()).map_err(|errno| read(errno.into()))?;
    Ok(fd.into())
}

fn readlink(found: &Found<'_>) -> Result<Vec<u8>> {
    let target = readlinkat(found.directory, found.name).map_err(|errno| read(errno.into()))?;
    Ok(target.as_bytes().to_vec())
}

fn read(source: io::Error) -> Error {
    Error::Read { what: "it".to_owned(), source }
}

fn body_error(error: erofs::Error) -> Error {
    match error {
        erofs::Error::ReadBody { source, .. } => read(source),
        erofs::Error::ShortBody { .. } => read(io::Error::other("it became shorter while it was read")),
        other => Error::Erofs(other),
    }
}

/// The parts of a file that are not holes.
fn extents(file: &File, stat: &FileStat, size: u64) -> nix::Result<Vec<Range<u64>>> {
    let whole = || std::iter::once(0..size).collect();
    if stat.st_blocks.saturating_mul(512) >= stat.st_size {
        return Ok(whole());
    }
    let (mut extents, mut at): (Vec<Range<u64>>, i64) = (Vec::new(), 0);
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            // No data from here on.
            Err(Errno::ENXIO) => return Ok(extents),
            // A file system that knows no holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(whole()),
            Err(errno) => return Err(errno),
        };
        let end = lseek(file, start, Whence::SeekHole)?;
        let clamp = |offset: i64| u64::try_from(offset).unwrap_or_default().min(size);
        if extents.len() == MAX_EXTENTS {
            return Ok(whole());
        }
        extents.push(clamp(start)..clamp(end));
        at = end;
    }
}

/// Reads the extents of a file, one after the other.
struct Body<'a> {
    file: &'a File,
    extents: std::vec::IntoIter<Range<u64>>,
    current: Range<u64>,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.extents.next() {
                Some(next) => self.current = next,
                None => return Ok(0),
            }
        }
        let left = usize::try_from(self.current.end - self.current.start).unwrap_or(usize::MAX);
        let want = left.min(buffer.len());
        let got = self.file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.current.start)?;
        self.current.start += got as u64;
        Ok(got)
    }
}
