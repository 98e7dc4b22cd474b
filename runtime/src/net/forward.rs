//! The pod's localhost, as those in its name space see it, is the guest's.
//!
//! Engines forward a port by connecting to localhost in the pod's name space. Of a machine nothing listens there: so
//! TCP connections to loopback addresses are redirected to a listener of ours, which asks for a connection to the
//! same port in the guest and passes bytes on both ways.

use std::collections::HashMap;
use std::io::{self, ErrorKind, PipeWriter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use mvm_protocol::Address;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::Netns;
use super::netlink::{Message, Netlink};
use super::nft::{Hook, Rule, Table, Transport, remove_table};
use crate::failure::{Context, Failure};

/// Name of the table in the pod's name space.
const TABLE: &str = "mvm";
/// Connections at a time; more are refused.
const MAX_CONNECTIONS: usize = 128;
/// A thread of a connection only copies.
const STACK: usize = 64 * 1024;

/// Connections are forwarded until this is dropped; those that are open end with it.
#[derive(Debug)]
pub struct PortForward {
    netns: Netns,
    connections: Arc<Connections>,
    /// Its reader wakes up when this is closed.
    _stop: PipeWriter,
}

/// Forwards TCP connections to localhost in `netns`. `connect` is given the port and returns a connection to it in
/// the guest, or why there is none; it is called from many threads and may take its time.
///
/// # Errors
/// The name space cannot be entered, or its kernel has no nftables with redirection. A pod is of use without: warn.
pub fn forward_localhost(
    netns: &Netns,
    connect: impl Fn(u16) -> io::Result<UnixStream> + Send + Sync + 'static,
) -> Result<PortForward, Failure> {
    let (wake, stop) = io::pipe().context(|| "cannot make a pipe".to_owned())?;
    let listeners = netns.run(set_up)??;
    let connections = Arc::new(Connections::default());
    // From here on dropping it undoes the table.
    let forward = PortForward { netns: netns.clone(), connections: connections.clone(), _stop: stop };
    let acceptor = Acceptor { listeners, connections, connect: Arc::new(connect) };
    std::thread::Builder::new()
        .name("port forward".to_owned())
        .spawn(move || acceptor.run(&wake))
        .context(|| "cannot start a thread".to_owned())?;
    Ok(forward)
}

impl Drop for PortForward {
    fn drop(&mut self) {
        self.connections.close();
        let result = self.netns.run(|| remove_table(TABLE));
        if let Err(failure) =
            result.and_then(|result| result.context(|| format!("cannot remove table {TABLE}")))
        {
            log::warn!("{}", failure.report());
        }
    }
}

/// Undoes the forwarding of a process that is gone. A name space that is gone took it along.
///
/// # Errors
/// The kernel refuses.
pub fn remove_forward(netns: &Path) -> Result<(), Failure> {
    let Ok(netns) = Netns::open(netns) else { return Ok(()) };
    netns.run(|| remove_table(TABLE))?.context(|| format!("cannot remove table {TABLE} in {netns}"))
}

/// In the name space: opens the listeners, then has connections come to them.
fn set_up() -> Result<Vec<TcpListener>, Failure> {
    raise_loopback().context(|| "cannot bring loopback up".to_owned())?;
    let first = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .context(|| "cannot listen on the pod's loopback".to_owned())?;
    let address = first.local_addr().context(|| "cannot tell the listener's port".to_owned())?;
    let mut listeners = vec![first];
    let mut rules = vec![redirection(Address { ip: Ipv4Addr::LOCALHOST.into(), prefix: 8 }, address.port())];
    // A host without IPv6 has no such address.
    if let Ok(second) = TcpListener::bind((Ipv6Addr::LOCALHOST, address.port())) {
        listeners.push(second);
        rules.push(redirection(Address { ip: Ipv6Addr::LOCALHOST.into(), prefix: 128 }, address.port()));
    }
    for listener in &listeners {
        listener.set_nonblocking(true).context(|| "cannot set a listener up".to_owned())?;
    }
    Table { name: TABLE, chains: vec![(Hook::Output, rules)] }
        .install()
        .context(|| "cannot redirect the pod's localhost with nftables".to_owned())?;
    Ok(listeners)
}

fn raise_loopback() -> nix::Result<()> {
    Netlink::open()?.perform(Message::raise(if_nametoindex("lo")?, None))
}

/// All of TCP to `network` goes to the listener, but what goes there anyway.
fn redirection(network: Address, port: u16) -> Rule {
    Rule::new().to(network).transport(Transport::Tcp).not_for_port(port).redirect(port)
}

/// Accepts and starts a thread for each connection.
struct Acceptor<Connect> {
    listeners: Vec<TcpListener>,
    connections: Arc<Connections>,
    connect: Arc<Connect>,
}

impl<Connect: Fn(u16) -> io::Result<UnixStream> + Send + Sync + 'static> Acceptor<Connect> {
    fn run(self, stop: &impl AsFd) {
        loop {
            let mut ready = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
            ready.extend(self.listeners.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::POLLIN)));
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return log::warn!("ports are no longer forwarded: {error}"),
            }
            if ready.first().is_none_or(|stop| stop.any().unwrap_or(true)) {
                return;
            }
            for listener in &self.listeners {
                match listener.accept() {
                    Ok((stream, _)) => self.begin(stream),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // The connection is gone already, or there are no descriptors: the next may fare better.
                    Err(error) => log::debug!("cannot accept a forwarded connection: {error}"),
                }
            }
        }
    }

    fn begin(&self, stream: TcpStream) {
        let Some(place) = self.connections.place() else {
            log::warn!("more than {MAX_CONNECTIONS} forwarded connections: one is refused");
            return refuse(&stream);
        };
        let connect = self.connect.clone();
        let thread = std::thread::Builder::new().name("forward".to_owned()).stack_size(STACK);
        let spawned = thread.spawn(move || {
            let outcome = original_port(&stream).and_then(|port| connect(port));
            match outcome {
                Ok(guest) => place.pass(stream, guest),
                Err(error) => {
                    log::debug!("a forwarded connection is refused: {error}");
                    refuse(&stream);
                }
            }
        });
        if let Err(error) = spawned {
            log::warn!("cannot start a thread for a forwarded connection: {error}");
        }
    }
}

/// Where a connection went before it was redirected.
fn original_port(stream: &TcpStream) -> io::Result<u16> {
    let local = stream.local_addr()?;
    let port = match local.ip() {
        IpAddr::V4(_) => nix::sys::socket::getsockopt(stream, sockopt::OriginalDst)?.sin_port,
        IpAddr::V6(_) => nix::sys::socket::getsockopt(stream, sockopt::Ip6tOriginalDst)?.sin6_port,
    };
    let port = u16::from_be(port);
    // It was not redirected, but meant for us: there is nothing behind it.
    if port == local.port() { Err(ErrorKind::ConnectionRefused.into()) } else { Ok(port) }
}

/// Closes a connection so that its peer sees an error and not an end.
fn refuse(stream: &TcpStream) {
    // If it cannot be set the connection is closed in order, which is nearly as good.
    let _ = setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// The connections that are open, to be ended from outside.
#[derive(Debug, Default)]
struct Connections(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    closed: bool,
    next: u64,
    /// `None` while the guest is asked.
    pairs: HashMap<u64, Option<Arc<Pair>>>,
}

/// The two ends of a forwarded connection.
#[derive(Debug)]
struct Pair {
    outside: TcpStream,
    guest: UnixStream,
}

impl Connections {
    /// Room for one more connection, if there is any.
    fn place(self: &Arc<Self>) -> Option<Place> {
        let mut open = self.open();
        if open.closed || open.pairs.len() >= MAX_CONNECTIONS {
            return None;
        }
        let number = open.next;
        open.next = open.next.wrapping_add(1);
        open.pairs.insert(number, None);
        Some(Place { connections: self.clone(), number })
    }

    fn close(&self) {
        let mut open = self.open();
        open.closed = true;
        for pair in open.pairs.values().flatten() {
            // One that has ended by itself needs no ending.
            let _ = pair.outside.shutdown(Shutdown::Both);
            let _ = pair.guest.shutdown(Shutdown::Both);
        }
    }

    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among those open; given back when dropped.
struct Place {
    connections: Arc<Connections>,
    number: u64,
}

impl Place {
    /// Passes bytes both ways until both directions have ended.
    fn pass(self, outside: TcpStream, guest: UnixStream) {
        let pair = Arc::new(Pair { outside, guest });
        {
            let mut open = self.connections.open();
            if open.closed {
                return;
            }
            open.pairs.insert(self.number, Some(pair.clone()));
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("forward".to_owned()).stack_size(STACK);
            let back = thread.spawn_scoped(scope, || {
                let _ = io::copy(&mut &pair.guest, &mut &pair.outside);
                let _ = pair.outside.shutdown(Shutdown::Write);
            });
            if back.is_ok() {
                let _ = io::copy(&mut &pair.outside, &mut &pair.guest);
                let _ = pair.guest.shutdown(Shutdown::Write);
            }
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.open().pairs.remove(&self.number);
    }
}
