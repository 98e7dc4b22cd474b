//! From a registry's documents and blobs to an image layout.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use futures_util::StreamExt as _;
use oci_client::Reference;
use oci_client::client::Client;
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
};
use oci_client::secrets::RegistryAuth;
use serde_json::json;

use super::registry_error;
use crate::image::digest::Digest;
use crate::image::error::{Error, Result};
use crate::image::layer::matches_digest;
use crate::image::limits::{MAX_JSON_BYTES, MAX_TOTAL_BYTES};
use crate::image::oci::{self, BlobRef, MAX_NESTING, Step};
use crate::image::progress::{Phase, Progress};

/// What a manifest or index may be.
const ACCEPTED: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

/// One image of a registry, and the layout it goes to.
pub(super) struct Fetch<'a> {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    layout: &'a Path,
}

impl<'a> Fetch<'a> {
    pub(super) fn new(
        client: Client,
        reference: Reference,
        auth: RegistryAuth,
        layout: &'a Path,
    ) -> Result<Self> {
        let fetch = Self { client, reference, auth, layout };
        for algorithm in ["sha256", "sha512"] {
            let path = layout.join("blobs").join(algorithm);
            fs::create_dir_all(&path).map_err(|source| Error::Write { path, source })?;
        }
        fetch.write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(fetch)
    }

    /// Fetches index, manifest and configuration, and makes a place for each layer.
    pub(super) async fn documents(&self, name: &str) -> Result<Vec<BlobRef>> {
        let mut reference = self.reference.clone();
        for nesting in 0..MAX_NESTING {
            let pulled = self.client.pull_manifest_raw(&reference, &self.auth, &ACCEPTED).await;
            let (bytes, digest) = pulled.map_err(registry_error)?;
            let digest = oci::parse_digest(&digest, "the registry's answer")?;
            self.write(&digest.blob_path(), &bytes)?;
            if nesting == 0 {
                let top = json!({ "digest": digest.to_string(), "size": bytes.len(),
                    "annotations": { "io.containerd.image.name": name } });
                let index = json!({ "schemaVersion": 2, "manifests": [top] });
                self.write("index.json", index.to_string().as_bytes())?;
            }
            match oci::step(&bytes, &digest)? {
                Step::Index(next) => reference = self.reference.clone_with_digest(next.digest.to_string()),
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
        let digest = blob.digest.to_string();
        let pulled = self.client.pull_blob_stream(&self.reference, digest.as_str()).await;
        let mut stream = pulled.map_err(registry_error)?.stream;
        let (mut hasher, mut got) = (blob.digest.hasher(), 0_u64);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|source| Error::Read { what: what(), source })?;
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
