//! The emulated host's kernel: Debian's package, downloaded and taken apart, never installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::Error;

/// Newest first: 6.12 boots faster under emulation than 6.1 and is what the guest kernel is built from.
const META_PACKAGES: [&str; 2] = ["linux-image-6.12-amd64", "linux-image-amd64"];
/// A linux-image .deb to use instead of a download.
const PACKAGE_VARIABLE: &str = "MVM_LAB_KERNEL";
/// What takes the package apart and makes the image.
const PROGRAMS: [(&str, &str); 6] = [
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("busybox", "busybox-static"),
];

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    /// `uname -r`.
    pub(super) release: String,
    /// The ELF image, started through its PVH note: nothing is decompressed under emulation.
    pub(super) vmlinux: PathBuf,
    /// The package's tree, with `lib/modules/RELEASE` indexed.
    pub(super) tree: PathBuf,
}

pub(super) fn find_programs() -> Result<(), Error> {
    for (program, package) in PROGRAMS {
        if which(program).is_none() {
            return Err(Error::Missing { program, package });
        }
    }
    Ok(())
}

/// `program` in PATH or in the directories that a user's PATH often lacks.
pub(super) fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

impl Kernel {
    /// The kernel in `cache`, downloaded and unpacked there if it is not yet.
    pub(super) fn prepare(cache: &Path) -> Result<Self, Error> {
        let package = std::env::var_os(PACKAGE_VARIABLE).map(PathBuf::from);
        let name = match &package {
            Some(path) => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            None => "debian".to_owned(),
        };
        let tree = cache.join(format!("kernel-{name}"));
        if !tree.is_dir() {
            let staging = cache.join(format!("kernel-{name}.partial"));
            remove(&staging)?;
            create(&staging)?;
            let package = match package {
                Some(path) => path,
                None => download(&staging)?,
            };
            unpack(&package, &staging)?;
            fs::rename(&staging, &tree).map_err(Error::file("rename", &staging))?;
        }
        Self::open(tree)
    }

    fn open(tree: PathBuf) -> Result<Self, Error> {
        let release = release(&tree)?;
        Ok(Self { release, vmlinux: tree.join("vmlinux"), tree })
    }
}

/// The one directory below `lib/modules`.
fn release(tree: &Path) -> Result<String, Error> {
    let modules = tree.join("lib/modules");
    let entry = fs::read_dir(&modules).map_err(Error::file("list", &modules))?.flatten().next();
    entry
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .ok_or(Error::KernelFormat { path: modules, reason: "the package has no modules" })
}

/// Downloads the newest kernel package there is into `dir`.
fn download(dir: &Path) -> Result<PathBuf, Error> {
    let mut reason = String::new();
    for refresh in [false, true] {
        if refresh {
            if !nix::unistd::geteuid().is_root() {
                break;
            }
            run("apt-get", ["-qq", "update"], dir)?;
        }
        for meta in META_PACKAGES {
            let Some(package) = dependency(meta, dir)? else {
                reason = format!("apt knows no {meta}");
                continue;
            };
            match run("apt-get", ["-qq", "download", &package], dir) {
                Ok(_) => return downloaded(dir, &package),
                Err(error) => reason = error.to_string(),
            }
        }
    }
    Err(Error::NoKernel { reason })
}

/// The image package that the meta package `meta` stands for.
fn dependency(meta: &str, dir: &Path) -> Result<Option<String>, Error> {
    let Ok(output) = run("apt-cache", ["depends", "--important", meta], dir) else { return Ok(None) };
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned))
}

fn downloaded(dir: &Path, package: &str) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(dir).map_err(Error::file("list", dir))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some(OsStr::new("deb")))
        .ok_or_else(|| Error::NoKernel { reason: format!("apt-get download {package} left no file") })
}

fn unpack(package: &Path, tree: &Path) -> Result<(), Error> {
    run("dpkg-deb", [OsStr::new("-x"), package.as_os_str(), tree.as_os_str()], tree)?;
    let release = release(tree)?;
    let image = tree.join(format!("boot/vmlinuz-{release}"));
    let bzimage = fs::read(&image).map_err(Error::file("read", &image))?;
    let payload = payload(&bzimage).map_err(|reason| Error::KernelFormat { path: image.clone(), reason })?;
    let packed = tree.join("vmlinux.packed");
    fs::write(&packed, payload.bytes).map_err(Error::file("write", &packed))?;
    let vmlinux = tree.join("vmlinux");
    let file = fs::File::create(&vmlinux).map_err(Error::file("create", &vmlinux))?;
    run_to(payload.program, [OsStr::new("-dc"), packed.as_os_str()], tree, file.into())?;
    remove(&packed)?;
    if package.starts_with(tree) {
        remove(package)?;
    }
    run("depmod", [OsStr::new("-b"), tree.as_os_str(), OsStr::new(&release)], tree)?;
    Ok(())
}

/// The compressed ELF image inside a bzImage and what unpacks it.
struct Payload<'a> {
    bytes: &'a [u8],
    program: &'static str,
}

/// Finds the payload by the boot protocol's setup header (Documentation/arch/x86/boot.rst: setup_sects at 0x1f1,
/// payload_offset at 0x248, payload_length at 0x24c).
fn payload(bzimage: &[u8]) -> Result<Payload<'_>, &'static str> {
    let word = |at: usize| -> Option<usize> {
        let bytes = bzimage.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if bzimage.get(0x202..0x206) != Some(b"HdrS") {
        return Err("no setup header");
    }
    let sectors = match bzimage.get(0x1f1) {
        Some(0) | None => 4,
        Some(&n) => usize::from(n),
    };
    let (Some(offset), Some(length)) = (word(0x248), word(0x24c)) else { return Err("no payload") };
    let start = (sectors + 1) * 512 + offset;
    // The last four bytes are the unpacked size, appended by the kernel's build.
    let end = (start + length).checked_sub(4).ok_or("payload too short")?;
    let bytes = bzimage.get(start..end).ok_or("payload past the end")?;
    match bytes {
        [0xfd, b'7', b'z', ..] => Ok(Payload { bytes, program: "xz" }),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Payload { bytes, program: "zstd" }),
        _ => Err("compressed neither by xz nor by zstd"),
    }
}

/// Runs one of [`PROGRAMS`] in `dir`; its last line of standard error becomes the error's text.
pub(super) fn run<S: AsRef<OsStr>>(
    program: &'static str,
    args: impl IntoIterator<Item = S>,
    dir: &Path,
) -> Result<Output, Error> {
    run_to(program, args, dir, Stdio::piped())
}

fn run_to<S: AsRef<OsStr>>(
    program: &'static str,
    args: impl IntoIterator<Item = S>,
    dir: &Path,
    stdout: Stdio,
) -> Result<Output, Error> {
    let path = which(program).ok_or_else(|| missing(program))?;
    let mut command = Command::new(&path);
    command.args(args).current_dir(dir).env("LC_ALL", "C").stdin(Stdio::null());
    let operand = command.get_args().last().unwrap_or_default().to_string_lossy().into_owned();
    let child = command.stdout(stdout).stderr(Stdio::piped()).spawn();
    let output = child.and_then(std::process::Child::wait_with_output).map_err(Error::file("run", &path))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned();
        return Err(Error::Program { program, operand, status: output.status, stderr });
    }
    Ok(output)
}

fn missing(program: &'static str) -> Error {
    let package = PROGRAMS.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package);
    Error::Missing { program, package }
}

pub(super) fn create(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(Error::file("create", dir))
}

/// Removes a file or tree that may not be there.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 5 * 512];
        image[0x1f1] = 4;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&0u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_is_found_without_its_size_word() {
        let image = bzimage(b"\xfd7zXZ\0body\x01\x02\x03\x04");
        let found = payload(&image).unwrap();
        assert_eq!((found.bytes, found.program), (&b"\xfd7zXZ\0body"[..], "xz"));
    }

    #[test]
    fn a_payload_past_the_end_is_refused() {
        let mut image = bzimage(b"\x28\xb5\x2f\xfdbody1234");
        image.truncate(image.len() - 5);
        assert_eq!(payload(&image).err(), Some("payload past the end"));
    }

    #[test]
    fn a_file_that_is_no_bzimage_is_refused() {
        assert_eq!(payload(b"MZ").err(), Some("no setup header"));
        assert_eq!(payload(&vec![0; 8192]).err(), Some("no setup header"));
    }
}
