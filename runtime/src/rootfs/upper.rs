//! The disk that takes a container's writes: a sparse ext4 image, copied from one that is made once for each size.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Whence, lseek};
use sha2::{Digest as _, Sha256};

use crate::failure::{Context, Failure};
use crate::hex::hex;
use crate::whole_file::write_whole;

/// Smallest disk of writes, in bytes: below, its own bookkeeping would take a large part.
const SMALLEST: u64 = 16 << 20;
/// Largest one: what ext4 with blocks of 4096 bytes and no more than 2^32 of them holds.
const LARGEST: u64 = 16 << 40;
/// Place and value of the magic number of ext4.
const MAGIC: (u64, [u8; 2]) = (1024 + 0x38, [0x53, 0xef]);

/// The disk at `path`, made with `bytes` if there is none.
pub(super) fn disk(path: &Path, bytes: u64, state: &Path) -> Result<(), Failure> {
    if is_ext4(path) {
        return Ok(());
    }
    make(path, bytes, state).context(|| format!("cannot make the disk of writes {}", path.display()))
}

/// The disk of a directory that it cannot lie beside, which is kept in the state directory.
pub(super) fn disk_for(directory: &Path, bytes: u64, state: &Path) -> Result<PathBuf, Failure> {
    let uppers = uppers(state)?;
    sweep(&uppers);
    let identity = identity(directory).context(|| format!("cannot look at {}", directory.display()))?;
    let hash = Sha256::digest(&identity);
    let name = hex(hash.iter().take(16));
    let record = uppers.join(format!("{name}.of"));
    // First, so that no disk is without it.
    fs::write(&record, &identity).context(|| format!("cannot write {}", record.display()))?;
    let path = uppers.join(format!("{name}.ext4"));
    disk(&path, bytes, state)?;
    Ok(path)
}

/// Removes disks of directories that are gone.
fn sweep(uppers: &Path) {
    let Ok(entries) = uppers.read_dir() else { return };
    for record in entries.flatten().map(|entry| entry.path()) {
        if record.extension().is_none_or(|extension| extension != "of") {
            continue;
        }
        let Ok(known) = fs::read(&record) else { continue };
        let Some(path) = known.split(|byte| *byte == 0).next() else { continue };
        let path = Path::new(OsStr::from_bytes(path));
        let gone = match identity(path) {
            Ok(identity) => identity != known,
            Err(error) => error.kind() == ErrorKind::NotFound,
        };
        if gone {
            // A machine that still uses it keeps it. What cannot be removed is tried again.
            let _ = fs::remove_file(record.with_extension("ext4"));
            let _ = fs::remove_file(&record);
        }
    }
}

/// A directory's path, and which one it is among all that ever were there: a file system gives the number of one that
/// is gone to the next, so it is its time of birth that tells them apart. Where a file system keeps none, a later
/// directory may be taken for the former.
fn identity(directory: &Path) -> io::Result<Vec<u8>> {
    let metadata = directory.metadata()?;
    let mut identity = directory.as_os_str().as_encoded_bytes().to_vec();
    identity.push(0);
    identity.extend_from_slice(&metadata.dev().to_le_bytes());
    identity.extend_from_slice(&metadata.ino().to_le_bytes());
    if let Ok(born) = metadata.created() {
        let since = born.duration_since(UNIX_EPOCH).unwrap_or_default();
        identity.extend_from_slice(&since.as_nanos().to_le_bytes());
    }
    Ok(identity)
}

fn uppers(state: &Path) -> Result<PathBuf, Failure> {
    let path = state.join("uppers");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
    made.context(|| format!("cannot make directory {}", path.display()))?;
    Ok(path)
}

fn is_ext4(path: &Path) -> bool {
    let mut magic = [0; 2];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut magic, MAGIC.0));
    read.is_ok() && magic == MAGIC.1
}

fn make(path: &Path, bytes: u64, state: &Path) -> Result<(), Failure> {
    // Whole blocks, so that all of it is the file system's.
    let bytes = bytes & !4095;
    if !(SMALLEST..=LARGEST).contains(&bytes) {
        let (least, most) = (SMALLEST >> 20, LARGEST >> 40);
        return Err(Failure::new(format!(
            "a size of {bytes} bytes is not between {least} MiB and {most} TiB"
        )));
    }
    let template = template(bytes, state)?;
    let copy = |file: &File| {
        copy_sparse(&template, file, bytes).context(|| "cannot copy an empty file system".to_owned())
    };
    write_whole(path, copy)
}

/// An empty file system of this size.
fn template(bytes: u64, state: &Path) -> Result<File, Failure> {
    let uppers = uppers(state)?;
    let path = uppers.join(format!("empty-{bytes}.ext4"));
    let lock = uppers.join("lock");
    let lock = File::options().create(true).append(true).mode(0o600).open(&lock);
    let lock = lock.context(|| format!("cannot lock {}", uppers.display()))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context(|| format!("cannot lock {}", uppers.display()))?;
    if !is_ext4(&path) {
        let unfinished = uppers.join("unfinished");
        format(&unfinished, bytes)?;
        fs::rename(&unfinished, &path).context(|| format!("cannot rename {}", unfinished.display()))?;
    }
    File::open(&path).context(|| format!("cannot open {}", path.display()))
}

/// Has a file system made. Everything that reads as zero already is declared so, for neither host nor guest to
/// write it.
fn format(path: &Path, bytes: u64) -> Result<(), Failure> {
    let file = File::create(path).context(|| format!("cannot write {}", path.display()))?;
    file.set_len(bytes).context(|| format!("cannot write {}", path.display()))?;
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F", "-b", "4096", "-m", "0", "-i", "16384", "-O", "^resize_inode"]);
    // The journal is written round and round: all of it ends up on the host.
    if bytes >= 1 << 30 {
        command.args(["-J", "size=32"]);
    }
    let zeroed =
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard,packed_meta_blocks=1,assume_storage_prezeroed=1";
    let run = command.args(["-E", zeroed]).arg(path).output();
    let output = run
        .context(|| "cannot run mkfs.ext4".to_owned())
        .map_err(|failure| failure.help("install e2fsprogs (1.47 or later)"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::because(format!("mkfs.ext4 {}", output.status), Failure::new(said.trim())))
}

/// Copies what is not a hole, by the kernel where it can: file systems that can share blocks do.
pub(crate) fn copy_sparse(mut from: &File, mut to: &File, bytes: u64) -> io::Result<()> {
    to.set_len(bytes)?;
    let mut end = 0;
    loop {
        let start = match lseek(from, end, Whence::SeekData) {
            Ok(start) => start,
            // No data from here on.
            Err(Errno::ENXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        end = lseek(from, start, Whence::SeekHole)?;
        let (at, length) = (SeekFrom::Start(start.cast_unsigned()), (end - start).cast_unsigned());
        from.seek(at)?;
        to.seek(at)?;
        if io::copy(&mut from.take(length), &mut to)? != length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound(path: &Path) -> bool {
        Command::new("e2fsck").args(["-fn"]).arg(path).output().unwrap().status.success()
    }

    #[test]
    fn a_disk_of_writes_is_a_sparse_sound_ext4() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [16 << 20, (100 << 20) + 5, 1 << 30, 8 << 30] {
            let path = dir.path().join(format!("{bytes}.ext4"));
            disk(&path, bytes, dir.path()).unwrap();
            let metadata = path.metadata().unwrap();
            assert_eq!(metadata.len(), bytes & !4095);
            assert!(metadata.blocks() * 512 < 1 << 20, "{bytes}: {} sectors", metadata.blocks());
            assert!(sound(&path), "{bytes}");
        }
    }

    #[test]
    fn a_disk_that_is_there_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        disk(&path, 16 << 20, dir.path()).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(b"mark", 0).unwrap();
        disk(&path, 32 << 20, dir.path()).unwrap();
        assert_eq!(path.metadata().unwrap().len(), 16 << 20);
        assert_eq!(fs::read(&path).unwrap()[..4], *b"mark");
        // One that nothing was ever written to is made anew.
        File::create(&path).unwrap();
        disk(&path, 32 << 20, dir.path()).unwrap();
        assert_eq!(path.metadata().unwrap().len(), 32 << 20);
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["from", "to"].map(|name| dir.path().join(name));
        let [from, to] =
            paths.clone().map(|it| File::options().read(true).write(true).create_new(true).open(it).unwrap());
        from.set_len(64 << 20).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 4096] {
            from.write_all_at(&[7; 4096], at).unwrap();
        }
        copy_sparse(&from, &to, 64 << 20).unwrap();
        let [from_bytes, to_bytes] = paths.map(|path| fs::read(path).unwrap());
        assert!(from_bytes == to_bytes);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn sizes_that_make_no_file_system_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [0, SMALLEST - 1, u64::MAX] {
            assert!(disk(&dir.path().join("disk"), bytes, dir.path()).is_err());
        }
        assert!(!dir.path().join("disk").exists());
    }

    #[test]
    fn the_disk_of_a_directory_goes_when_the_directory_does() {
        let dir = tempfile::tempdir().unwrap();
        let (state, root) = (dir.path().join("state"), dir.path().join("root"));
        let other = dir.path().join("other");
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&other).unwrap();
        let first = disk_for(&root, 16 << 20, &state).unwrap();
        assert_eq!(disk_for(&root, 16 << 20, &state).unwrap(), first);
        assert!(first.exists());
        fs::remove_dir(&root).unwrap();
        let second = disk_for(&other, 16 << 20, &state).unwrap();
        assert!(!first.exists() && second.exists() && first != second);
    }

    #[test]
    fn a_directory_is_not_taken_for_a_former_one_of_its_path_and_number() {
        let dir = tempfile::tempdir().unwrap();
        let (state, root) = (dir.path().join("state"), dir.path().join("root"));
        fs::create_dir(&root).unwrap();
        let born = || root.metadata().unwrap().created().unwrap();
        let (former, birth) = (disk_for(&root, 16 << 20, &state).unwrap(), born());
        // The clocks of file systems are coarse. One that gives numbers again, as ext4 does, gives this one again.
        while born() == birth {
            fs::remove_dir(&root).unwrap();
            fs::create_dir(&root).unwrap();
        }
        let later = disk_for(&root, 16 << 20, &state).unwrap();
        assert_ne!(later, former);
        assert!(!former.exists(), "it goes with its directory");
        assert_eq!(disk_for(&root, 16 << 20, &state).unwrap(), later);
    }
}
