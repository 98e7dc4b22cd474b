//! The host's side of round trips and streams, as `guest_bench` expects it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;

use mvm_devices::virtio::vsock::dialer::DialServer;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};

use crate::bench::exchange::{MESSAGE, ROUND_TRIPS, STREAM};

/// The tap's name, and its address on the host.
pub(super) const TAP: &str = "mvmbench";
pub(super) const TAP_ADDRESS: &str = "10.88.0.1:7000";
/// Port of the host's vsock.
pub(super) const VSOCK_PORT: u32 = 7000;

/// Echoes the round trips, swallows the stream, answers it with a byte.
fn serve(mut peer: impl Read + Write) -> io::Result<()> {
    let mut message = [0; MESSAGE];
    // One more than is timed.
    for _ in 0..=ROUND_TRIPS {
        peer.read_exact(&mut message)?;
        peer.write_all(&message)?;
    }
    let mut data = vec![0; 256 * 1024];
    let mut left = STREAM;
    while left > 0 {
        match peer.read(&mut data)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => left -= count.min(left),
        }
    }
    peer.write_all(&[1])
}

/// Serves on a thread of its own; the guest's end sees what goes wrong.
fn serve_apart(peer: impl Read + Write + Send + 'static) {
    thread::spawn(move || serve(peer));
}

/// Answers a machine's calls.
pub(super) fn serve_calls(server: DialServer) {
    thread::spawn(move || -> io::Result<()> {
        while let Some(call) = server.recv()? {
            let (near, far) = UnixStream::pair()?;
            server.accept(call.id, far.as_fd())?;
            serve_apart(near);
        }
        Ok(())
    });
}

/// Listens on the host's vsock, for guests of vhost.
pub(super) fn serve_vsock() -> io::Result<()> {
    load("vhost_vsock");
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, VSOCK_PORT))?;
    listen(&listener, Backlog::new(4)?)?;
    thread::spawn(move || -> io::Result<()> {
        loop {
            let peer = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
            serve_apart(adopt(peer));
        }
    });
    Ok(())
}

#[allow(unsafe_code)] // nix hands out an accepted socket as a number
fn adopt(fd: i32) -> File {
    // SAFETY: the descriptor was just returned by accept and is nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}

/// Loads a module; a kernel with it built in has none.
fn load(module: &str) {
    let _ = Command::new("modprobe").arg(module).status();
}

/// Makes the tap and listens on its address.
pub(super) fn serve_tap() -> io::Result<()> {
    load("vhost_net");
    let address = TAP_ADDRESS.split(':').next().unwrap_or_default();
    for line in [
        format!("tuntap add {TAP} mode tap vnet_hdr"),
        format!("addr add {address}/24 dev {TAP}"),
        format!("link set {TAP} up"),
    ] {
        let done = Command::new("ip").args(line.split(' ')).status()?;
        if !done.success() {
            return Err(io::Error::other(format!("ip {line}: {done}")));
        }
    }
    let listener = TcpListener::bind(TAP_ADDRESS)?;
    thread::spawn(move || -> io::Result<()> {
        loop {
            let (peer, _) = listener.accept()?;
            peer.set_nodelay(true)?;
            serve_apart(peer);
        }
    });
    Ok(())
}
