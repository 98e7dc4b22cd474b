//! Directories of named entries that appear whole and go whole: snapshots, templates.
//!
//! ```text
//! <root>/<name>/manifest.json what the entry is, with the version of that; written last
//! <root>/<name>/…             its files
//! <root>/.new-*               one being made or removed, locked by who is at it; left over if that died
//! ```
//!
//! No name begins with a full stop, and none leads out of the root: that is for the types of names to hold.

mod format;
mod scratch;

pub(crate) use format::Format;
pub(crate) use scratch::{Scratch, is_at};

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use crate::failure::{Context, Failure};

/// What is on record of an entry.
pub(crate) const MANIFEST: &str = "manifest.json";
/// How the name of one begins that is being made or removed.
const NEW: &str = ".new-";
/// An entry's name within the directory it is removed in.
const GONE: &str = "gone";

/// One such directory, which need not be there.
#[derive(Clone, Debug)]
pub(crate) struct Catalog {
    /// Where it is.
    pub root: PathBuf,
}

impl Catalog {
    /// Where the entry of this name is, if it is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Where the manifest of it is.
    pub(crate) fn manifest(&self, name: &str) -> PathBuf {
        self.path(name).join(MANIFEST)
    }

    /// The names of all entries, whether or not they can be understood, in no order. Whatever else lies there is
    /// passed over.
    pub(crate) fn names<N: TryFrom<String>>(&self) -> Result<Vec<N>, Failure> {
        let failed = || format!("cannot read {}", self.root.display());
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.context(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.context(failed)?.file_name().into_string().unwrap_or_default();
            names.extend(N::try_from(name));
        }
        Ok(names)
    }

    /// Bytes of the host's disk that an entry takes, without files that have another name as well.
    pub(crate) fn disk_bytes(&self, name: &str) -> io::Result<u64> {
        let files = fs::read_dir(self.path(name))?.flatten().filter_map(|it| it.metadata().ok());
        Ok(files.filter(|it| it.nlink() == 1).map(|it| it.blocks().saturating_mul(512)).sum())
    }

    /// Makes the directory itself, its owner's alone: a machine's memory is in there.
    pub(crate) fn make_root(&self) -> Result<(), Failure> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.root);
        made.context(|| format!("cannot make {}", self.root.display()))
            .map_err(|failure| failure.help("run as root, or name another directory in MVM_STATE"))
    }

    /// A directory for an entry that is being made, gone with the value.
    pub(crate) fn begin(&self) -> Result<Scratch, Failure> {
        self.make_root()?;
        let made = Scratch::new(&self.root, NEW);
        made.context(|| format!("cannot make a directory in {}", self.root.display()))
    }

    /// The directory becomes the entry of this name.
    ///
    /// # Errors
    /// There is one already, which stays, or the host refuses.
    pub(crate) fn install(&self, new: Scratch, name: &str) -> io::Result<()> {
        // No directory that has something in it is replaced by a rename.
        fs::rename(new.path(), self.path(name))?;
        new.keep();
        File::open(&self.root)?.sync_all()
    }

    /// A lock of an entry, as `how` says; `None` if it is another's or the entry is gone. To be made or removed an entry
    /// needs none: it is for those who agree on it.
    pub(crate) fn lock(&self, name: &str, how: FlockArg) -> io::Result<Option<Flock<File>>> {
        let path = self.path(name);
        let opened = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match Flock::lock(opened, how) {
            Ok(lock) => Ok(Some(lock).filter(|lock| is_at(lock, &path))),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    /// Removes an entry, if it is there: first its name, so that none is ever found that is not whole.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        let gone = Scratch::new(&self.root, NEW)?;
        match fs::rename(self.path(name), gone.path().join(GONE)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => gone.close(),
        }
    }

    /// Removes what was left by those who did not finish.
    pub(crate) fn sweep(&self) {
        scratch::sweep(&self.root, NEW);
    }
}

/// A new file for reading and writing, its owner's alone.
pub(crate) fn create(path: &Path) -> Result<File, Failure> {
    create_new(path).context(|| format!("cannot make {}", path.display()))
}

fn create_new(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Writes the files of an entry that is being made in `directory` all the way to the disk. Its name comes last: it must
/// not outlive a crash of the host that the content did not.
pub(crate) fn write_back(directory: &Path) -> Result<(), Failure> {
    let failed = || format!("cannot read {}", directory.display());
    for entry in fs::read_dir(directory).context(failed)? {
        let path = entry.context(failed)?.path();
        let written = File::open(&path).and_then(|file| file.sync_all());
        written.context(|| format!("cannot write {} back", path.display()))?;
    }
    Ok(())
}

/// Writes the manifest of one, in the same way.
pub(crate) fn note(directory: &Path, manifest: &impl Serialize) -> io::Result<()> {
    let mut file = create_new(&directory.join(MANIFEST))?;
    file.write_all(&serde_json::to_vec_pretty(manifest)?)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use mvm_vmm::config::MachineId;

    use super::*;

    fn empty(dir: &Path) -> Catalog {
        Catalog { root: dir.join("entries") }
    }

    fn add(catalog: &Catalog, name: &str) -> io::Result<()> {
        let new = catalog.begin().unwrap();
        note(new.path(), &name).unwrap();
        catalog.install(new, name)
    }

    fn names(catalog: &Catalog) -> Vec<String> {
        let mut names: Vec<_> =
            catalog.names::<MachineId>().unwrap().iter().map(ToString::to_string).collect();
        names.sort();
        names
    }

    #[test]
    fn an_entry_appears_whole_is_its_owners_alone_and_goes_whole() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = empty(dir.path());
        assert!(names(&catalog).is_empty() && !catalog.root.exists());
        let new = catalog.begin().unwrap();
        for path in [new.path(), &catalog.root] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700, "{}", path.display());
        }
        assert!(names(&catalog).is_empty(), "it has no name yet");
        drop(new);
        add(&catalog, "a").unwrap();
        add(&catalog, "b").unwrap();
        assert_eq!(names(&catalog), ["a", "b"]);
        assert_eq!(fs::read_to_string(catalog.manifest("a")).unwrap(), "\"a\"");
        assert_eq!(fs::metadata(catalog.manifest("a")).unwrap().permissions().mode() & 0o777, 0o600);
        catalog.remove("a").unwrap();
        catalog.remove("a").unwrap();
        assert_eq!(fs::read_dir(&catalog.root).unwrap().count(), 1, "nothing of it is left");
    }

    #[test]
    fn none_takes_the_place_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = empty(dir.path());
        add(&catalog, "a").unwrap();
        fs::write(catalog.path("a").join("state"), "old").unwrap();
        add(&catalog, "a").unwrap_err();
        assert!(catalog.path("a").join("state").exists());
        assert_eq!(fs::read_dir(&catalog.root).unwrap().count(), 1);
    }

    #[test]
    fn what_another_left_unfinished_is_removed_and_what_it_works_on_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = empty(dir.path());
        let working = catalog.begin().unwrap();
        let left = catalog.root.join(".new-left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("memory"), "x").unwrap();
        add(&catalog, "a").unwrap();
        assert!(working.path().exists() && !left.exists());
        fs::create_dir(&left).unwrap();
        catalog.sweep();
        assert!(working.path().exists() && !left.exists() && catalog.path("a").exists());
    }

    #[test]
    fn what_has_another_name_as_well_takes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = empty(dir.path());
        add(&catalog, "a").unwrap();
        let alone = catalog.disk_bytes("a").unwrap();
        let image = dir.path().join("image");
        fs::write(&image, vec![1; 100_000]).unwrap();
        fs::hard_link(&image, catalog.path("a").join("disk")).unwrap();
        assert_eq!(catalog.disk_bytes("a").unwrap(), alone);
        fs::remove_file(&image).unwrap();
        assert!(catalog.disk_bytes("a").unwrap() >= alone + 100_000);
    }
}
