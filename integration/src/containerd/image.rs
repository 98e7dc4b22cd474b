//! Images made from nothing but busybox: an OCI archive that `ctr image import` takes.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::EntryType;

/// A shell and everything else, in one static file of Debian's `busybox-static`.
const BUSYBOX: &str = "/bin/busybox";
/// Every image's files are as old as this.
const EPOCH: u64 = 1_700_000_000;

/// A layer being written.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }
}

impl Layer {
    /// Adds a directory.
    ///
    /// # Errors
    /// The path is too long.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(EntryType::Directory, path, mode, b"")
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The path is too long.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(EntryType::Regular, path, mode, content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// A path is too long.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        self.0.append_link(&mut header, path, target)
    }

    /// The layer as a tar file.
    ///
    /// # Errors
    /// None but of memory.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        self.0.into_inner()
    }

    fn entry(&mut self, kind: EntryType, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let mut header = header(kind, mode, content.len());
        self.0.append_data(&mut header, path, content)
    }
}

fn header(kind: EntryType, mode: u32, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(EPOCH);
    header.set_size(size as u64);
    header
}

/// busybox under all its names, and what programs expect to find.
///
/// # Errors
/// busybox-static is not installed.
pub fn busybox() -> io::Result<Layer> {
    let mut layer = Layer::default();
    for dir in ["bin", "dev", "etc", "home", "home/app", "proc", "root", "run", "sys", "work"] {
        layer.directory(dir, 0o755)?;
    }
    layer.directory("tmp", 0o1777)?;
    layer.file("bin/busybox", 0o755, &fs::read(BUSYBOX)?)?;
    let applets = std::process::Command::new(BUSYBOX).arg("--list").output()?.stdout;
    for applet in String::from_utf8_lossy(&applets).lines().filter(|applet| *applet != "busybox") {
        layer.link(&format!("bin/{applet}"), "busybox")?;
    }
    layer.link("sbin", "bin")?;
    let users = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n";
    layer.file("etc/passwd", 0o644, users.as_bytes())?;
    layer.file("etc/group", 0o644, b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")?;
    Ok(layer)
}

/// Images being put into one archive.
pub struct Archive {
    tar: tar::Builder<Vec<u8>>,
    stored: Vec<String>,
    manifests: Vec<Value>,
}

impl Default for Archive {
    fn default() -> Self {
        Self { tar: tar::Builder::new(Vec::new()), stored: Vec::new(), manifests: Vec::new() }
    }
}

impl Archive {
    /// Adds an image called `name` (with its tag) of these finished layers; `config` is the image's own, such as `Cmd`.
    ///
    /// # Errors
    /// None but of memory.
    pub fn image(&mut self, name: &str, layers: &[&[u8]], config: &Value) -> io::Result<()> {
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in layers {
            let descriptor = self.blob("application/vnd.oci.image.layer.v1.tar", layer)?;
            diff_ids.push(descriptor["digest"].clone());
            descriptors.push(descriptor);
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": "2023-11-14T22:13:20Z", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": descriptors});
        let mut manifest = self.blob(kind, manifest.to_string().as_bytes())?;
        manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        self.manifests.push(manifest);
        Ok(())
    }

    /// The whole archive, at `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(mut self, path: &Path) -> io::Result<()> {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        self.append("index.json", index.to_string().as_bytes())?;
        self.append("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        fs::write(path, self.tar.into_inner()?)
    }

    /// Stores a blob once; returns its descriptor.
    fn blob(&mut self, kind: &str, content: &[u8]) -> io::Result<Value> {
        let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        if !self.stored.contains(&hex) {
            self.append(&format!("blobs/sha256/{hex}"), content)?;
            self.stored.push(hex.clone());
        }
        Ok(json!({"mediaType": kind, "digest": format!("sha256:{hex}"), "size": content.len()}))
    }

    fn append(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.tar.append_data(&mut header(EntryType::Regular, 0o644, content.len()), path, content)
    }
}
