//! Finished file systems, kept by what they were made from.
//!
//! ```text
//! <root>/<key>.erofs   the file system, complete and durable since it has this name
//! <root>/<key>.json    where it came from and how to run it
//! <root>/<key>.lock    held while it is built or removed
//! <root>/<key>.tmp     being built; left over if the builder died, until the next or a sweep
//! <root>/<key>.new     the same for the record
//! ```
//!
//! Who uses a file system holds a shared lock on it, so that pruning leaves it.

mod names;
mod prune;
#[cfg(feature = "pull")]
mod scratch;

pub use names::Removed;
pub use prune::{Keep, Pruned};

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::config::ImageConfig;
use super::error::{Error, Result};
use super::limits::MAX_JSON_BYTES;
use super::progress::{Phase, Progress};
use super::source::{Format, Key, Source};
use crate::catalog::is_at;
use crate::erofs::{BLOCK_SIZE, Superblock, Writer};

/// A directory of finished file systems. Any number of processes may use it at once.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// A root file system, ready to be a disk.
#[derive(Debug)]
pub struct Rootfs {
    /// The image, open for reading. It stays usable when it is removed from the store, and is not
    /// pruned as long as this is open.
    pub file: Flock<File>,
    /// Where it is.
    pub path: PathBuf,
    /// What it was made from.
    pub key: String,
    /// Its length in bytes, a multiple of 4096.
    pub bytes: u64,
    /// How to run it.
    pub config: ImageConfig,
    /// Whether it was built just now.
    pub built: bool,
}

/// One line of a listing.
#[derive(Clone, Debug, Serialize)]
pub struct Cached {
    /// What it was made from, in hex.
    pub key: String,
    /// The images it is the root file system of: several may have the same layers.
    pub images: Vec<Image>,
    /// Its length in bytes.
    pub bytes: u64,
    /// Bytes it takes on the host.
    pub disk_bytes: u64,
    /// When it was built.
    pub created: SystemTime,
    /// When it was last asked for.
    pub last_used: SystemTime,
}

/// An image that a file system was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name, if it had one.
    pub name: Option<String>,
    /// The path it was found at.
    pub origin: PathBuf,
    /// How it was stored.
    pub format: Format,
    /// Digest of its index or manifest, if it had one.
    #[serde(default)]
    pub digest: Option<String>,
    /// How to run it.
    pub config: ImageConfig,
}

impl Image {
    fn of(source: &Source) -> Self {
        Self {
            name: source.name().map(str::to_owned),
            origin: source.path().to_owned(),
            format: source.format(),
            digest: source.digest().map(str::to_owned),
            config: source.config().clone(),
        }
    }
}

/// What is kept beside a file system.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    created: SystemTime,
    /// The latest comes first.
    images: Vec<Image>,
}

/// Most images remembered for one file system.
const MAX_IMAGES: usize = 32;

impl Store {
    /// Opens a store, and makes its directory if there is none. Only its owner may look inside:
    /// images may hold secrets.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&root);
        made.map_err(|source| Error::Write { path: root.clone(), source })?;
        Ok(Self { root })
    }

    /// The root file system of an image: the one that is there, or else a new one.
    pub fn rootfs(&self, source: &Source, progress: &mut dyn Progress) -> Result<Rootfs> {
        let key = source.key()?;
        let hex = key.hex();
        let image = Image::of(source);
        if let Some((found, record)) = self.find(&hex)?
            && record.images.contains(&image)
        {
            return Ok(Rootfs { config: image.config, ..found });
        }
        let lock = self.lock(&hex, progress)?;
        // Whoever held the lock may have built it.
        if let Some((found, mut record)) = self.find(&hex)? {
            let same_name = |other: &Image| source.is_named() && other.name == image.name;
            record.images.retain(|other| {
                (&other.name, &other.origin) != (&image.name, &image.origin) && !same_name(other)
            });
            record.images.insert(0, image.clone());
            record.images.truncate(MAX_IMAGES);
            self.replace_record(&hex, &record)?;
            drop(lock);
            self.claim_name(source, &hex)?;
            return Ok(Rootfs { config: image.config, ..found });
        }
        self.build(&key, source, progress)?;
        drop(lock);
        self.claim_name(source, &hex)?;
        let path = self.path(&hex, "erofs");
        let unreadable = || Error::Open { path, source: io::ErrorKind::InvalidData.into() };
        let (found, _) = self.find(&hex)?.ok_or_else(unreadable)?;
        Ok(Rootfs { config: image.config, built: true, ..found })
    }

    /// A name that was given to an image is its alone.
    fn claim_name(&self, source: &Source, key: &str) -> Result<()> {
        match source.name().filter(|_| source.is_named()) {
            Some(name) => self.take_name(name, key),
            None => Ok(()),
        }
    }

    /// A file system that is in the store, by its image's name, or by its digest or key or the beginning
    /// of one.
    pub fn get(&self, wanted: &str) -> Result<Rootfs> {
        let key = self.one(wanted)?.key;
        let (found, record) =
            self.find(&key)?.ok_or_else(|| Error::NotCached { wanted: wanted.to_owned() })?;
        let called = |image: &Image| image.name.as_deref().is_some_and(|name| names::is_called(name, wanted));
        let named = record.images.into_iter().find(called);
        Ok(match named {
            Some(image) => Rootfs { config: image.config, ..found },
            None => found,
        })
    }

    /// Everything in the store, the most recently used first.
    pub fn list(&self) -> Result<Vec<Cached>> {
        let mut list: Vec<Cached> =
            self.keys("erofs")?.into_iter().filter_map(|key| self.cached(&key)).collect();
        list.sort_by(|a, b| b.last_used.cmp(&a.last_used).then_with(|| a.key.cmp(&b.key)));
        Ok(list)
    }

    /// Removes what builders that died have left. Those that live are not disturbed.
    pub fn sweep(&self) -> Result<()> {
        for key in self.keys("tmp")?.into_iter().chain(self.keys("new")?) {
            // Held by a builder: it is at work.
            let Some(_lock) = self.lock_now(&key)? else { continue };
            for extension in ["tmp", "new"] {
                remove_if_there(&self.path(&key, extension))?;
            }
        }
        Ok(())
    }

    /// Keys of all files with an extension.
    fn keys(&self, extension: &str) -> Result<Vec<String>> {
        let read = |source| Error::Read { what: self.root.display().to_string(), source };
        let mut keys = Vec::new();
        for entry in self.root.read_dir().map_err(read)? {
            let path = entry.map_err(read)?.path();
            if path.extension().is_some_and(|found| found == extension) {
                keys.extend(path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
            }
        }
        Ok(keys)
    }

    fn path(&self, key: &str, extension: &str) -> PathBuf {
        self.root.join(format!("{key}.{extension}"))
    }

    fn cached(&self, key: &str) -> Option<Cached> {
        let image = self.path(key, "erofs").metadata().ok()?;
        let beside = self.path(key, "json");
        let Record { created, images } = read_record(&beside).ok()?;
        let last_used = beside.metadata().and_then(|metadata| metadata.modified()).unwrap_or(created);
        let (bytes, disk_bytes) = (image.len(), image.blocks() * 512);
        Some(Cached { key: key.to_owned(), images, bytes, disk_bytes, created, last_used })
    }

    /// The finished file system of a key and what is known about it, if it is there and sound.
    fn find(&self, key: &str) -> Result<Option<(Rootfs, Record)>> {
        let path = self.path(key, "erofs");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Open { path, source }),
        };
        let file = Flock::lock(file, FlockArg::LockShared)
            .map_err(|(_, errno)| Error::Open { path: path.clone(), source: errno.into() })?;
        if !is_at(&file, &path) {
            // Pruned while it was opened.
            return Ok(None);
        }
        let Some(bytes) = sound_length(&file) else {
            log::warn!("{} is damaged, and built anew", path.display());
            return Ok(None);
        };
        let beside = self.path(key, "json");
        let Ok(record) = read_record(&beside) else { return Ok(None) };
        let touched = File::options().append(true).open(&beside);
        if let Err(error) = touched.and_then(|file| file.set_modified(SystemTime::now())) {
            log::debug!("cannot note that {} is used: {error}", path.display());
        }
        let config = record.images.first().map(|image| image.config.clone()).unwrap_or_default();
        Ok(Some((Rootfs { file, path, key: key.to_owned(), bytes, config, built: false }, record)))
    }

    fn build(&self, key: &Key, source: &Source, progress: &mut dyn Progress) -> Result<()> {
        let hex = key.hex();
        let temporary = self.path(&hex, "tmp");
        let built = self.build_at(&temporary, key, source, progress);
        if built.is_err() {
            // The error says more than a failure to tidy up would.
            drop(fs::remove_file(&temporary));
            drop(fs::remove_file(self.path(&hex, "new")));
        }
        built
    }

    fn build_at(
        &self,
        temporary: &Path,
        key: &Key,
        source: &Source,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let write = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Write { path, source }
        };
        let hex = key.hex();
        remove_if_there(temporary)?;
        let image = create(temporary).map_err(write(temporary))?;
        let spool = tempfile::tempfile_in(&self.root).map_err(write(&self.root))?;
        let mut writer = Writer::new(image, spool);
        let tree = source.unpack(&mut writer, progress)?;
        progress.begin(Phase::Finishing, None);
        let image = writer.finish(&tree, key.uuid())?.file;
        image.sync_all().map_err(write(temporary))?;
        // The record comes first: a file system that is there is complete.
        let record = Record { created: SystemTime::now(), images: vec![Image::of(source)] };
        self.replace_record(&hex, &record)?;
        fs::rename(temporary, self.path(&hex, "erofs")).map_err(write(temporary))?;
        File::open(&self.root).and_then(|root| root.sync_all()).map_err(write(&self.root))
    }

    /// Writes a record in the place of the one that is there.
    fn replace_record(&self, key: &str, record: &Record) -> Result<()> {
        let (new, there) = (self.path(key, "new"), self.path(key, "json"));
        write_record(&new, record)?;
        fs::rename(&new, &there).map_err(|source| Error::Write { path: there, source })
    }

    /// Waits for the right to build or remove what belongs to a key.
    fn lock(&self, key: &str, progress: &mut dyn Progress) -> Result<Flock<File>> {
        loop {
            if let Some(lock) = self.lock_now(key)? {
                return Ok(lock);
            }
            progress.begin(Phase::Waiting, None);
            let (path, file) = self.lock_file(key)?;
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| Error::Write { path, source: errno.into() })?;
        }
    }

    /// The right to build or remove what belongs to a key, if nobody else has it.
    fn lock_now(&self, key: &str) -> Result<Option<Flock<File>>> {
        loop {
            let (path, file) = self.lock_file(key)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Its last holder may have removed it: then it is a lock of nothing.
                Ok(lock) if is_at(&lock, &path) => return Ok(Some(lock)),
                Ok(_) => {}
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, errno)) => return Err(Error::Write { path, source: errno.into() }),
            }
        }
    }

    fn lock_file(&self, key: &str) -> Result<(PathBuf, File)> {
        let path = self.path(key, "lock");
        match File::options().create(true).append(true).mode(0o600).open(&path) {
            Ok(file) => Ok((path, file)),
            Err(source) => Err(Error::Write { path, source }),
        }
    }
}

/// Removes all files of a key, whose lock is held.
fn remove_entry(store: &Store, key: &str) -> Result<()> {
    ["erofs", "json", "tmp", "new", "lock"]
        .iter()
        .try_for_each(|extension| remove_if_there(&store.path(key, extension)))
}

/// The length of a file system that has a sound superblock and was not cut.
fn sound_length(mut file: &File) -> Option<u64> {
    let metadata = file.metadata().ok().filter(fs::Metadata::is_file)?;
    let mut first = [0; BLOCK_SIZE as usize];
    file.read_exact(&mut first).ok()?;
    let superblock = Superblock::decode(&first)?;
    (u64::from(superblock.blocks) * BLOCK_SIZE == metadata.len()).then_some(metadata.len())
}

fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn read_record(path: &Path) -> Result<Record> {
    let open = |source| Error::Open { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(open)?;
    file.take(MAX_JSON_BYTES).read_to_end(&mut text).map_err(open)?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { what: path.display().to_string(), source })
}

fn write_record(path: &Path, record: &Record) -> Result<()> {
    let write = |source| Error::Write { path: path.to_owned(), source };
    let text = serde_json::to_vec_pretty(record)
        .map_err(|source| Error::Json { what: path.display().to_string(), source })?;
    remove_if_there(path)?;
    let mut file = create(path).map_err(write)?;
    file.write_all(&text).map_err(write)?;
    file.sync_all().map_err(write)
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
