//! Files that have their name only once they are complete.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::unistd::linkat;
use tempfile::Builder;

use crate::failure::{Context, Failure};

/// Begins the name that a complete file has until it gets its own.
const PREFIX: &str = ".mvm-complete";

/// Puts a file, its owner's alone, at `path` in place of what is there, with what `write` makes of an empty one. If
/// that fails, or the program dies meanwhile, what is there stays and nothing is left beside it.
///
/// # Errors
/// What `write` says, or the host's reason.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&File) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let failed = || format!("cannot write {}", path.display());
    let parent = path.parent().unwrap_or(Path::new("/"));
    let Some(file) = nameless(parent).context(failed)? else {
        // A file system without files that have no name.
        let file = Builder::new().prefix(".mvm-begun").tempfile_in(parent).context(failed)?;
        write(file.as_file())?;
        return file.persist(path).map(drop).context(failed);
    };
    // Whoever sweeps leaves what is locked.
    let file = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    let file = file.map_err(|(_, error)| io::Error::from(error)).context(failed)?;
    write(&file)?;
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    // No link replaces a name, a rename does.
    let link = |to: &Path| {
        let linked = linkat(AT_FDCWD, open.as_str(), AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW);
        linked.map_err(io::Error::from)
    };
    match link(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        linked => return linked.context(failed),
    }
    sweep(parent);
    let named = Builder::new().prefix(PREFIX).make_in(parent, link).context(failed)?;
    named.into_temp_path().persist(path).context(failed)
}

/// Removes what programs have left that died between giving a file a name and giving it its own.
fn sweep(directory: &Path) {
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            let lock =
                File::open(entry.path()).map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock));
            if matches!(lock, Ok(Ok(_))) {
                // What cannot be removed now is tried again by the next.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// A file in a directory that goes with whoever has it open; `None` where there is no such thing.
fn nameless(directory: &Path) -> io::Result<Option<File>> {
    let mut options = File::options();
    match options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(directory) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => Ok(None),
        opened => opened.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn fill(mut file: &File) -> Result<(), Failure> {
        file.write_all(b"after").context(|| "cannot write".to_owned())
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let names = || fs::read_dir(dir.path()).unwrap().count();
        write_whole(&path, fill).unwrap();
        fs::write(&path, "before").unwrap();
        let half = |file: &File| {
            fill(file).unwrap();
            assert_eq!(names(), 1, "it has no name before it is complete");
            Err(Failure::new("damaged"))
        };
        write_whole(&path, half).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"before");
        write_whole(&path, fill).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!((names(), path.metadata().unwrap().mode() & 0o777), (1, 0o600));
    }

    #[test]
    fn what_a_program_that_died_had_begun_to_name_is_swept_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (path, left) = (dir.path().join("file"), dir.path().join(format!("{PREFIX}abc")));
        for file in [&path, &left] {
            fs::write(file, "before").unwrap();
        }
        write_whole(&path, fill).unwrap();
        assert!(!left.exists());
        assert_eq!(fs::read(&path).unwrap(), b"after");
    }

    #[test]
    fn all_who_replace_a_file_at_once_succeed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let replace = || (0..100).for_each(|_| write_whole(&path, fill).unwrap());
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4).map(|_| scope.spawn(replace)).collect();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let report = write_whole(&dir.path().join("gone/file"), fill).unwrap_err().report();
        assert!(report.contains("gone/file") && report.contains("No such file"), "{report}");
    }
}
