//! Where templates lie: found, listed, set aside, removed.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::manifest::Manifest;
use super::recipe::Key;
use crate::catalog::{Catalog, MANIFEST, Scratch, note};
use crate::failure::{Context, Failure};
use crate::machine::{Snapshot, WORKING_SET};

/// Below the cache directory.
const DIRECTORY: &str = "templates";
/// Held while a template is made or removed.
const LOCK: &str = "lock";
/// CPUs and devices.
pub(super) const STATE: &str = "state";
/// RAM.
pub(super) const MEMORY: &str = "memory";
/// Why a template is of no use.
const ASIDE: &str = "aside";
/// Most of a reason that is read, in bytes.
const MAX_REASON: u64 = 4096;
/// How long a template that was of no use is not made again by itself.
const ASIDE_TIME: Duration = Duration::from_secs(24 * 3600);

/// The templates of one cache directory.
#[derive(Clone, Debug)]
pub struct Templates {
    catalog: Catalog,
}

/// A template that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// What is on record of it.
    pub manifest: Manifest,
    directory: PathBuf,
}

impl Template {
    /// What a machine goes on from.
    pub fn snapshot(&self) -> Snapshot {
        saved_in(&self.directory, &self.manifest.key)
    }

    /// It is used now. That it cannot be noted is no reason not to use it.
    pub(crate) fn touch(&self) {
        let file = File::options().append(true).open(self.directory.join(MANIFEST));
        let _ = file.and_then(|file| file.set_modified(SystemTime::now()));
    }
}

/// The machine that was saved in `directory`, with what one of it needs first if that is on record.
pub(super) fn saved_in(directory: &Path, key: &Key) -> Snapshot {
    let working_set = directory.join(WORKING_SET);
    Snapshot {
        state: directory.join(STATE),
        memory: directory.join(MEMORY),
        source: None,
        base: None,
        working_set: working_set.is_file().then_some(working_set),
        contents: key.to_string(),
    }
}

/// Whether a template is of use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "condition")]
pub enum Condition {
    /// It is.
    Ready,
    /// Kernel, agent or VMM are not what they were.
    Outdated,
    /// A machine that was made of it did not come up, or none could be made.
    Aside {
        /// Why.
        reason: String,
    },
}

/// A template as it is listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Whether it is of use.
    #[serde(flatten)]
    pub condition: Condition,
    /// What is on record of it, unless it never came to be.
    pub manifest: Option<Manifest>,
    /// Bytes of the host's disk that it takes.
    pub disk_bytes: u64,
    /// When it was used last.
    #[serde(serialize_with = "seconds")]
    pub last_used: SystemTime,
}

/// Seconds since the Unix epoch.
fn seconds<S: serde::Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// Which templates may stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// None.
    pub nothing: bool,
    /// Most bytes of the host; the least recently used go until the rest fits.
    pub bytes: Option<u64>,
    /// Only what was used less than this ago.
    pub unused: Option<Duration>,
}

/// What pruning did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pruned {
    /// What was removed.
    pub removed: Vec<Entry>,
    /// Bytes of the host that were freed, some of them once the machines that use them have ended.
    pub freed_bytes: u64,
}

impl Templates {
    /// Those of the cache directory `state`, which need not be there.
    pub fn of(state: &Path) -> Self {
        Self { catalog: Catalog { root: state.join(DIRECTORY) } }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.catalog.path(key.as_str())
    }

    /// The template of a key, if there is one of use.
    pub fn find(&self, key: &Key) -> Option<Template> {
        let directory = self.path(key);
        let manifest = Manifest::read(&directory.join(MANIFEST)).ok()?;
        let whole = manifest.key == *key && !directory.join(ASIDE).exists();
        whole.then_some(Template { manifest, directory })
    }

    /// Whether one of this key was of no use lately.
    pub fn is_aside(&self, key: &Key) -> bool {
        let noted = fs::metadata(self.path(key).join(ASIDE)).and_then(|it| it.modified());
        noted.is_ok_and(|at| at.elapsed().unwrap_or_default() < ASIDE_TIME)
    }

    /// The template of this key, or that which should be, is not used until it is made anew.
    ///
    /// # Errors
    /// That cannot be written.
    pub fn set_aside(&self, key: &Key, reason: &str) -> Result<(), Failure> {
        self.make_root()?;
        let directory = self.path(key);
        let failed = || format!("cannot set template {} aside", key.short());
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error).context(failed),
            _ => {}
        }
        fs::write(directory.join(ASIDE), reason).context(failed)
    }

    /// All templates, the last used first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, Failure> {
        let names = self.catalog.names()?.into_iter();
        let mut found: Vec<_> = names.filter_map(|key| self.entry(key)).collect();
        found.sort_by_key(|it| std::cmp::Reverse(it.last_used));
        Ok(found)
    }

    /// `None` if it is gone by now.
    fn entry(&self, key: Key) -> Option<Entry> {
        let directory = self.path(&key);
        let (aside, record) = (directory.join(ASIDE), directory.join(MANIFEST));
        let manifest = Manifest::read(&record).ok();
        let condition = match (read_reason(&aside), &manifest) {
            (Some(reason), _) => Condition::Aside { reason },
            (None, None) => Condition::Aside { reason: "its manifest cannot be read".to_owned() },
            (None, Some(manifest)) if !manifest.is_fresh() => Condition::Outdated,
            (None, Some(_)) => Condition::Ready,
        };
        let facts = fs::metadata(&record).or_else(|_| fs::metadata(&directory)).ok()?;
        let disk_bytes = self.catalog.disk_bytes(key.as_str()).ok()?;
        Some(Entry { key, condition, manifest, disk_bytes, last_used: facts.modified().ok()? })
    }

    /// The one template whose key begins like this.
    ///
    /// # Errors
    /// None does, or several do.
    pub fn get(&self, beginning: &str) -> Result<Entry, Failure> {
        let mut found = self.list()?.into_iter().filter(|it| it.key.as_str().starts_with(beginning));
        match (found.next().filter(|_| !beginning.is_empty()), found.next()) {
            (Some(entry), None) => Ok(entry),
            (Some(_), Some(_)) => {
                Err(Failure::new(format!("several templates begin with {beginning}"))
                    .help("use more of its key"))
            }
            (None, _) => Err(Failure::new(format!("there is no template {beginning}"))
                .help("`mvm template ls` lists those there are")),
        }
    }

    /// Removes the one template whose key begins like this.
    ///
    /// # Errors
    /// As [`Templates::get`], or it cannot be removed.
    pub fn remove(&self, beginning: &str) -> Result<Entry, Failure> {
        self.make_root()?;
        let _lock = self.lock()?;
        let entry = self.get(beginning)?;
        self.discard(&entry.key)?;
        Ok(entry)
    }

    /// Removes what is of no use, and what does not fit into `keep`.
    ///
    /// # Errors
    /// One of them cannot be removed.
    pub fn prune(&self, keep: &Keep) -> Result<Pruned, Failure> {
        self.make_root()?;
        let _lock = self.lock()?;
        self.prune_locked(keep)
    }

    /// The same for one who holds the lock.
    pub(super) fn prune_locked(&self, keep: &Keep) -> Result<Pruned, Failure> {
        self.catalog.sweep();
        let (mut kept_bytes, mut pruned) = (0_u64, Pruned::default());
        for entry in self.list()? {
            let bytes = kept_bytes.saturating_add(entry.disk_bytes);
            let fits = keep.bytes.is_none_or(|most| bytes <= most);
            // A clock that was set back makes nothing old.
            let age = entry.last_used.elapsed().unwrap_or_default();
            let fresh = keep.unused.is_none_or(|longest| age < longest);
            if entry.condition == Condition::Ready && fits && fresh && !keep.nothing {
                kept_bytes = bytes;
                continue;
            }
            self.discard(&entry.key)?;
            pruned.freed_bytes = pruned.freed_bytes.saturating_add(entry.disk_bytes);
            pruned.removed.push(entry);
        }
        Ok(pruned)
    }

    /// A directory for a template that is being made, gone with the value.
    pub(super) fn begin(&self) -> Result<Scratch, Failure> {
        self.catalog.begin()
    }

    /// The directory becomes the template of this manifest; what was in its place goes.
    pub(super) fn install(&self, new: Scratch, manifest: Manifest) -> Result<Template, Failure> {
        let key = manifest.key.clone();
        let failed = || format!("cannot keep template {}", key.short());
        note(new.path(), &manifest).context(failed)?;
        self.discard(&key)?;
        self.catalog.install(new, key.as_str()).context(failed)?;
        Ok(Template { manifest, directory: self.path(&key) })
    }

    pub(super) fn make_root(&self) -> Result<(), Failure> {
        self.catalog.make_root()
    }

    /// The right to make and remove templates, when nobody else has it.
    pub(super) fn lock(&self) -> Result<Flock<File>, Failure> {
        let path = self.catalog.root.join(LOCK);
        let failed = || format!("cannot lock {}", path.display());
        Flock::lock(self.lock_file()?, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context(failed)
    }

    /// The same, if nobody else has it now.
    pub(super) fn lock_now(&self) -> Result<Option<Flock<File>>, Failure> {
        match Flock::lock(self.lock_file()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(Failure::because("cannot lock the templates", errno)),
        }
    }

    fn lock_file(&self) -> Result<File, Failure> {
        let path = self.catalog.root.join(LOCK);
        let opened = File::options().create(true).append(true).mode(0o600).open(&path);
        opened.context(|| format!("cannot open {}", path.display()))
    }

    /// Removes a template, if it is there.
    fn discard(&self, key: &Key) -> Result<(), Failure> {
        self.catalog.remove(key.as_str()).context(|| format!("cannot remove template {}", key.short()))
    }
}

fn read_reason(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_REASON).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
#[path = "store_tests.rs"]
pub(super) mod tests;
