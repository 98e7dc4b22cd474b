//! From a registry's documents and blobs to an image layout.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use oci_spec::distribution::Reference;
use serde_json::json;

use super::registry::{Registry, network};
use crate::image::digest::Digest;
use crate::image::error::{Error, Result};
use crate::image::layer::matches_digest;
use crate::image::limits::{MAX_JSON_BYTES, MAX_TOTAL_BYTES};
use crate::image::oci::{self, BlobRef, MAX_NESTING, Step};
use crate::image::progress::{Phase, Progress};

/// One image of a registry, and the layout it goes to.
pub(super) struct Fetch<'a> {
    registry: Registry,
    reference: Reference,
    layout: &'a Path,
}

impl<'a> Fetch<'a> {
    pub(super) fn new(registry: Registry, reference: Reference, layout: &'a Path) -> Result<Self> {
        let fetch = Self { registry, reference, layout };
        for algorithm in ["sha256", "sha512"] {
            let path = layout.join("blobs").join(algorithm);
            fs::create_dir_all(&path).map_err(|source| Error::Write { path, source })?;
        }
        fetch.write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(fetch)
    }

    /// Fetches index, manifest and configuration, and makes a place for each layer.
    pub(super) async fn documents(&self, name: &str) -> Result<Vec<BlobRef>> {
        let named = self.reference.digest().map(|digest| oci::parse_digest(digest, "the image's name"));
        let mut wanted = named.transpose()?;
        for nesting in 0..MAX_NESTING {
            let (bytes, digest) = self.document(wanted.as_ref()).await?;
            self.write(&digest.blob_path(), &bytes)?;
            if nesting == 0 {
                let top = json!({ "digest": digest.to_string(), "size": bytes.len(),
                    "annotations": { "io.containerd.image.name": name } });
                let index = json!({ "schemaVersion": 2, "manifests": [top] });
                self.write("index.json", index.to_string().as_bytes())?;
            }
            match oci::step(&bytes, &digest)? {
                Step::Index(next) => wanted = Some(next.digest),
                Step::Manifest { config, layers } => {
                    self.blob(&config, MAX_JSON_BYTES, &mut ()).await?;
                    for layer in &layers {
                        self.place(layer)?;
                    }
                    return Ok(layers);
                }
            }
        }
        Err(Error::Limit { what: "indexes in indexes", limit: MAX_NESTING as u64 })
    }

    /// The index or manifest of this digest, or the one the image's tag names now.
    async fn document(&self, wanted: Option<&Digest>) -> Result<(Vec<u8>, Digest)> {
        let Some(digest) = wanted else {
            let bytes = self.registry.document(self.reference.tag().unwrap_or("latest")).await?;
            let digest = Digest::of(&bytes);
            return Ok((bytes, digest));
        };
        let bytes = self.registry.document(&digest.to_string()).await?;
        let mut hasher = digest.hasher();
        hasher.update(&bytes);
        matches_digest("the registry's index or manifest", hasher, digest)?;
        Ok((bytes, digest.clone()))
    }

    /// Fetches the layers.
    pub(super) async fn layers(&self, layers: &[BlobRef], progress: &mut dyn Progress) -> Result<()> {
        let mut left = MAX_TOTAL_BYTES;
        for (layer, number) in layers.iter().zip(1..) {
            progress.begin(Phase::Fetch { number, count: layers.len() }, Some(layer.size));
            self.blob(layer, left, progress).await?;
            left = left.saturating_sub(layer.size);
        }
        Ok(())
    }

    /// Fetches one blob, at most `limit` bytes and not a byte more than announced.
    async fn blob(&self, blob: &BlobRef, limit: u64, progress: &mut dyn Progress) -> Result<()> {
        if blob.size > limit {
            return Err(Error::Limit { what: "bytes of an image", limit });
        }
        let path = self.path(&blob.digest);
        let write = |source| Error::Write { path: path.clone(), source };
        let what = || format!("blob {}", blob.digest);
        let mut file = File::create(&path).map_err(write)?;
        let mut response = self.registry.blob(&blob.digest).await?;
        let (mut hasher, mut got) = (blob.digest.hasher(), 0_u64);
        while let Some(piece) = response.chunk().await.map_err(network)? {
            got = got.saturating_add(piece.len() as u64);
            if got > blob.size {
                break;
            }
            hasher.update(&piece);
            file.write_all(&piece).map_err(write)?;
            progress.advance(piece.len() as u64);
        }
        if got != blob.size {
            let found = if got > blob.size { "more".to_owned() } else { format!("{got} bytes") };
            return Err(Error::Digest { what: what(), expected: format!("{} bytes", blob.size), found });
        }
        matches_digest(&what(), hasher, &blob.digest)
    }

    /// A file as long as a layer, and nothing in it.
    fn place(&self, layer: &BlobRef) -> Result<()> {
        if layer.size > MAX_TOTAL_BYTES {
            return Err(Error::Limit { what: "bytes of a layer", limit: MAX_TOTAL_BYTES });
        }
        let path = self.path(&layer.digest);
        let made = File::create(&path).and_then(|file| file.set_len(layer.size));
        made.map_err(|source| Error::Write { path, source })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.layout.join(digest.blob_path())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.layout.join(name);
        fs::write(&path, bytes).map_err(|source| Error::Write { path, source })
    }
}
