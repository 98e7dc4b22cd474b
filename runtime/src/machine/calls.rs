//! Guest-initiated vsock connections: the machine asks for a socket per call, and gets it here.
//!
//! Ports of the agent end in this process; any other port goes to `vsock.sock_PORT` in the machine's socket
//! directory, as with Firecracker, if something listens there.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use mvm_devices::virtio::vsock::dialer::DialServer;
use mvm_protocol::{CONTROL_PORT, STREAM_PORT};

use crate::failure::{Context, Failure};

/// Name of the machine's vsock socket in its socket directory.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// Stack of the thread that answers calls.
const STACK_SIZE: usize = 64 * 1024;

/// The agent's calls, as they come.
#[derive(Debug)]
pub struct Calls {
    /// Control connections.
    pub control: Receiver<UnixStream>,
    /// Standard streams, each to open with its header.
    pub streams: Receiver<UnixStream>,
}

/// Answers the machine's calls on a thread of its own, until the machine ends.
pub(super) fn answer(dialer: OwnedFd, sockets: Option<PathBuf>) -> Result<Calls, Failure> {
    let (control_out, control) = channel();
    let (streams_out, streams) = channel();
    let exchange = Exchange { server: DialServer::new(dialer), control: control_out, streams: streams_out, sockets };
    std::thread::Builder::new()
        .name("calls".to_owned())
        .stack_size(STACK_SIZE)
        .spawn(move || exchange.run())
        .context(|| "cannot start a thread for the machine's calls".to_owned())?;
    Ok(Calls { control, streams })
}

struct Exchange {
    server: DialServer,
    control: Sender<UnixStream>,
    streams: Sender<UnixStream>,
    sockets: Option<PathBuf>,
}

impl Exchange {
    fn run(mut self) {
        // Ends with the machine's process, which holds the other end.
        while let Ok(Some(dial)) = self.server.recv() {
            let answered = match self.connect(dial.port) {
                Some(end) => self.server.accept(dial.id, end),
                None => self.server.refuse(dial.id),
            };
            if let Err(error) = answered {
                log::warn!("a call of the guest to port {} got no answer: {error}", dial.port);
            }
        }
    }

    /// The machine's end of a connection to whoever serves `port`.
    fn connect(&self, port: u32) -> Option<OwnedFd> {
        let receiver = match port {
            CONTROL_PORT => &self.control,
            STREAM_PORT => &self.streams,
            other => {
                let path = self.sockets.as_ref()?.join(format!("{VSOCK_SOCKET}_{other}"));
                return UnixStream::connect(path).ok().map(OwnedFd::from);
            }
        };
        let (ours, theirs) = UnixStream::pair().ok()?;
        receiver.send(ours).ok()?;
        Some(theirs.into())
    }
}
