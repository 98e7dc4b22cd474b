//! Where a machine's agent arrives.

use std::{
    fs, io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use mvm_protocol::{CONTROL_PORT, Identity, STREAM_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use super::{
    client::AgentClient,
    error::{Error, Result},
};

/// Listens on `<base>_1024` and `<base>_1025`, where a VMM connects for a guest that dials these ports.
/// Must exist before the machine starts: the guest dials once.
#[derive(Debug)]
pub struct AgentListener {
    control: UnixListener,
    streams: UnixListener,
    paths: [PathBuf; 2],
}

impl AgentListener {
    /// Makes both sockets; files that are in the way are replaced.
    pub fn bind(base: &Path) -> Result<Self> {
        let path = |port: u32| {
            let mut path = base.as_os_str().to_owned();
            path.push(format!("_{port}"));
            PathBuf::from(path)
        };
        let paths = [path(CONTROL_PORT), path(STREAM_PORT)];
        let [control, streams] = &paths;
        Ok(Self { control: listen(control)?, streams: listen(streams)?, paths })
    }

    /// Waits for the agent and its hello. May be called again when a client's connection is lost: the
    /// agent dials anew.
    pub fn accept(&self, identity: Identity, timeout: Duration) -> Result<AgentClient> {
        let control = self.accept_control(timeout)?;
        let streams = self.streams.try_clone().map_err(io_error("cannot duplicate a socket"))?;
        AgentClient::connect(control, streams, identity, timeout)
    }

    fn accept_control(&self, timeout: Duration) -> Result<UnixStream> {
        let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        let timeout = u16::try_from(timeout.as_millis()).unwrap_or(u16::MAX);
        let ready = poll(&mut fds, PollTimeout::from(timeout))
            .map_err(|errno| io_error("cannot wait for the agent")(errno.into()))?;
        if ready == 0 {
            return Err(Error::Deadline { what: "dial" });
        }
        let (control, _) = self.control.accept().map_err(io_error("cannot accept the agent"))?;
        Ok(control)
    }
}

impl Drop for AgentListener {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("cannot listen on {}", path.display());
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Io { what: what(), source });
        }
        _ => {}
    }
    UnixListener::bind(path).map_err(|source| Error::Io { what: what(), source })
}

/// Names the operation of an I/O error.
pub(super) fn io_error(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { what: what.to_owned(), source }
}
