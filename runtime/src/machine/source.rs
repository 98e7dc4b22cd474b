//! Whoever has the memory of saved machines, and brings it page by page.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};

use crate::failure::{Context, Failure};

/// Begins the address of a UNIX stream socket.
const UNIX: &str = "unix:";
/// Of which missing pages can be had reported without further rights, since Linux 6.1.
const DEVICE: &str = "/dev/userfaultfd";
/// Seconds that may pass until a connection is taken.
const CONNECT_SECONDS: i64 = 10;

/// The address of whoever has the memory: `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySource {
    socket: PathBuf,
}

/// Text that is no such address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not where memory comes from: unix:PATH")]
pub struct NotASource(String);

impl FromStr for MemorySource {
    type Err = NotASource;

    fn from_str(text: &str) -> Result<Self, NotASource> {
        match text.strip_prefix(UNIX) {
            Some(path) if !path.is_empty() => Ok(Self { socket: path.into() }),
            _ => Err(NotASource(text.to_owned())),
        }
    }
}

impl fmt::Display for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{UNIX}{}", self.socket.display())
    }
}

impl MemorySource {
    /// A connection to it.
    ///
    /// # Errors
    /// Nobody listens there, or nobody takes the connection in time.
    pub(super) fn connect(&self) -> Result<OwnedFd, Failure> {
        let connected = connect_to(&self.socket).context(|| format!("cannot connect to {self}"));
        connected.map_err(|failure| failure.help("start first what has the memory, and have it listen there"))
    }
}

fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let made = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // A connection waits as long for its turn as a message would to be sent.
    setsockopt(&made, SendTimeout, &TimeVal::seconds(CONNECT_SECONDS))?;
    connect(made.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(made)
}

/// The device by which missing pages are reported, if this process may use it.
pub(super) fn device() -> Option<File> {
    File::options().read(true).write(true).open(DEVICE).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn memory_comes_from_a_socket_by_its_path() {
        let source: MemorySource = "unix:/run/pages.sock".parse().unwrap();
        assert_eq!(
            (source.socket.to_str(), source.to_string().as_str()),
            (Some("/run/pages.sock"), "unix:/run/pages.sock")
        );
        for wrong in ["", "unix:", "/run/pages.sock", "tcp:1.2.3.4:5"] {
            assert!(wrong.parse::<MemorySource>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_source_that_is_not_there_is_named_with_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let source: MemorySource = format!("unix:{}", path.display()).parse().unwrap();
        let report = source.connect().unwrap_err().report();
        assert!(report.contains(&source.to_string()) && report.contains("listen there"), "{report}");
        let _listener = UnixListener::bind(&path).unwrap();
        source.connect().unwrap();
    }
}
