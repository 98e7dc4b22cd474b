//! What can go wrong between an image and its file system, told to people.

use std::io;
use std::path::PathBuf;

use super::digest::Digest;
use crate::erofs;

/// Why an image could not be opened, read, unpacked or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the host cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// A file of the host cannot be read.
    #[error("cannot read {what}")]
    Read {
        /// The file or blob.
        what: String,
        /// What the host says.
        source: io::Error,
    },
    /// A file of the host cannot be changed.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// None of the known formats.
    #[error("{} is not a container image: {tried}", path.display())]
    NotAnImage {
        /// What was given.
        path: PathBuf,
        /// Which formats were tried and what was missing for each.
        tried: String,
    },
    /// The whole host is no root file system for a container.
    #[error("{} is the root directory of this host", path.display())]
    HostRoot {
        /// What was given.
        path: PathBuf,
    },
    /// A root directory with nothing in it.
    #[error("{} is empty: nothing could run in it", path.display())]
    EmptyRoot {
        /// What was given.
        path: PathBuf,
    },
    /// No image by that name.
    #[error("{} holds no image {wanted}", path.display())]
    NoSuchImage {
        /// Where was looked.
        path: PathBuf,
        /// The name asked for.
        wanted: String,
        /// The names there are.
        names: Vec<String>,
    },
    /// Several images, and no name given.
    #[error("{} holds {} images", path.display(), names.len())]
    SeveralImages {
        /// Where was looked.
        path: PathBuf,
        /// The names there are.
        names: Vec<String>,
    },
    /// The image is for other machines.
    #[error("the image is for {found}, this host runs linux/amd64")]
    Platform {
        /// The platforms there are.
        found: String,
    },
    /// An index, manifest or configuration that does not parse.
    #[error("cannot parse {what}")]
    Json {
        /// The document.
        what: String,
        /// Where it stopped making sense.
        source: serde_json::Error,
    },
    /// A document that parses but does not describe an image.
    #[error("{what}: {reason}")]
    Malformed {
        /// The document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A blob that is named but not there.
    #[error("{what} is missing")]
    MissingBlob {
        /// The blob.
        what: String,
    },
    /// Bytes that are not what their digest says.
    #[error("{what} does not match its digest: expected {expected}, found {found}")]
    Digest {
        /// The blob.
        what: String,
        /// The digest by which it was found.
        expected: String,
        /// The digest of its bytes.
        found: String,
    },
    /// More than we are ready to take.
    #[error("{what}: more than the limit of {limit}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is possible.
        limit: u64,
    },
    /// A tar stream that cannot be followed.
    #[error("bad tar entry: {reason}")]
    Tar {
        /// What is wrong.
        reason: String,
    },
    /// A tar entry that cannot be put into the tree.
    #[error("cannot place {path}: {reason}")]
    Entry {
        /// The entry, printable.
        path: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// Something above, in a layer.
    #[error("cannot unpack layer {number} of {count} ({digest})")]
    Layer {
        /// Which layer, from 1.
        number: usize,
        /// How many there are.
        count: usize,
        /// The layer's digest, unpacked.
        digest: String,
        /// What happened.
        source: Box<Error>,
    },
    /// Something above, in a directory of the host.
    #[error("cannot take in {}", path.display())]
    HostFile {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: Box<Error>,
    },
    /// The file system image could not be made.
    #[error("cannot build the file system image")]
    Erofs(#[from] erofs::Error),
    /// Text that names no image.
    #[error("{name} is no name of an image: {reason}")]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Something above or below, on the way from a registry.
    #[error("cannot pull {name}")]
    Pull {
        /// The image.
        name: String,
        /// What happened.
        source: Box<Error>,
    },
    /// A registry cannot be reached, or its answer is no success.
    #[error(transparent)]
    Registry(Box<dyn std::error::Error + Send + Sync>),
    /// A registry wants to know who asks, or does not like who it is.
    #[error("the registry refuses: not authorized")]
    Unauthorized,
    /// Plain HTTP with another host.
    #[error("{registry} is not on this host, and is not spoken to without TLS")]
    Insecure {
        /// The registry.
        registry: String,
    },
    /// No cached image by that name.
    #[error("no cached image {wanted}")]
    NotCached {
        /// The name or key asked for.
        wanted: String,
    },
    /// A name that fits several cached images.
    #[error("{wanted} names {count} cached images")]
    Ambiguous {
        /// The name or key asked for.
        wanted: String,
        /// How many it fits.
        count: usize,
    },
}

/// What an operation on images gives.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Says of which image it is.
    #[cfg(feature = "pull")]
    pub(super) fn of_image(self, name: &str) -> Self {
        Self::Pull { name: name.to_owned(), source: Box::new(self) }
    }

    /// What the person in front of it can do, if there is something.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NotAnImage { .. } => Some(
                "give an OCI image layout directory, an archive written by `docker save`, `podman save` or \
                 `skopeo copy`, or a directory with a root file system"
                    .to_owned(),
            ),
            Self::NoSuchImage { path, names, .. } | Self::SeveralImages { path, names } => {
                let mark = |name: &str| if name.parse::<Digest>().is_ok() { '@' } else { ':' };
                let choices = names.iter().map(|name| format!("{}{}{name}", path.display(), mark(name)));
                let choices: Vec<String> = choices.collect();
                (!choices.is_empty()).then(|| format!("choose one of {}", choices.join(", ")))
            }
            Self::HostRoot { .. } | Self::EmptyRoot { .. } => {
                Some("give the directory a distribution was unpacked in".to_owned())
            }
            Self::Platform { .. } => {
                Some("fetch the image again for linux/amd64, as with `--platform linux/amd64`".to_owned())
            }
            Self::Digest { .. } | Self::MissingBlob { .. } => {
                Some("the image is damaged or incomplete: fetch it again".to_owned())
            }
            Self::NotCached { .. } => None,
            Self::Ambiguous { .. } => Some("`mvm image ls` shows names and keys".to_owned()),
            Self::Unauthorized => Some(
                "log in with `docker login`, or give --username and --password-stdin; a private or a missing image \
                 may look like this too"
                    .to_owned(),
            ),
            Self::Insecure { .. } => Some("leave --insecure-http out, and name its authority with --ca-file".to_owned()),
            Self::Layer { source, .. } | Self::HostFile { source, .. } | Self::Pull { source, .. } => source.help(),
            _ => None,
        }
    }
}

/// Bytes of an image as text for a person: controls and invalid UTF-8 escaped, cut to a length.
pub(super) fn printable(bytes: &[u8]) -> String {
    const MAX: usize = 200;
    let shown = bytes.get(..MAX).unwrap_or(bytes);
    let rest = if bytes.len() > MAX { "..." } else { "" };
    format!("{}{rest}", shown.escape_ascii())
}
