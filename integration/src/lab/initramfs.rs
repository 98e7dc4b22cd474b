//! The emulated host's image: a kernel and an initramfs, made once and cached by the content of what they are made of.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use super::Error;
use super::emulator::Emulator;
use super::kernel::{Kernel, create, find_programs, remove, run, which};
use super::modules;

const INIT: &str = include_str!("../../lab/init");
const MAIN: &str = include_str!("../../lab/main");
/// What makes the image is one of its inputs.
const BUILDER: &str = include_str!("initramfs.rs");
const MODULES: &str = include_str!("modules.rs");
/// How long an image of another build is kept.
const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);
/// Mount points and such.
const DIRECTORIES: [&str; 9] = ["bin", "dev", "proc", "m", "job", "host", "rw", "new", "tmp"];

/// What QEMU boots.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel, an ELF image.
    pub kernel: PathBuf,
    /// The initramfs, uncompressed.
    pub initramfs: PathBuf,
    /// The kernel's `uname -r`.
    pub release: String,
    /// What boots it.
    pub emulator: Emulator,
}

impl Image {
    /// The image in the cache directory (`MVM_CACHE`, else `$XDG_CACHE_HOME/mvm`, else `~/.cache/mvm`); the first call
    /// makes it, which takes about 20 s.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], [`Error::NoKernel`] or what failed on the way.
    pub fn prepare() -> Result<Self, Error> {
        find_programs()?;
        let cache = cache_directory().join("lab");
        create(&cache)?;
        let _lock = lock(&cache.join("lock"))?;
        let emulator = Emulator::prepare(&cache)?;
        let kernel = Kernel::prepare(&cache)?;
        let busybox = which("busybox").unwrap_or_default();
        let busybox = fs::read(&busybox).map_err(Error::file("read", &busybox))?;
        let key = key(&[INIT, MAIN, BUILDER, MODULES, &kernel.tree.to_string_lossy()], &busybox);
        let initramfs = cache.join(format!("initramfs-{key}"));
        if !initramfs.is_file() {
            prune(&cache)?;
            let partial = cache.join(format!("initramfs-{key}.partial"));
            let archive = build(&kernel, &busybox, &cache)?;
            fs::write(&partial, archive).map_err(Error::file("write", &partial))?;
            fs::rename(&partial, &initramfs).map_err(Error::file("rename", &partial))?;
        }
        Ok(Self { kernel: kernel.vmlinux, initramfs, release: kernel.release, emulator })
    }
}

fn cache_directory() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("MVM_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("mvm")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/mvm")))
        .unwrap_or_else(|| PathBuf::from("/var/cache/mvm"))
}

/// Removes images that nobody has made anew for a week; other checkouts may use the younger ones.
fn prune(cache: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(cache).map_err(Error::file("list", cache))?.flatten() {
        let old = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > WEEK));
        if old && entry.file_name().to_string_lossy().starts_with("initramfs-") {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// One process makes the image, the others wait for it.
fn lock(path: &Path) -> Result<Flock<fs::File>, Error> {
    let file = fs::File::create(path).map_err(Error::file("create", path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::file("lock", path)(errno.into()))
}

fn key(texts: &[&str], binary: &[u8]) -> String {
    let mut hash = Sha256::new();
    for part in texts.iter().map(|text| text.as_bytes()).chain([binary]) {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn build(kernel: &Kernel, busybox: &[u8], cache: &Path) -> Result<Vec<u8>, Error> {
    let mut archive = Cpio::default();
    for directory in DIRECTORIES {
        archive.entry(directory, 0o040_755, &[]);
    }
    archive.node("dev/console", 0o020_600, (5, 1));
    archive.entry("bin/busybox", 0o100_755, busybox);
    archive.entry("init", 0o100_755, INIT.as_bytes());
    archive.entry("main", 0o100_644, MAIN.as_bytes());
    let modules = modules::load(kernel)?;
    let order: String =
        modules.iter().filter(|module| module.at_boot).map(|module| format!("{}\n", module.file)).collect();
    archive.entry("m/order", 0o100_644, order.as_bytes());
    for module in &modules {
        archive.entry(&format!("m/{}", module.file), 0o100_644, &module.bytes);
    }
    for (name, bytes) in index(kernel, &modules, cache)? {
        archive.entry(&format!("m/{name}"), 0o100_644, &bytes);
    }
    Ok(archive.finish())
}

/// modprobe's index of just these modules.
fn index(
    kernel: &Kernel,
    modules: &[modules::Module],
    cache: &Path,
) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let staging = cache.join("index.partial");
    remove(&staging)?;
    let dir = staging.join("lib/modules").join(&kernel.release);
    create(&dir)?;
    for module in modules {
        let path = dir.join(&module.file);
        fs::write(&path, &module.bytes).map_err(Error::file("write", &path))?;
    }
    let builtin = format!("lib/modules/{}", kernel.release);
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        let (from, to) = (kernel.tree.join(&builtin).join(name), dir.join(name));
        fs::copy(&from, &to).map_err(Error::file("copy", &from))?;
    }
    run("depmod", [Path::new("-b"), &staging, Path::new(&kernel.release)], &staging)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("modules.") {
            let bytes = fs::read(entry.path()).map_err(Error::file("read", entry.path()))?;
            files.push((name, bytes));
        }
    }
    files.sort();
    remove(&staging)?;
    Ok(files)
}

/// A cpio archive in the kernel's own format (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.record(name, mode, content, (0, 0));
    }

    fn node(&mut self, name: &str, mode: u32, device: (u32, u32)) {
        self.record(name, mode, &[], device);
    }

    fn record(&mut self, name: &str, mode: u32, content: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        let fields = [self.entries, mode, 0, 0, 1, 0];
        let sizes = [content.len(), 0, 0, major as usize, minor as usize, name.len() + 1, 0];
        let mut header = String::from("070701");
        header.extend(fields.iter().map(|field| format!("{field:08x}")));
        header.extend(sizes.iter().map(|size| format!("{size:08x}")));
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_key_tells_neighbouring_texts_apart() {
        assert_ne!(key(&["ab", "c"], b""), key(&["a", "bc"], b""));
        assert_ne!(key(&["a"], b"x"), key(&["a"], b"y"));
        assert_eq!(key(&["a"], b"x"), key(&["a"], b"x"));
    }

    #[test]
    fn the_archive_is_readable_by_cpio() {
        let mut archive = Cpio::default();
        archive.entry("dir", 0o040_755, &[]);
        archive.entry("dir/file", 0o100_644, b"12345");
        let bytes = archive.finish();
        let mut child = std::process::Command::new("cpio")
            .args(["-i", "--to-stdout", "--quiet", "dir/file"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert_eq!(child.wait_with_output().unwrap().stdout, b"12345");
    }
}
