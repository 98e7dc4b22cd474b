//! Who has which address: one file each, locked by its owner for as long as it lives.
//!
//! A lock goes with its process however that ends, so a lease nobody holds is one nobody locks. Nothing has to be
//! cleaned up for the next machine to come.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::net::Publish;

/// Name of the file that is locked while the directory is changed.
const LOCK: &str = "lock";

/// The directory of all leases, locked against everybody else.
#[derive(Debug)]
pub(super) struct Ledger {
    dir: PathBuf,
    _lock: Flock<File>,
}

/// What a lease says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Name of the machine.
    pub(super) machine: String,
    /// Its address.
    pub(super) ip: Ipv4Addr,
    /// Its published ports.
    pub(super) ports: Vec<Publish>,
    /// Which of the network's bridges it is on.
    #[serde(default)]
    pub(super) branch: u32,
}

/// An address of ours. The file stays until the ledger is asked to remove it, the lock goes with this.
#[derive(Debug)]
pub(super) struct Lease {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Ledger {
    /// Opens the directory, made if it is missing, and waits until it is ours.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(LOCK))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        Ok(Self { dir: dir.to_path_buf(), _lock: lock })
    }

    /// The leases of a bridge. Those whose owner is gone are removed.
    pub(super) fn leases(&self, bridge: &str) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let list = match fs::read_dir(self.dir.join(bridge)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(entries),
            list => list?,
        };
        for item in list {
            let path = item?.path();
            match held(&path)? {
                Some(lease) => entries.push(serde_json::from_str(&io::read_to_string(lease)?)?),
                None => fs::remove_file(&path)?,
            }
        }
        entries.sort_by_key(|entry: &Entry| entry.ip);
        Ok(entries)
    }

    /// Makes a lease of an address that nobody has.
    pub(super) fn lease(&self, bridge: &str, entry: &Entry) -> io::Result<Lease> {
        let dir = self.dir.join(bridge);
        fs::create_dir_all(&dir)?;
        let path = dir.join(entry.ip.to_string());
        let file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        lock.write_all(&serde_json::to_vec(entry)?)?;
        Ok(Lease { path, _lock: lock })
    }

    /// Gives an address back.
    pub(super) fn give_back(&self, lease: Lease) -> io::Result<()> {
        fs::remove_file(&lease.path)
    }
}

/// The file, if somebody has it locked.
fn held(path: &Path) -> io::Result<Option<File>> {
    match Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(_) => Ok(None),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => Ok(Some(file)),
        Err((_, error)) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(last: u8) -> Entry {
        let ports = vec!["8080:80/udp".parse().unwrap()];
        Entry { machine: format!("m{last}"), ip: Ipv4Addr::new(10, 0, 0, last), ports, branch: 0 }
    }

    #[test]
    fn a_lease_lasts_as_long_as_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&dir.path().join("net")).unwrap();
        let first = ledger.lease("mvm0", &entry(10)).unwrap();
        let second = ledger.lease("mvm0", &entry(9)).unwrap();
        assert_eq!(ledger.leases("mvm0").unwrap(), [entry(9), entry(10)]);
        assert_eq!(ledger.leases("other").unwrap(), []);
        // As if its process had been killed: the lock goes, the file stays.
        let path = first.path.clone();
        drop(first);
        assert!(path.exists());
        assert_eq!(ledger.leases("mvm0").unwrap(), [entry(9)]);
        assert!(!path.exists());
        ledger.give_back(second).unwrap();
        assert_eq!(ledger.leases("mvm0").unwrap(), []);
    }

    #[test]
    fn an_address_is_leased_once() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let _lease = ledger.lease("mvm0", &entry(9)).unwrap();
        assert_eq!(ledger.lease("mvm0", &entry(9)).unwrap_err().kind(), ErrorKind::AlreadyExists);
    }
}
