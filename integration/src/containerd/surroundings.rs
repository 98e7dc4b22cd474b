//! What keeps a suite apart from the host it runs on: name spaces of its own for networks and mounts.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::Installation;

/// Directories that containerd, CNI and mvm share with others of their kind: a suite has its own.
const OWN: [&str; 7] =
    ["/run/containerd", "/run/netns", "/run/mvm", "/var/lib/mvm", "/var/lib/cni", "/opt/cni", "/etc/cni"];

/// Moves this process, which must have one thread, and all that it starts into name spaces of their own.
///
/// # Errors
/// It is not root's.
pub fn enter() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    for dir in OWN {
        fs::create_dir_all(dir)?;
        mount(Some("mvm-test"), dir, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    }
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("cannot set up the loopback")) }
}

/// Puts plugins and network where `ctr run --cni` looks for them.
///
/// # Errors
/// The host's reason.
pub fn default_network(installation: &Installation, dir: &Path) -> io::Result<()> {
    for (from, to) in [(installation.plugins.clone(), "/opt/cni/bin"), (dir.join("net.d"), "/etc/cni/net.d")]
    {
        fs::create_dir_all(to)?;
        mount(Some(&from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}
