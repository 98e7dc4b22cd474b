//! Images made by hand: layers from tar entries, wrapped as layouts and archives.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A tar stream being written.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn directory(self, path: &str) -> Self {
        self.entry(path, tar::EntryType::Directory, b"", |header| header.set_mode(0o755))
    }

    pub(crate) fn file(self, path: &str, body: &[u8]) -> Self {
        self.entry(path, tar::EntryType::Regular, body, |_| {})
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Symlink, b"", |header| header.set_link_name_literal(target).unwrap())
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Link, b"", |header| header.set_link_name_literal(target).unwrap())
    }

    pub(crate) fn device(self, path: &str, kind: tar::EntryType, major: u32, minor: u32) -> Self {
        self.entry(path, kind, b"", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    /// An entry whose path is put into the header as it stands, `..` and all.
    pub(crate) fn entry(
        mut self,
        path: &str,
        kind: tar::EntryType,
        body: &[u8],
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(body.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, body).unwrap();
        self
    }

    /// A PAX header for the entry that follows.
    pub(crate) fn pax(mut self, pairs: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(pairs.iter().copied()).unwrap();
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// How a layer's blob is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Packed {
    Plain,
    Gzip,
    Zstd,
}

impl Packed {
    fn pack(self, bytes: &[u8]) -> (Vec<u8>, &'static str) {
        match self {
            Self::Plain => (bytes.to_vec(), "application/vnd.oci.image.layer.v1.tar"),
            Self::Gzip => (gzip(bytes), "application/vnd.oci.image.layer.v1.tar+gzip"),
            Self::Zstd => {
                (zstd::encode_all(bytes, 3).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")
            }
        }
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An image layout under construction.
pub(crate) struct Layout {
    pub(crate) path: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    pub(crate) fn new(path: &Path) -> Self {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { path: path.to_owned(), manifests: Vec::new() }
    }

    /// Stores a blob and describes it.
    pub(crate) fn blob(&self, bytes: &[u8], media_type: &str) -> Value {
        let digest = digest(bytes);
        fs::write(self.path.join("blobs").join(digest.replace(':', "/")), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    /// Stores an image for `linux/amd64` and describes its manifest.
    pub(crate) fn image(&self, layers: &[(Vec<u8>, Packed)], config: &Value) -> Value {
        self.image_for("amd64", layers, config)
    }

    pub(crate) fn image_for(
        &self,
        architecture: &str,
        layers: &[(Vec<u8>, Packed)],
        config: &Value,
    ) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|(bytes, _)| digest(bytes)).collect();
        let stored: Vec<Value> = layers
            .iter()
            .map(|(bytes, packed)| {
                let (blob, media_type) = packed.pack(bytes);
                self.blob(&blob, media_type)
            })
            .collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": stored,
        });
        self.blob(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json")
    }

    /// Lists a manifest in the index under a name.
    pub(crate) fn list(&mut self, mut manifest: Value, name: &str) {
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        self.list_as_it_is(manifest);
    }

    pub(crate) fn list_as_it_is(&mut self, manifest: Value) {
        self.manifests.push(manifest);
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        fs::write(self.path.join("index.json"), index.to_string()).unwrap();
    }

    /// The layout as a tar archive.
    pub(crate) fn archive(&self, path: &Path) {
        let mut tar = tar::Builder::new(File::create(path).unwrap());
        tar.append_dir_all(".", &self.path).unwrap();
        tar.finish().unwrap();
    }
}

/// A layout with one image of these layers, gzip-packed.
pub(crate) fn layout(path: &Path, layers: Vec<Vec<u8>>) -> PathBuf {
    let layers: Vec<_> = layers.into_iter().map(|bytes| (bytes, Packed::Gzip)).collect();
    let mut layout = Layout::new(path);
    layout.list(layout.image(&layers, &json!({ "Cmd": ["/bin/sh"] })), "latest");
    layout.path
}

/// An archive as `docker save` writes it.
pub(crate) fn docker_archive(path: &Path, images: &[(&str, Vec<Vec<u8>>)]) {
    let mut tar = tar::Builder::new(File::create(path).unwrap());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    };
    let mut manifest = Vec::new();
    for (index, (tag, layers)) in images.iter().enumerate() {
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": ["run", tag] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string();
        let config_name = format!("{}.json", &digest(config.as_bytes())[7..]);
        let names: Vec<String> =
            (0..layers.len()).map(|layer| format!("{index}-{layer}/layer.tar")).collect();
        layers.iter().zip(&names).for_each(|(layer, name)| add(name, layer));
        add(&config_name, config.as_bytes());
        manifest.push(json!({ "Config": config_name, "RepoTags": [tag], "Layers": names }));
    }
    add("manifest.json", Value::from(manifest).to_string().as_bytes());
    tar.finish().unwrap();
}
