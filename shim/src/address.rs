//! Where a shim's daemon is reached: one socket for each pod or lone container, found again by whoever is asked to
//! start another container of the same pod.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use mvm_runtime::hex::hex;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// Where containerd's own shims have their sockets.
const CONVENTION: &str = "/run/containerd/s";
/// Where sockets go if the directory asked for is too long for one.
const FALLBACK: &str = "/run/mvm/s";
/// Longest path of a socket, its terminating zero not counted.
const MAX_PATH: usize = 107;

/// What came of asking for a group's socket.
#[derive(Debug)]
pub(crate) enum Socket {
    /// It is new, and ours to serve.
    Bound(UnixListener),
    /// A daemon serves it already.
    Served,
}

/// Path of the socket of a group of containers. `directory` is where containerd wants it, if it says.
pub(crate) fn path(directory: Option<&str>, address: &str, namespace: &str, group: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in [address, namespace, group] {
        // The length makes the parts' borders part of the hash.
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    let name = hex(&hash.finalize());
    let directory = directory.filter(|directory| directory.starts_with('/')).unwrap_or(CONVENTION);
    let path = Path::new(directory).join(&name);
    if path.as_os_str().len() <= MAX_PATH { path } else { Path::new(FALLBACK).join(name) }
}

/// Binds the socket unless somebody serves it. Of several that ask at once, one gets it.
pub(crate) fn bind(path: &Path) -> io::Result<Socket> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let lock = Flock::lock(fs::File::open(directory)?, FlockArg::LockExclusive);
    let _lock = lock.map_err(|(_, errno)| io::Error::from(errno))?;
    if UnixStream::connect(path).is_ok() {
        return Ok(Socket::Served);
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(Socket::Bound(listener))
}

/// Removes a socket that nobody serves.
pub(crate) fn remove_stale(path: &Path) {
    if UnixStream::connect(path).is_err() {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_fit_a_socket_and_differ_by_every_part() {
        let long = "/x".repeat(80);
        let paths = [
            path(None, "/run/containerd/containerd.sock", "default", "a"),
            path(None, "/run/containerd/containerd.sock", "default", "b"),
            path(None, "/run/containerd/containerd.sock", "k8s.io", "a"),
            path(None, "/run/other.sock", "default", "a"),
            path(None, "/run/other.sock", "defaulta", ""),
            path(Some("/run/there"), "/run/other.sock", "default", "a"),
            path(Some(&long), "/run/other.sock", "default", "a"),
        ];
        for (at, one) in paths.iter().enumerate() {
            assert!(one.as_os_str().len() < 108, "{one:?}");
            assert!(!paths[..at].contains(one), "{one:?}");
        }
        assert!(paths[0].starts_with(CONVENTION));
        assert!(paths[5].starts_with("/run/there"));
        assert!(paths[6].starts_with(FALLBACK));
    }

    #[test]
    fn a_served_socket_is_left_alone_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s").join("one");
        let Socket::Bound(listener) = bind(&path).unwrap() else { panic!("nobody serves it yet") };
        assert!(matches!(bind(&path).unwrap(), Socket::Served));
        drop(listener);
        assert!(path.exists(), "a daemon that was killed leaves its socket");
        assert!(matches!(bind(&path).unwrap(), Socket::Bound(_)));
    }
}
