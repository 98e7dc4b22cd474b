//! Published ports: of the host's, and of the guest's behind it.

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, socket};
use serde::{Deserialize, Serialize};

use super::Transport;
use crate::failure::{Context, Failure};

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address; `None` is any of them.
    pub address: Option<Ipv4Addr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// TCP or UDP.
    pub transport: Transport,
}

/// Text that names no published port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a port to publish: [IP:]HOST:GUEST[/tcp|udp], ports from 1 to 65535, the address one of IPv4"
)]
pub struct NotAPort(String);

impl FromStr for Publish {
    type Err = NotAPort;

    fn from_str(text: &str) -> Result<Self, NotAPort> {
        parse(text).ok_or_else(|| NotAPort(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Publish> {
    let (ports, transport) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.split('/').next()?, Transport::Tcp),
        Some((ports, "udp")) => (ports, Transport::Udp),
        Some(_) => return None,
    };
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let mut parts = ports.rsplit(':');
    let (guest, host) = (port(parts.next()?)?, port(parts.next()?)?);
    let address = match parts.next() {
        None => None,
        Some(ip) => Some(ip.parse().ok()?),
    };
    parts.next().is_none().then_some(Publish { address, host, guest, transport })
}

/// The host's side.
impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host_address(), self.host, self.transport())
    }
}

impl Publish {
    /// Text that means this port again.
    pub fn as_given(&self) -> String {
        format!("{}:{}:{}/{}", self.host_address(), self.host, self.guest, self.transport())
    }

    fn host_address(&self) -> Ipv4Addr {
        self.address.unwrap_or(Ipv4Addr::UNSPECIFIED)
    }

    fn transport(&self) -> &'static str {
        match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        }
    }

    /// Takes the host's port, so that nobody else can while this lives. Nothing is ever received there.
    ///
    /// # Errors
    /// Somebody has it, or the address is not one of this host.
    pub(super) fn reserve(&self) -> Result<OwnedFd, Failure> {
        let kind = match self.transport {
            Transport::Tcp => SockType::Stream,
            Transport::Udp => SockType::Datagram,
        };
        let what = || format!("cannot publish port {self}");
        let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None).context(what)?;
        let address = std::net::SocketAddrV4::new(self.host_address(), self.host);
        bind(socket.as_raw_fd(), &SockaddrIn::from(address)).map_err(|error| {
            let failure = Failure::because(what(), error);
            match error {
                Errno::EADDRINUSE => {
                    failure.help("another machine or program has it: choose another host port")
                }
                Errno::EADDRNOTAVAIL => failure.help("leave the address out, or name one of this host"),
                _ => failure,
            }
        })?;
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_published_on_all_addresses_or_one_for_tcp_or_udp() {
        for (text, address, host, guest, transport) in [
            ("8080:80", None, 8080, 80, Transport::Tcp),
            ("8080:80/tcp", None, 8080, 80, Transport::Tcp),
            ("127.0.0.1:53:5353/udp", Some(Ipv4Addr::LOCALHOST), 53, 5353, Transport::Udp),
        ] {
            assert_eq!(text.parse(), Ok(Publish { address, host, guest, transport }));
        }
    }

    #[test]
    fn a_port_that_is_passed_on_is_the_same_port() {
        for text in ["8080:80", "127.0.0.1:53:5353/udp", "0.0.0.0:1:65535/tcp"] {
            let port: Publish = text.parse().unwrap();
            let again: Publish = port.as_given().parse().unwrap();
            let host = |port: &Publish| (port.host_address(), port.host, port.guest, port.transport);
            assert_eq!(host(&again), host(&port), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:0",
            "80:65536",
            "80:80/sctp",
            "a:80:80",
            "1.2.3.4:5:6:7",
            "80:80/",
        ] {
            let error = text.parse::<Publish>().unwrap_err();
            assert!(error.to_string().contains("[IP:]HOST:GUEST"), "{text}");
        }
    }
}
