//! Where a disk's bytes live: the interface the device works with, and a raw file or block device behind it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};

use super::request::SECTOR;
use crate::chain::Cursor;
use crate::sys;
use crate::virtio::BuildError;

/// Zeroes, for file systems that leave writing them to us.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A disk's bytes. The caller has checked that all ranges are whole sectors inside the disk.
pub(crate) trait Disk: Send {
    /// Fills `to` from `offset` on; an error if the disk has less.
    fn read(&mut self, to: &mut Cursor<'_>, offset: u64) -> io::Result<()>;
    /// Writes all of `from` at `offset`.
    fn write(&mut self, from: &mut Cursor<'_>, offset: u64) -> io::Result<()>;
    /// Returns once everything written before is on stable storage.
    fn sync(&mut self) -> io::Result<()>;
    /// Makes a range read as zeroes; may give its storage back if `unmap`.
    fn zero(&mut self, range: &Range<u64>, unmap: bool) -> io::Result<()>;
    /// The driver does not need this range's contents any more.
    fn discard(&mut self, range: &Range<u64>) -> io::Result<()>;
}

/// A raw image: a regular file or a block device, of a size that is fixed when it is opened.
#[derive(Debug)]
pub(crate) struct RawDisk {
    file: File,
    /// Whether the host can give storage back and zero a range, as far as is known.
    can_punch: bool,
    can_zero: bool,
}

impl RawDisk {
    /// Checks and locks an opened image. Returns it with its capacity in bytes, whole sectors.
    pub(crate) fn open(fd: OwnedFd, read_only: bool) -> Result<(Self, u64), BuildError> {
        let fail = |source| BuildError::File { what: "a disk", source };
        check_flags(&fd, read_only).map_err(fail)?;
        let mut file = File::from(fd);
        let kind = file.metadata().map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(fail(refusal("it is neither a regular file nor a block device")));
        }
        sys::file::lock(file.as_fd(), !read_only).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => fail(refusal("disk is in use by another VM")),
            _ => fail(error),
        })?;
        // The end of a file or of a block device alike; requests name their own offsets.
        let size = file.seek(SeekFrom::End(0)).map_err(fail)?;
        let capacity = size.saturating_sub(size.checked_rem(SECTOR).unwrap_or(0));
        Ok((Self { file, can_punch: !read_only, can_zero: !read_only }, capacity))
    }
}

/// The file must be opened for what it is used for, and a write must go where it is sent.
fn check_flags(fd: &OwnedFd, read_only: bool) -> io::Result<()> {
    let flags = sys::file::status_flags(fd.as_fd())?;
    let access = flags & libc::O_ACCMODE;
    if flags & libc::O_PATH != 0 || access == libc::O_WRONLY {
        return Err(refusal("it is not open for reading"));
    }
    if !read_only && access != libc::O_RDWR {
        return Err(refusal("it is open for reading only, but the disk is writable"));
    }
    if flags & libc::O_APPEND != 0 {
        return Err(refusal("it is open for appending, so every write would go to its end"));
    }
    if flags & libc::O_DIRECT != 0 {
        return Err(refusal("it is open for direct I/O, which a guest's buffers are not aligned for"));
    }
    Ok(())
}

fn refusal(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

impl Disk for RawDisk {
    fn read(&mut self, to: &mut Cursor<'_>, offset: u64) -> io::Result<()> {
        sys::read_at(self.file.as_fd(), to, to.remaining(), offset)?;
        if to.remaining() == 0 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn write(&mut self, from: &mut Cursor<'_>, offset: u64) -> io::Result<()> {
        sys::write_at(self.file.as_fd(), from, from.remaining(), offset)?;
        if from.remaining() == 0 { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn zero(&mut self, range: &Range<u64>, unmap: bool) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(());
        }
        if unmap && self.can_punch {
            match attempt(&mut self.can_punch, sys::file::punch_hole(self.file.as_fd(), range.start, len)) {
                Attempt::Unable => {}
                Attempt::Done(result) => return result,
            }
        }
        if self.can_zero {
            match attempt(&mut self.can_zero, sys::file::zero_range(self.file.as_fd(), range.start, len)) {
                Attempt::Unable => {}
                Attempt::Done(result) => return result,
            }
        }
        let mut at = range.start;
        while at < range.end {
            let left = usize::try_from(range.end.saturating_sub(at)).unwrap_or(usize::MAX);
            let part = ZEROES.get(..left.min(ZEROES.len())).unwrap_or_default();
            self.file.write_all_at(part, at)?;
            at = at.saturating_add(part.len().try_into().unwrap_or(u64::MAX));
        }
        Ok(())
    }

    fn discard(&mut self, range: &Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        if len == 0 || !self.can_punch {
            return Ok(()); // a hint: the bytes may as well stay
        }
        match attempt(&mut self.can_punch, sys::file::punch_hole(self.file.as_fd(), range.start, len)) {
            Attempt::Unable => Ok(()),
            Attempt::Done(result) => result,
        }
    }
}

enum Attempt {
    /// The host cannot do it for this range.
    Unable,
    Done(io::Result<()>),
}

/// Tells "cannot" from "failed", and remembers a file system that never can.
fn attempt(able: &mut bool, result: io::Result<()>) -> Attempt {
    match result.as_ref().err().and_then(io::Error::raw_os_error) {
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => {
            *able = false;
            Attempt::Unable
        }
        // A block device with larger blocks refuses ranges that are not made of those.
        Some(libc::EINVAL) => Attempt::Unable,
        _ => Attempt::Done(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c107_zeroes_are_written_where_the_file_system_cannot_make_them() {
        let file = tempfile::tempfile().unwrap();
        let len = 3 * ZEROES.len() + 512;
        file.write_all_at(&vec![7; len + 1024], 0).unwrap();
        let mut disk = RawDisk { file, can_punch: false, can_zero: false };
        let end = 512 + u64::try_from(len).unwrap();
        disk.zero(&(512..end), true).unwrap();
        disk.discard(&(0..512)).unwrap();
        let mut bytes = vec![0; len + 1024];
        disk.file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((&bytes[..512], &bytes[512 + len..]), (&[7; 512][..], &[7; 512][..]));
        assert!(bytes[512..512 + len].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_file_system_that_cannot_is_not_asked_again_and_one_that_failed_is() {
        let error = |code| Err(io::Error::from_raw_os_error(code));
        let mut able = true;
        assert!(matches!(attempt(&mut able, error(libc::EINVAL)), Attempt::Unable));
        assert!(matches!(attempt(&mut able, error(libc::EIO)), Attempt::Done(Err(_))));
        assert!(able);
        assert!(matches!(attempt(&mut able, error(libc::EOPNOTSUPP)), Attempt::Unable));
        assert!(!able);
    }
}
