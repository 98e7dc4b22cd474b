//! What mvm knows of its containers on this host, so that any process can find, use and clean up after another.
//!
//! One directory for each container, below a home (`MVM_RUN`, or `/run/mvm`):
//!
//! | file | what it holds |
//! | --- | --- |
//! | `lock` | locked for as long as the process lives that owns the container |
//! | `record.json` | what the container is and how it fares; replaced whole |
//! | `ledger` | the host's resources it has, each noted before it is made |
//! | `control.sock` | where its owner takes requests |
//! | `log` | what it has written |
//!
//! Beside them, the file `starts` has the places of machines that start at this moment.
//!
//! A sandbox keeps a ledger of its own in its directory, which the container's ledger names. An owner that dies drops
//! its lock: whoever takes it then knows that the ledger must be settled.

pub mod events;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gc;
mod ledger;
mod lock;
mod process;
mod record;
mod turns;

pub use gc::{Cleaned, collect};
pub use ledger::{Ledger, Resource};
pub use process::ProcessId;
pub use record::{Condition, Record, Restart, now};
pub use turns::Wish;
pub(crate) use turns::{Turn, Turns};

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use self::lock::Lock;
use crate::container::directory_of;
use crate::failure::{Context, Failure};

/// Name of a container's control socket.
pub const CONTROL: &str = "control.sock";
/// Name of the file its output is kept in.
pub const LOG: &str = "log";
const LOCK: &str = "lock";
const RECORD: &str = "record.json";

/// The directory all containers of a user are found in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home(PathBuf);

/// A container's directory, owned by this process until this is dropped.
#[derive(Debug)]
pub struct Owned {
    directory: PathBuf,
    _lock: Lock,
}

/// A container as another process sees it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its directory.
    pub directory: PathBuf,
    /// Its record.
    pub record: Record,
    /// The process that owns it is there.
    pub owned: bool,
}

impl Home {
    /// `MVM_RUN`, or `/run/mvm`.
    pub fn default_place() -> Self {
        Self(directory_of("MVM_RUN", "/run/mvm"))
    }

    /// The home at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A new container's directory with its record, owned by this process.
    ///
    /// # Errors
    /// Its name or id is another's, or the directory cannot be made.
    pub fn admit(&self, record: &Record) -> Result<Owned, Failure> {
        let failed = || format!("cannot use {}", self.0.display());
        private(true).create(&self.0).context(failed).map_err(as_root)?;
        // One after the other: nobody is given a name between being looked for and being written down.
        let _admitting = self.admitting().context(failed)?;
        let name = &record.name;
        let others = self.list()?;
        if let Some(other) = others.iter().find(|it| it.record.name == *name || it.record.id == *name) {
            return Err(Failure::new(format!("there is a container {name} already: {}", other.record.id))
                .help(format!("choose another name, or remove it: mvm rm {name}")));
        }
        let owned = self.create(&record.id)?;
        owned.write(record).map(|()| owned)
    }

    /// A new container's directory, owned by this process.
    ///
    /// # Errors
    /// The name is taken, or the directory cannot be made.
    pub fn create(&self, id: &str) -> Result<Owned, Failure> {
        let directory = self.0.join("containers").join(id);
        let failed = || format!("cannot make {}", directory.display());
        let parent = self.0.join("containers");
        private(true)
            .create(&parent)
            .context(|| format!("cannot make {}", parent.display()))
            .map_err(as_root)?;
        match private(false).create(&directory) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(Failure::new(format!("there is a container {id} already"))
                    .help(format!("choose another name, or remove it: mvm rm {id}")))
            }
            other => other.context(failed),
        }?;
        let lock = Lock::make(&directory.join(LOCK)).context(failed)?;
        let lock = lock.ok_or_else(|| Failure::new(format!("{} is in use", directory.display())))?;
        Ok(Owned { directory, _lock: lock })
    }

    /// All containers, oldest first. Directories without a record are passed over: they are being made or removed.
    ///
    /// # Errors
    /// The home cannot be read.
    pub fn list(&self) -> Result<Vec<Seen>, Failure> {
        let mut seen: Vec<Seen> = self.directories()?.into_iter().filter_map(see).collect();
        seen.sort_by(|a, b| (a.record.created, &a.record.id).cmp(&(b.record.created, &b.record.id)));
        Ok(seen)
    }

    /// The container that `name` means: its name, its id, or the beginning of an id that fits one only.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, name: &str) -> Result<Seen, Failure> {
        let mut all = self.list()?;
        if let Some(at) = all.iter().position(|it| it.record.name == name || it.record.id == name) {
            return Ok(all.swap_remove(at));
        }
        let mut fits = all.into_iter().filter(|it| !name.is_empty() && it.record.id.starts_with(name));
        match (fits.next(), fits.next()) {
            (Some(one), None) => Ok(one),
            (Some(_), Some(_)) => Err(Failure::new(format!("several containers begin with {name}"))
                .help("give more of the id; `mvm ps -a` lists them")),
            (None, _) => {
                Err(Failure::new(format!("there is no container {name}")).help("`mvm ps -a` lists them"))
            }
        }
    }

    /// Has nobody be admitted until what it gives is dropped.
    pub(crate) fn admitting(&self) -> io::Result<Flock<File>> {
        let file = File::options().create(true).truncate(false).write(true).open(self.0.join(LOCK))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
    }

    /// Directories of containers, in no order.
    pub(crate) fn directories(&self) -> Result<Vec<PathBuf>, Failure> {
        let path = self.0.join("containers");
        let read =
            || -> io::Result<Vec<PathBuf>> { fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect() };
        match read() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            other => other.context(|| format!("cannot read {}", path.display())),
        }
    }
}

impl Owned {
    /// Takes over a directory whose owner is gone; `None` if it is not.
    ///
    /// # Errors
    /// `NotFound` if nobody ever owned it, or it is gone; the host's reason.
    pub fn take(directory: &Path) -> io::Result<Option<Self>> {
        let lock = Lock::take(&directory.join(LOCK))?;
        Ok(lock.map(|lock| Self { directory: directory.to_owned(), _lock: lock }))
    }

    /// Takes over a directory as soon as its owner is gone; `None` if the directory is gone too.
    ///
    /// # Errors
    /// The host's reason.
    pub fn wait(directory: &Path) -> io::Result<Option<Self>> {
        match Lock::wait(&directory.join(LOCK)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            lock => Ok(lock?.map(|lock| Self { directory: directory.to_owned(), _lock: lock })),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// It cannot be written; the old one stands then.
    pub fn write(&self, record: &Record) -> Result<(), Failure> {
        record.write(&self.directory.join(RECORD))
    }

    /// The record.
    ///
    /// # Errors
    /// There is none, or it is not one.
    pub fn read(&self) -> Result<Record, Failure> {
        Record::read(&self.directory.join(RECORD))
    }

    /// The list of its resources on this host.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn ledger(&self) -> Result<Ledger, Failure> {
        Ledger::of(&self.directory)
    }

    /// Removes the directory. What its ledger names must be gone.
    ///
    /// # Errors
    /// The host's reason.
    pub fn remove(self) -> io::Result<()> {
        // The record first: what cannot be seen is not used.
        let gone = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        for name in [RECORD, CONTROL] {
            gone(fs::remove_file(self.directory.join(name)))?;
        }
        // The lock last: for as long as anything else is there, somebody can take it over.
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name() != LOCK {
                let remove = if entry.file_type()?.is_dir() { fs::remove_dir_all } else { fs::remove_file };
                gone(remove(entry.path()))?;
            }
        }
        gone(fs::remove_file(self.directory.join(LOCK)))?;
        gone(fs::remove_dir(&self.directory))
    }
}

/// Makes directories that are their owner's alone.
fn private(recursive: bool) -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700).recursive(recursive);
    builder
}

fn as_root(failure: Failure) -> Failure {
    failure.help("run as root, or name another directory in MVM_RUN")
}

fn see(directory: PathBuf) -> Option<Seen> {
    // Asked first: the record of one that nobody owns says how it ended.
    let owned = Lock::is_held(&directory.join(LOCK)).unwrap_or(false);
    let record = Record::read(&directory.join(RECORD)).ok()?;
    Some(Seen { directory, record, owned })
}

#[cfg(test)]
mod tests {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("run"));
        (dir, home)
    }

    fn record(id: &str, name: &str) -> Record {
        Record { id: id.to_owned(), name: name.to_owned(), ..Record::default() }
    }

    #[test]
    fn a_container_is_found_by_name_id_or_the_beginning_of_its_id() {
        let (_dir, home) = home();
        let owned: Vec<_> = [("abc123", "web"), ("abd456", "db")]
            .map(|(id, name)| {
                let owned = home.create(id).unwrap();
                owned.write(&record(id, name)).unwrap();
                owned
            })
            .into();
        for name in ["web", "abc123", "abc"] {
            assert_eq!(home.find(name).unwrap().record.id, "abc123", "{name}");
        }
        assert!(home.find("ab").unwrap_err().report().contains("several"));
        assert!(home.find("x").unwrap_err().report().contains("no container"));
        assert!(home.find("").is_err());
        assert!(home.list().unwrap().iter().all(|it| it.owned));
        drop(owned);
        assert!(home.list().unwrap().iter().all(|it| !it.owned));
    }

    #[test]
    fn a_name_is_given_once_and_free_after_removal() {
        let (_dir, home) = home();
        let owned = home.create("a").unwrap();
        assert!(home.create("a").unwrap_err().report().contains("already"));
        assert!(Owned::take(owned.path()).unwrap().is_none(), "it is owned");
        owned.remove().unwrap();
        assert!(home.create("a").is_ok());
    }

    #[test]
    fn a_lock_goes_after_everything_that_it_protects() {
        let (_dir, home) = home();
        let owned = home.create("a").unwrap();
        let path = owned.path().to_owned();
        for name in ('a'..='z').map(String::from) {
            fs::write(path.join(name), "").unwrap();
        }
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        watch.add_watch(&path, AddWatchFlags::IN_DELETE).unwrap();
        owned.remove().unwrap();
        let mut removed = Vec::new();
        while let Ok(events) = watch.read_events() {
            removed.extend(events.into_iter().filter_map(|event| event.name));
        }
        assert_eq!(removed.last().map(|name| name.as_os_str()), Some(LOCK.as_ref()), "{removed:?}");
        assert_eq!(removed.len(), 27);
        assert!(!path.exists());
    }

    #[test]
    fn whoever_looks_at_a_container_does_not_seem_to_own_it() {
        let (_dir, home) = home();
        home.admit(&record("a", "web")).map(drop).unwrap();
        let look = || (0..500).any(|_| home.find("web").unwrap().owned);
        std::thread::scope(|scope| {
            let looks: Vec<_> = (0..4).map(|_| scope.spawn(look)).collect();
            assert!(looks.into_iter().all(|it| !it.join().unwrap()));
        });
    }

    #[test]
    fn a_directory_is_taken_over_once_and_not_once_it_is_gone() {
        let (_dir, home) = home();
        let owned = home.create("a").unwrap();
        let directory = owned.path().to_owned();
        std::thread::scope(|scope| {
            let take = || Owned::wait(&directory).unwrap().map(|owned| owned.remove().unwrap());
            let waiting: Vec<_> = (0..2).map(|_| scope.spawn(take)).collect();
            drop(owned);
            let taken = waiting.into_iter().filter_map(|it| it.join().unwrap()).count();
            assert_eq!(taken, 1);
        });
        assert!(Owned::wait(&directory).unwrap().is_none());
    }

    #[test]
    fn of_several_that_ask_for_a_name_at_once_one_gets_it() {
        let (_dir, home) = home();
        let ask = |n| home.admit(&record(&format!("id{n}"), "web"));
        let got: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || ask(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let refused: Vec<_> = got.iter().filter_map(|it| it.as_ref().err()).collect();
        assert_eq!((got.len(), refused.len()), (8, 7));
        assert!(refused[0].report().contains("mvm rm web"));
        // An id is a name as well.
        let first = home.list().unwrap().remove(0).record.id;
        assert!(home.admit(&record("other", &first)).is_err());
        drop(got);
        home.admit(&record("other", "web")).unwrap_err(); // its record is still there
    }

    #[test]
    fn a_home_that_is_not_there_is_empty() {
        let (_dir, home) = home();
        assert!(home.list().unwrap().is_empty());
    }
}
