//! Which QEMU emulates the host: this machine's own if it is new enough, else that of Debian's backports, downloaded
//! and taken apart, never installed.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Error;
use super::kernel::{create, remove, run, which};

/// Names the program to use instead.
const VARIABLE: &str = "MVM_LAB_QEMU";
const PROGRAM: &str = "qemu-system-x86_64";
/// First version whose emulation lasts: hosts under 7.2 hung or died every few hundred guests.
const OLDEST: u32 = 10;
/// Where it is in Debian 12.
const SUITE: &str = "bookworm-backports";
/// The program, its firmware, and the machine's.
const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-data", "seabios"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// An archive that has the suite, unless this machine gets Debian from another.
const ARCHIVE: &str = "http://deb.debian.org/debian";

/// A QEMU, and where its firmware is if that is not where it looks by itself.
#[derive(Debug, Clone)]
pub struct Emulator {
    pub(super) program: PathBuf,
    pub(super) firmware: Vec<PathBuf>,
}

/// This machine's own QEMU, whatever its version: its libraries are those that a newer one needs as well.
pub(super) fn installed() -> Result<PathBuf, Error> {
    which(PROGRAM).ok_or(Error::Missing { program: PROGRAM, package: "qemu-system-x86" })
}

impl Emulator {
    /// One that finds its firmware by itself.
    fn at(program: PathBuf) -> Self {
        Self { program, firmware: Vec::new() }
    }

    /// The one that virtual time is measured by: versions count the instructions of a copy differently, and figures of
    /// two of them are not to be compared.
    pub(super) fn of_virtual_time() -> Result<Self, Error> {
        installed().map(Self::at)
    }

    /// The emulator; if it is to be downloaded, into `cache`.
    pub(super) fn prepare(cache: &Path) -> Result<Self, Error> {
        let installed = installed()?;
        if let Some(program) = std::env::var_os(VARIABLE).filter(|program| !program.is_empty()) {
            return Ok(Self::at(program.into()));
        }
        let tree = cache.join(format!("qemu-{SUITE}"));
        if !tree.is_dir() {
            if version(&installed).is_some_and(|version| version >= OLDEST) {
                return Ok(Self::at(installed));
            }
            download(&tree, cache)
                .map_err(|error| Error::NoEmulator { oldest: OLDEST, reason: error.to_string() })?;
        }
        let share = tree.join("usr/share");
        Ok(Self {
            program: tree.join("usr/bin").join(PROGRAM),
            firmware: ["qemu", "seabios"].map(|name| share.join(name)).into(),
        })
    }
}

/// The major version of the QEMU at `program`; `None` if it does not say.
fn version(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().ok()?;
    major(&String::from_utf8_lossy(&output.stdout))
}

fn major(said: &str) -> Option<u32> {
    said.strip_prefix("QEMU emulator version ")?.split('.').next()?.parse().ok()
}

/// Downloads and unpacks the suite's packages by an apt of our own: the system's sources stay as they are.
fn download(tree: &Path, cache: &Path) -> Result<(), Error> {
    let apt = cache.join("apt");
    for directory in ["lists/partial", "cache/archives/partial"] {
        create(&apt.join(directory))?;
    }
    let sources = apt.join("lab.sources");
    let text = format!(
        "Types: deb\nURIs: {}\nSuites: {SUITE}\nComponents: main\nSigned-By: {KEYRING}\n",
        archive(&apt)
    );
    fs::write(&sources, text).map_err(Error::file("write", &sources))?;
    let own = options(&apt, &sources);
    let own = || own.iter().map(OsString::as_os_str);
    run("apt-get", own().chain([OsStr::new("update")]), &apt)?;
    let staging = cache.join("qemu.partial");
    remove(&staging)?;
    let packages = staging.join("packages");
    create(&packages)?;
    let named = ["download"].into_iter().chain(PACKAGES).map(OsStr::new);
    run("apt-get", own().chain(named), &packages)?;
    let root = staging.join("root");
    create(&root)?;
    for package in fs::read_dir(&packages).map_err(Error::file("list", &packages))?.flatten() {
        run("dpkg-deb", [OsStr::new("-x"), package.path().as_os_str(), root.as_os_str()], &staging)?;
    }
    fs::rename(&root, tree).map_err(Error::file("rename", &root))?;
    remove(&staging)
}

fn options(apt: &Path, sources: &Path) -> Vec<OsString> {
    let of = |name: &str, path: &Path| {
        let mut option = OsString::from(format!("{name}="));
        option.push(path);
        option
    };
    let nothing = Path::new("/dev/null");
    let user = std::env::var_os("USER").unwrap_or_else(|| "root".into());
    [
        of("Dir::Etc::sourcelist", sources),
        of("Dir::Etc::sourceparts", nothing),
        of("Dir::State::lists", &apt.join("lists")),
        of("Dir::State::status", nothing),
        of("Dir::Cache", &apt.join("cache")),
        of("APT::Sandbox::User", Path::new(&user)),
        "Acquire::Languages=none".into(),
        // A mirror may stand still for longer than its lists say they hold; what is in them is signed all the same.
        "Acquire::Check-Valid-Until=false".into(),
    ]
    .into_iter()
    .fold(vec!["-qq".into()], |mut options, option| {
        options.extend(["-o".into(), option]);
        options
    })
}

/// The address that this machine's own apt gets Debian from.
fn archive(dir: &Path) -> String {
    let targets = run("apt-get", ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], dir);
    let text = targets.map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let own = text.lines().find(|line| line.trim_end_matches('/').ends_with("/debian"));
    own.unwrap_or(ARCHIVE).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_number_before_the_first_full_stop() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some(10));
        assert_eq!(major("QEMU emulator version 7.2.22 (Debian)"), Some(7));
        assert_eq!(major("bash: no such program"), None);
    }
}
