//! Where snapshots lie: found, listed, removed.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mvm_vmm::config::MachineId;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::manifest::{Base, BaseMemory, Going, Manifest, check_file, disk_file, memory_file};
use crate::agent::StdioSpec;
use crate::catalog::{Catalog, MANIFEST, Scratch, note};
use crate::failure::{Context, Failure};
use crate::machine::{MemorySource, Snapshot, WORKING_SET};
use crate::rootfs::copy_sparse;

/// Below the state directory.
const DIRECTORY: &str = "snapshots";
/// Beside that directory: the digest of the machines' program.
const PROGRAM: &str = "program.json";

/// The snapshots of one state directory.
#[derive(Clone, Debug)]
pub struct Snapshots {
    catalog: Catalog,
}

/// A snapshot that is there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// What it is.
    pub manifest: Manifest,
    /// Bytes of the host's disk that it takes, without what it shares with cached images.
    pub disk_bytes: u64,
    #[serde(skip)]
    directory: PathBuf,
}

impl Entry {
    /// Whether a machine can go on from it on this host, as far as can be told without trying.
    ///
    /// # Errors
    /// What does not fit or is not there, and the way out.
    pub fn check(&self) -> Result<(), Failure> {
        let root = self.directory.parent().unwrap_or(&self.directory);
        self.manifest.check_host(&root.with_file_name(PROGRAM))?;
        self.base_memory().map(drop).context(|| format!("cannot restore snapshot {}", self.manifest.name))
    }

    /// The memory of its base, if it has one.
    fn base_memory(&self) -> Result<Option<PathBuf>, Failure> {
        let Some(Base { name, contents }) = &self.manifest.run.machine.base else { return Ok(None) };
        let directory = self.directory.with_file_name(name.as_str());
        if !directory.is_dir() {
            return Err(Failure::new(format!("snapshot {name}, its base, is gone")).help(format!(
                "it is of no use without: bring {name} back, or mvm snapshot rm {}",
                self.manifest.name
            )));
        }
        let found = Manifest::read(&directory.join(MANIFEST))?.run.machine;
        if found.contents != *contents || found.base.is_some() {
            return Err(Failure::new(format!("snapshot {name} is another than the one that was its base"))
                .help(format!("bring that back, or mvm snapshot rm {}", self.manifest.name)));
        }
        let file = memory_file(&directory);
        check_file(&file, 0).map(|()| Some(file))
    }

    /// What a machine goes on from. The disk of the container's writes is copied to `writes`, which must not be there.
    ///
    /// # Errors
    /// A file is missing or is not what was saved, or the disk cannot be copied.
    pub fn going(&self, writes: &Path, stdio: StdioSpec, memory: &Memory) -> Result<Going, Failure> {
        let failed = || format!("cannot use snapshot {}", self.manifest.name);
        let run = &self.manifest.run;
        let base = self.base_memory().context(failed)?;
        let (mut snapshot, disks) =
            run.machine.files(&self.directory, base, (writes, &run.job.rootfs)).context(failed)?;
        if let Some(number) = run.machine.written() {
            let copied = copy(&disk_file(&self.directory, number), writes);
            copied.context(|| format!("cannot copy a disk to {}", writes.display())).context(failed)?;
        }
        let record = self.bring(memory, &mut snapshot).context(failed)?;
        let (machine, process) = (run.machine.clone(), run.process);
        Ok(Going { machine, snapshot, disks, process, stdio, hostname: None, record })
    }
}

impl Entry {
    /// Has the memory of `snapshot` come in this way. Where it is to be recorded what the machine needs, if it is.
    fn bring(&self, memory: &Memory, snapshot: &mut Snapshot) -> Result<Option<PathBuf>, Failure> {
        if let Memory::Source(source) = memory {
            if let Some(base) = &self.manifest.run.machine.base {
                let why =
                    format!("of its memory there is only what differs from that of snapshot {}", base.name);
                return Err(Failure::new(format!("{why}, and what is elsewhere must be whole")).refused());
            }
            snapshot.source = Some(source.clone());
            return Ok(None);
        }
        check_file(&snapshot.memory, 0)?;
        if *memory == Memory::AsTouched {
            return Ok(None);
        }
        let path = self.directory.join(WORKING_SET);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Some(path)),
            _ => {
                check_file(&path, 0)?;
                snapshot.working_set = Some(path);
                Ok(None)
            }
        }
    }
}

/// How the memory of a machine that goes on comes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Memory {
    /// From the snapshot's file, each page when it is first touched.
    #[default]
    AsTouched,
    /// The same, but what one before it needed is there beforehand. Of the first, it is recorded.
    Beforehand,
    /// From elsewhere, each page when it is first touched.
    Source(MemorySource),
}

/// A base that nobody removes as long as this is there.
#[derive(Debug)]
pub(super) struct HeldBase {
    pub(super) memory: BaseMemory,
    _lock: Flock<File>,
}

/// Copies a disk with its holes; blocks are shared where the file system can.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let from = File::open(from)?;
    let to = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    copy_sparse(&from, &to, from.metadata()?.len())
}

impl Snapshots {
    /// Those of the state directory `state`, which need not be there.
    pub fn of(state: &Path) -> Self {
        Self { catalog: Catalog { root: state.join(DIRECTORY) } }
    }

    /// The snapshot of this name.
    ///
    /// # Errors
    /// There is none, or it cannot be understood.
    pub fn get(&self, name: &str) -> Result<Entry, Failure> {
        self.entry(&self.there(name)?)
    }

    /// A snapshot's name, if there is one of it.
    fn there(&self, name: &str) -> Result<MachineId, Failure> {
        let id = name.parse().ok().filter(|id| self.path(id).is_dir());
        id.ok_or_else(|| {
            Failure::new(format!("there is no snapshot {name}"))
                .help("`mvm snapshot ls` lists those there are")
        })
    }

    fn entry(&self, name: &MachineId) -> Result<Entry, Failure> {
        let directory = self.path(name);
        let manifest = Manifest::read(&self.catalog.manifest(name.as_str()))?;
        if manifest.name != *name {
            let why = format!("snapshot {name} says that it is {}", manifest.name);
            return Err(
                Failure::new(why).help(format!("give its directory that name: {}", directory.display()))
            );
        }
        // What has another name as well is a cached image.
        let taken = self.catalog.disk_bytes(name.as_str());
        let disk_bytes = taken.context(|| format!("cannot read {}", directory.display()))?;
        Ok(Entry { manifest, disk_bytes, directory })
    }

    /// Names of all, whether or not they can be understood, in no order.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> Result<Vec<MachineId>, Failure> {
        self.catalog.names()
    }

    /// All snapshots that can be understood, the latest first, and why the others cannot.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<(Vec<Entry>, Vec<Failure>), Failure> {
        let (mut found, mut broken) = (Vec::new(), Vec::new());
        for name in self.names()? {
            match self.entry(&name) {
                Ok(entry) => found.push(entry),
                // Removed since its name was read.
                Err(_) if !self.catalog.path(name.as_str()).exists() => {}
                Err(failure) => broken.push(failure),
            }
        }
        found.sort_by(|a, b| {
            let key = |it: &Entry| (it.manifest.created, it.manifest.name.clone());
            key(b).cmp(&key(a))
        });
        Ok((found, broken))
    }

    /// Removes the snapshot of this name, whether or not it can be understood. Machines that were made of it go on.
    ///
    /// # Errors
    /// There is none, others need it as their base, or it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), Failure> {
        let (id, failed) = (self.there(name)?, || format!("cannot remove snapshot {name}"));
        // First, so that none comes to need it after those that do were looked for.
        let lock = self.catalog.lock(id.as_str(), FlockArg::LockExclusiveNonblock).context(failed)?;
        let Some(_lock) = lock else {
            return Err(Failure::because(
                failed(),
                Failure::new("another is being saved with it as its base"),
            )
            .help("try again once that is done"));
        };
        let above = self.above(&id)?;
        if !above.is_empty() {
            let (count, names) = (above.len(), above.join(" "));
            let s = if count == 1 { " needs it as its base" } else { "s need it as their base" };
            let why = Failure::new(format!("{count} snapshot{s}: {names}"));
            return Err(Failure::because(failed(), why)
                .help(format!("remove what needs it first: mvm snapshot rm {names}")));
        }
        self.catalog.remove(id.as_str()).context(failed)
    }

    /// Names of the snapshots that have this one as their base. Of one that cannot be understood nobody knows.
    fn above(&self, base: &MachineId) -> Result<Vec<String>, Failure> {
        let needs =
            |it: &Entry| it.manifest.run.machine.base.as_ref().is_some_and(|found| found.name == *base);
        let (all, _) = self.list()?;
        let mut names: Vec<_> =
            all.iter().filter(|it| needs(it)).map(|it| it.manifest.name.to_string()).collect();
        names.sort();
        Ok(names)
    }

    /// The snapshot of this name, for another to be saved above it.
    ///
    /// # Errors
    /// There is none, it is being removed, or it is not whole itself.
    pub(super) fn hold_base(&self, name: &str) -> Result<HeldBase, Failure> {
        let (id, failed) = (self.there(name)?, || format!("cannot save above snapshot {name}"));
        let lock = self.catalog.lock(id.as_str(), FlockArg::LockSharedNonblock).context(failed)?;
        let _lock =
            lock.ok_or_else(|| Failure::because(failed(), Failure::new("somebody is removing it")))?;
        let Entry { manifest, directory, .. } = self.entry(&id)?;
        if let Some(below) = manifest.run.machine.base {
            let why = Failure::new(format!("it is changes to snapshot {} itself", below.name));
            return Err(Failure::because(failed(), why).help(format!("name that: --base {}", below.name)));
        }
        let base = Base { name: id, contents: manifest.run.machine.contents };
        // The owner of the container may have been started elsewhere.
        let file = memory_file(&fs::canonicalize(directory).context(failed)?);
        check_file(&file, 0).context(failed)?;
        Ok(HeldBase { memory: BaseMemory { base, file }, _lock })
    }

    /// Whether a snapshot can be made under this name.
    ///
    /// # Errors
    /// There is one.
    pub(super) fn check_free(&self, name: &MachineId) -> Result<(), Failure> {
        if self.path(name).exists() {
            return Err(Failure::new(format!("there is a snapshot {name} already"))
                .help(format!("choose another name, or remove it: mvm snapshot rm {name}")));
        }
        Ok(())
    }

    /// Where the digest of the machines' program is on record.
    pub(super) fn known_program(&self) -> PathBuf {
        self.catalog.root.with_file_name(PROGRAM)
    }

    /// A directory for a snapshot that is being made.
    pub(crate) fn begin(&self) -> Result<Scratch, Failure> {
        self.catalog.begin()
    }

    /// The directory becomes the snapshot of this manifest.
    pub(super) fn install(&self, new: Scratch, manifest: &Manifest) -> Result<(), Failure> {
        let name = &manifest.name;
        let failed = || format!("cannot keep snapshot {name}");
        note(new.path(), manifest).context(failed)?;
        self.check_free(name)?;
        self.catalog.install(new, name.as_str()).context(failed)
    }

    fn path(&self, name: &MachineId) -> PathBuf {
        self.catalog.path(name.as_str())
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
