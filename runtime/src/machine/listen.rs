//! Listening sockets that only their owner may connect to.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen as start, socket};
use nix::sys::stat::{Mode, fchmod};

use crate::failure::{Context, Failure};

/// Listens at `path`. A socket left by a machine that died is replaced.
pub(super) fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let failed = || format!("cannot listen on {}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).context(failed)?;
    }
    match UnixStream::connect(path) {
        Ok(_) => return Err(Failure::new(format!("{} is in use by another machine", path.display()))),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).context(failed)?;
        }
        Err(_) => {}
    }
    bound(path).context(failed)
}

/// The mode is set before there is a name: the process's umask, which all threads share, stays out of it, and
/// there is no moment at which others may connect.
fn bound(path: &Path) -> nix::Result<UnixListener> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    start(&socket, Backlog::MAXCONN)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_may_connect_and_a_dead_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("below/control.sock");
        let listener = listen(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let report = listen(&path).unwrap_err().report();
        assert!(report.contains("in use by another machine"), "{report}");
        drop(listener);
        let again = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        again.accept().unwrap();
    }
}
