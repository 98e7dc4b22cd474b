//! OCI image layouts: index → manifest → configuration and layers (OCI image specification,
//! `image-layout.md`, `image-index.md`, `manifest.md`, `config.md`).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::blobs::Blobs;
use super::config::ImageConfig;
use super::digest::Digest;
use super::error::{Error, Result};
use super::layer::Layer;
use super::limits::MAX_LAYERS;
use super::reference::{Choice, Wanted};

/// The platform images have to be for.
const OS: &str = "linux";
const ARCHITECTURE: &str = "amd64";

/// Annotation with the image's name, in the layout's own words.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation with the full name, as containerd and docker write it.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Indexes in indexes are rare; endless ones are an attack.
pub(super) const MAX_NESTING: usize = 4;

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// An index or a manifest: which one, its members tell more surely than its media type.
#[derive(Debug, Deserialize)]
struct Document {
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

/// An image's configuration, as far as it concerns us.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<ImageConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Option<Vec<String>>,
}

/// An image that was found, with its layers still packed.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) name: Option<String>,
    pub(super) digest: Option<String>,
    pub(super) config: ImageConfig,
    pub(super) layers: Vec<Layer>,
}

/// Finds the image `wanted` in a layout.
pub(super) fn resolve(blobs: &Blobs, wanted: Option<&Wanted>, choice: &Choice<'_>) -> Result<Resolved> {
    let index: Index = blobs.json("index.json")?.ok_or_else(|| missing("index.json"))?;
    let images: Vec<Descriptor> = index.manifests.into_iter().filter(Descriptor::is_image).collect();
    let named: Vec<(Option<String>, String)> =
        images.iter().map(|image| (image.name(), image.digest.clone())).collect();
    let fitting = images
        .into_iter()
        .filter(|image| wanted.is_none_or(|wanted| wanted.fits(&image.names(), &image.digest)));
    let mut fitting: Vec<Descriptor> = fitting.collect();
    if fitting.len() > 1 {
        // One image for several platforms, listed flat.
        let same_name = fitting.windows(2).all(|pair| pair[0].name() == pair[1].name());
        if same_name && fitting.iter().all(|image| image.platform.is_some()) {
            fitting = vec![for_this_platform(fitting)?];
        }
    }
    let chosen = choice.only(fitting, &named)?;
    let (name, digest) = (chosen.name(), Some(chosen.digest.clone()));
    let (config, layers) = manifest(blobs, chosen)?;
    let (config, layers) = image(blobs, &config, layers)?;
    Ok(Resolved { name, digest, config, layers })
}

/// Follows a descriptor through indexes to a manifest for this platform.
fn manifest(blobs: &Blobs, mut descriptor: Descriptor) -> Result<(Descriptor, Vec<Descriptor>)> {
    for _ in 0..MAX_NESTING {
        let digest = descriptor.digest()?;
        let document: Document = blobs.document("manifest", &digest.blob_path(), &digest)?;
        match document.follow(&digest, &descriptor.media_type)? {
            Ok(manifest) => return Ok(manifest),
            Err(next) => descriptor = next,
        }
    }
    Err(Error::Limit { what: "indexes in indexes", limit: MAX_NESTING as u64 })
}

impl Document {
    /// Configuration and layers of a manifest, or where to look next.
    fn follow(
        self,
        digest: &Digest,
        media_type: &str,
    ) -> Result<std::result::Result<(Descriptor, Vec<Descriptor>), Descriptor>> {
        match self {
            Self { config: Some(config), layers, .. } => Ok(Ok((config, layers.unwrap_or_default()))),
            Self { manifests: Some(manifests), .. } => for_this_platform(manifests).map(Err),
            Self { .. } => {
                let reason = format!("neither a manifest nor an index (media type {media_type:?})");
                Err(Error::Malformed { what: format!("manifest {digest}"), reason })
            }
        }
    }
}

/// A blob as a document names it.
#[cfg(feature = "pull")]
#[derive(Clone, Debug)]
pub(super) struct BlobRef {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// Where a document leads.
#[cfg(feature = "pull")]
pub(super) enum Step {
    /// To another one.
    Index(BlobRef),
    /// To everything an image has.
    Manifest { config: BlobRef, layers: Vec<BlobRef> },
}

/// Reads an index or a manifest that was just fetched.
#[cfg(feature = "pull")]
pub(super) fn step(bytes: &[u8], digest: &Digest) -> Result<Step> {
    let what = format!("manifest {digest}");
    let document: Document = super::blobs::parse(bytes, &what)?;
    let blob = |it: &Descriptor| Ok::<_, Error>(BlobRef { digest: it.digest()?, size: it.size });
    Ok(match document.follow(digest, "unknown")? {
        Err(next) => Step::Index(blob(&next)?),
        Ok((_, layers)) if layers.len() > MAX_LAYERS => {
            return Err(Error::Limit { what: "layers of an image", limit: MAX_LAYERS as u64 });
        }
        Ok((config, layers)) => {
            Step::Manifest { config: blob(&config)?, layers: layers.iter().map(blob).collect::<Result<_>>()? }
        }
    })
}

fn for_this_platform(manifests: Vec<Descriptor>) -> Result<Descriptor> {
    let mut images: Vec<Descriptor> = manifests.into_iter().filter(Descriptor::is_image).collect();
    if let Some(at) = images.iter().position(Descriptor::is_for_this_platform) {
        return Ok(images.swap_remove(at));
    }
    // Without a word about platforms, the configuration will tell.
    if let [_] = images.as_slice() {
        if let Some(only) = images.pop().filter(|only| only.platform.is_none()) {
            return Ok(only);
        }
        images.clear();
    }
    let found = images.iter().filter_map(|image| image.platform.as_ref());
    let found: Vec<String> = found
        .map(|found| format!("{}/{}", found.os.escape_debug(), found.architecture.escape_debug()))
        .collect();
    Err(Error::Platform {
        found: if found.is_empty() { "other platforms".to_owned() } else { found.join(", ") },
    })
}

fn image(blobs: &Blobs, config: &Descriptor, layers: Vec<Descriptor>) -> Result<(ImageConfig, Vec<Layer>)> {
    let stored = layers.into_iter().map(|layer| {
        let digest = layer.digest()?;
        let blob = blobs.open(&digest.blob_path())?;
        let blob = blob.ok_or_else(|| Error::MissingBlob { what: format!("layer {digest}") })?;
        if blob.len() != layer.size {
            return Err(Error::Digest {
                what: format!("layer {digest}"),
                expected: format!("{} bytes", layer.size),
                found: format!("{} bytes", blob.len()),
            });
        }
        Ok((blob, Some(digest)))
    });
    if config.media_type.ends_with("+json") && !config.media_type.contains("image") {
        let reason = format!("it is no container image but {:?}", config.media_type);
        return Err(Error::Malformed { what: format!("manifest with {}", config.digest), reason });
    }
    let digest = config.digest()?;
    configuration(blobs, &digest.blob_path(), &digest, stored)
}

/// Reads a configuration and joins its layers' digests with the stored layers.
pub(super) fn configuration(
    blobs: &Blobs,
    path: &str,
    digest: &Digest,
    stored: impl ExactSizeIterator<Item = Result<(super::slice::FileSlice, Option<Digest>)>>,
) -> Result<(ImageConfig, Vec<Layer>)> {
    let what = format!("configuration {digest}");
    if stored.len() > MAX_LAYERS {
        return Err(Error::Limit { what: "layers of an image", limit: MAX_LAYERS as u64 });
    }
    let file: ConfigFile = blobs.document("configuration", path, digest)?;
    if (file.os.as_str(), file.architecture.as_str()) != (OS, ARCHITECTURE) {
        let found = format!("{}/{}", file.os.escape_debug(), file.architecture.escape_debug());
        return Err(Error::Platform { found });
    }
    let diff_ids = file.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != stored.len() {
        let reason = format!("it speaks of {} layers, the manifest of {}", diff_ids.len(), stored.len());
        return Err(Error::Malformed { what, reason });
    }
    if diff_ids.is_empty() {
        return Err(Error::Malformed {
            what,
            reason: "the image has no layers, nothing could run in it".to_owned(),
        });
    }
    let layers = stored.zip(&diff_ids).map(|(stored, diff_id)| {
        let (blob, digest) = stored?;
        Ok(Layer { blob, digest, diff_id: parse_digest(diff_id, &what)? })
    });
    Ok((file.config.unwrap_or_default(), layers.collect::<Result<_>>()?))
}

impl Descriptor {
    fn digest(&self) -> Result<Digest> {
        parse_digest(&self.digest, "a descriptor")
    }

    fn names(&self) -> Vec<&str> {
        let annotations = self.annotations.iter();
        let names = annotations.flat_map(|all| [CONTAINERD_NAME, REF_NAME].map(|key| all.get(key)));
        names.flatten().map(String::as_str).filter(|name| is_printable(name)).collect()
    }

    fn name(&self) -> Option<String> {
        self.names().first().map(|name| (*name).to_owned())
    }

    /// Build tools put signatures and provenance beside images, for a platform that does not exist.
    fn is_image(&self) -> bool {
        self.platform.as_ref().is_none_or(|platform| platform.os != "unknown")
    }

    fn is_for_this_platform(&self) -> bool {
        let is_ours = |platform: &Platform| platform.os == OS && platform.architecture == ARCHITECTURE;
        self.platform.as_ref().is_some_and(is_ours)
    }
}

/// Names end up on terminals, where some characters are commands.
pub(super) fn is_printable(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(char::is_control)
}

pub(super) fn parse_digest(text: &str, what: &str) -> Result<Digest> {
    text.parse().map_err(|error: super::digest::ParseDigestError| Error::Malformed {
        what: what.to_owned(),
        reason: format!("{text:?} is {error}"),
    })
}

pub(super) fn missing(what: &str) -> Error {
    Error::MissingBlob { what: what.to_owned() }
}
