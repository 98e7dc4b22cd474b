//! What a person names as an image, recognised by its content.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::blobs::Blobs;
use super::config::ImageConfig;
use super::directory::{self, Notes};
use super::error::{Error, Result};
use super::layer::Layer;
use super::merge::Merger;
use super::oci::Resolved;
use super::progress::{Phase, Progress};
use super::reference::{self, Choice, Wanted};
use super::slice::FileSlice;
use super::{docker, oci, packed};
use crate::erofs::{Tree, WRITER_VERSION, Writer};
use crate::hex::hex;

/// How layers are merged is part of what a cached image depends on; raise it with the rules.
const MERGE_VERSION: u32 = 1;

/// How an image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A directory with `index.json` and `blobs`.
    OciLayout,
    /// A tar archive of such a directory.
    OciArchive,
    /// An archive of `docker save`.
    DockerArchive,
    /// A directory with a root file system.
    Directory,
    /// Lower directories of an overlay mount.
    Overlay,
    /// One directory of an overlay, to be a layer of another.
    Layer,
}

/// Whether a directory still changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// It may: everything in it is looked at to tell whether it did.
    Changing,
    /// It was committed by a snapshotter, and nothing is written to it any more: which directory it is tells all.
    Committed,
}

/// An image or a root directory, found but not unpacked.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    name: Option<String>,
    /// The name was given to it here, and is not just what the image calls itself.
    named: bool,
    digest: Option<String>,
    format: Format,
    config: ImageConfig,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Layers(Vec<Layer>),
    /// Directories, the lowest first.
    Directories(Vec<PathBuf>, Stability),
}

/// Identifies what an image unpacks to: equal keys, equal file systems.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Key([u8; 32]);

impl Key {
    /// 64 hex digits.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// The file system's UUID: made from the key, so that equal content gives equal bytes.
    pub(super) fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.0[..16]);
        // Version 8 (custom), RFC 9562 variant.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }
}

impl Source {
    /// Finds the image that `reference` names: a path, followed by `:name` or `@digest` if there
    /// are several images at the path.
    pub fn open(reference: impl AsRef<Path>) -> Result<Self> {
        let (path, wanted) = reference::split(reference.as_ref());
        let metadata = path.metadata().map_err(|source| Error::Open { path: path.clone(), source })?;
        if metadata.is_dir() {
            return Self::open_directory(path, wanted.as_ref());
        }
        let file = packed::unpack(FileSlice::open(&path)?, &path)?;
        let not_an_image = |tried: String| Error::NotAnImage { path: path.clone(), tried };
        let blobs = match Blobs::index(file) {
            Err(Error::Tar { reason }) => {
                return Err(not_an_image(format!("neither a directory nor a tar archive ({reason})")));
            }
            other => other?,
        };
        let has = |name| Ok::<_, Error>(blobs.open(name)?.is_some());
        let (oci, docker) = (has("index.json")?, has("manifest.json")?);
        if oci {
            Self::from_blobs(path, wanted, Format::OciArchive, &blobs)
        } else if docker {
            Self::from_blobs(path, wanted, Format::DockerArchive, &blobs)
        } else {
            Err(not_an_image(
                "a tar archive without index.json (OCI) and without manifest.json (docker)".to_owned(),
            ))
        }
    }

    /// The lower directories of an overlay mount, as its `lowerdir` option lists them: topmost
    /// first. Whiteouts and opaque directories among them are honoured.
    pub fn overlay(lower: Vec<PathBuf>, stability: Stability) -> Result<Self> {
        let path = lower.first().cloned().unwrap_or_default();
        if lower.is_empty() {
            return Err(Error::EmptyRoot { path });
        }
        Self::of_directories(Format::Overlay, path, lower.into_iter().rev().collect(), stability)
    }

    /// One directory of an overlay. Whiteouts and opaque directories in it stay what they are, for
    /// the overlay it becomes a layer of.
    pub fn layer(directory: PathBuf, stability: Stability) -> Result<Self> {
        Self::of_directories(Format::Layer, directory.clone(), vec![directory], stability)
    }

    /// A root directory, whatever its content looks like.
    pub fn directory(directory: PathBuf) -> Result<Self> {
        Self::of_directories(Format::Directory, directory.clone(), vec![directory], Stability::Changing)
    }

    fn of_directories(
        format: Format,
        path: PathBuf,
        directories: Vec<PathBuf>,
        stability: Stability,
    ) -> Result<Self> {
        directories.iter().try_for_each(|directory| refuse_host_root(directory))?;
        let content = Content::Directories(directories, stability);
        Ok(Self {
            path,
            name: None,
            named: false,
            digest: None,
            format,
            config: ImageConfig::default(),
            content,
        })
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Gives it a name, which no other image in a store has then.
    #[must_use]
    pub fn named(self, name: String) -> Self {
        Self { name: Some(name), named: true, ..self }
    }

    /// Says that it comes from a registry: where it lies now is of no interest later.
    #[cfg(feature = "pull")]
    pub(super) fn pulled(self, name: &str) -> Self {
        Self { path: name.into(), ..self.named(name.to_owned()) }
    }

    /// Whether its name was given by [`Self::named`].
    pub(super) fn is_named(&self) -> bool {
        self.named
    }

    /// Digest of its index or manifest, if it has one.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether it still changes, if it is a directory.
    pub fn stability(&self) -> Option<Stability> {
        match self.content {
            Content::Directories(_, stability) => Some(stability),
            Content::Layers(_) => None,
        }
    }

    /// How to run it; empty for directories.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// Identifies its content. For directories all metadata is read, but no file.
    pub fn key(&self) -> Result<Key> {
        let mut hash = Sha256::new();
        hash.update(format!("mvm rootfs {WRITER_VERSION}.{MERGE_VERSION}\n"));
        match &self.content {
            Content::Layers(layers) => {
                for layer in layers {
                    hash.update(format!("{}\n", layer.diff_id));
                }
            }
            Content::Directories(directories, stability) => {
                // The same directory means something else in an overlay.
                hash.update(format!("{:?}\n", self.format));
                for path in directories {
                    hash.update(match stability {
                        Stability::Changing => directory::fingerprint(path)?,
                        Stability::Committed => directory::identity(path)?,
                    });
                }
            }
        }
        Ok(Key(hash.finalize().into()))
    }

    /// Unpacks into one tree, with the bodies of files in `writer`.
    pub(super) fn unpack(&self, writer: &mut Writer, progress: &mut dyn Progress) -> Result<Tree> {
        let mut merger = Merger::new();
        match &self.content {
            Content::Layers(layers) => {
                let count = layers.len();
                for (layer, number) in layers.iter().zip(1..) {
                    progress.begin(Phase::Layer { number, count }, Some(layer.blob.len()));
                    layer.apply(&mut merger, writer, progress).map_err(|source| Error::Layer {
                        number,
                        count,
                        digest: layer.diff_id.to_string(),
                        source: Box::new(source),
                    })?;
                    merger.next_layer();
                }
            }
            Content::Directories(directories, _) => {
                progress.begin(Phase::Files, None);
                let notes = match self.format {
                    Format::Overlay => Notes::Obeyed,
                    Format::Layer => Notes::Kept,
                    _ => Notes::Ignored,
                };
                for path in directories {
                    directory::take_in(path, notes, &mut merger, writer, progress)?;
                    merger.next_layer();
                }
            }
        }
        Ok(merger.into_tree())
    }

    fn open_directory(path: PathBuf, wanted: Option<&Wanted>) -> Result<Self> {
        let has = |name: &str| path.join(name).symlink_metadata().is_ok();
        if has("oci-layout") || (has("index.json") && has("blobs")) {
            let blobs = Blobs::Directory(path.clone());
            return Self::from_blobs(path, wanted.cloned(), Format::OciLayout, &blobs);
        }
        if let Some(wanted) = wanted {
            let wanted = wanted.text().to_owned();
            return Err(Error::NoSuchImage { path, wanted, names: Vec::new() });
        }
        if has("config.json") && has("rootfs") {
            let tried = "it is a runtime bundle; its root file system is in rootfs/".to_owned();
            return Err(Error::NotAnImage { path, tried });
        }
        let mut entries = path.read_dir().map_err(|source| Error::Open { path: path.clone(), source })?;
        if entries.next().is_none() {
            return Err(Error::EmptyRoot { path });
        }
        Self::directory(path)
    }

    fn from_blobs(path: PathBuf, wanted: Option<Wanted>, format: Format, blobs: &Blobs) -> Result<Self> {
        let choice = Choice { path: &path, wanted: wanted.as_ref() };
        let resolved = match format {
            Format::DockerArchive => docker::resolve(blobs, wanted.as_ref(), &choice),
            _ => oci::resolve(blobs, wanted.as_ref(), &choice),
        };
        let Resolved { name, digest, config, layers } = resolved?;
        Ok(Self { path, name, named: false, digest, format, config, content: Content::Layers(layers) })
    }
}

/// A container whose root is the host's own would be no container.
fn refuse_host_root(path: &Path) -> Result<()> {
    let stat = |path: &Path| {
        let metadata = path.metadata().map_err(|source| Error::Open { path: path.to_owned(), source })?;
        Ok::<_, Error>((metadata.dev(), metadata.ino(), metadata.is_dir()))
    };
    let (dev, ino, is_dir) = stat(path)?;
    if !is_dir {
        let source = std::io::Error::from(std::io::ErrorKind::NotADirectory);
        return Err(Error::Open { path: path.to_owned(), source });
    }
    let (root_dev, root_ino, _) = stat(Path::new("/"))?;
    if (dev, ino) == (root_dev, root_ino) {
        return Err(Error::HostRoot { path: path.to_owned() });
    }
    Ok(())
}
