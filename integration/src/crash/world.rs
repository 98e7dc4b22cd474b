//! Name spaces of our own, in which the host is empty and nothing we leave outlives us.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// Set inside.
const INSIDE: &str = "MVM_CRASH_WORLD";
/// The program that stands in for machines, by the name of the real one.
const MACHINE: &str = "/tmp/bin/mvm-vmm";
/// `/sys/module` is hidden because it may say that no Linux guest runs here; ours are none.
const SET_UP: &str = "set -e
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mount -t tmpfs shm /dev/shm; mount -t tmpfs module /sys/module
mkdir /tmp/bin; cp \"$1\" /tmp/bin/mvm-vmm; mkdir /tmp/guest; touch /tmp/guest/vmlinux
printf '#!/bin/sh\\n' >/tmp/guest/agent; chmod +x /tmp/guest/agent
mkdir -p /tmp/image/bin; echo busybox >/tmp/image/bin/sh; chmod +x /tmp/image/bin/sh
ip link set lo up; shift; \"$@\"; exit $?";

/// Whether this process is inside.
#[must_use]
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program again inside, with these arguments. `machine` stands in for `mvm-vmm`.
///
/// # Errors
/// It cannot be started: only root can have such name spaces.
pub fn enter(machine: &Path, arguments: impl IntoIterator<Item = OsString>) -> io::Result<ExitStatus> {
    let disk = tempfile::tempdir_in(machine.parent().unwrap_or(Path::new("/")))?;
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        SET_UP,
        "sh",
    ]);
    command.arg(machine).arg(std::env::current_exe()?).args(arguments);
    command.env(INSIDE, disk.path()).status()
}

/// Where containers and images are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Both in memory, where they usually are: containers at least.
    Memory,
    /// Containers on a disk, whose file system lists what is in a directory in an order of its own.
    Disk,
    /// Images where there are none yet.
    Cold,
}

impl Place {
    fn home(self) -> OsString {
        match self {
            Self::Disk => std::env::var_os(INSIDE).unwrap_or_default(),
            _ => "/run/mvm".into(),
        }
    }

    fn state(self) -> &'static str {
        if self == Self::Cold { COLD } else { "/tmp/state" }
    }
}

/// Where images are kept that are made anew each time.
pub const COLD: &str = "/tmp/cold";

/// The `mvm` under test, told to use what is inside.
#[must_use]
pub fn mvm(program: &Path, place: Place, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.arg0("mvm").args(arguments).env_clear();
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("MVM_RUN", place.home()).envs([
        ("MVM_VMM", MACHINE),
        ("MVM_KERNEL", "/tmp/guest/vmlinux"),
        ("MVM_AGENT", "/tmp/guest/agent"),
        ("MVM_STATE", place.state()),
        ("MVM_TEMPLATE", "never"),
    ]);
    command
}

/// The image that containers are made of.
pub const IMAGE: &str = "/tmp/image";

/// Directories of which every entry counts.
#[must_use]
pub fn watched() -> Vec<PathBuf> {
    let watched = ["/run", "/tmp", "/dev/shm", "/dev/mqueue", "/var/lib/mvm"].map(OsString::from);
    watched.into_iter().chain([Place::Disk.home()]).map(PathBuf::from).collect()
}
