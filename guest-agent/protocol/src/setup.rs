//! Host name, network and resolver of a guest.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Everything about the guest's place in its network. May be sent again; what it names is set anew,
/// what it does not name stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// Host name of the machine and text of `/etc/hostname`.
    pub hostname: Option<String>,
    /// Interfaces to bring up; loopback always is.
    pub interfaces: Vec<Interface>,
    /// Routes, in the order they must be added.
    pub routes: Vec<Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Text of `/etc/resolv.conf` in container roots.
    pub resolv_conf: Option<String>,
    /// Text of `/etc/hosts` in container roots.
    pub hosts: Option<String>,
}

/// One interface, found by its MAC address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The hardware address it has.
    pub mac: [u8; 6],
    /// The name it gets, at most 15 bytes.
    pub name: String,
    /// Largest packet, in bytes; 0 leaves the driver's choice.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Leading bits that name the network.
    pub prefix: u8,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to; `None` is the default route.
    pub destination: Option<Address>,
    /// The next hop; `None` is directly on the link.
    pub gateway: Option<IpAddr>,
    /// The interface's name.
    pub interface: String,
    /// Preference, lower first; 0 leaves it to the kernel.
    pub metric: u32,
    /// The gateway is on the link although no address says so.
    pub on_link: bool,
}

/// A neighbour that is never asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The interface's name.
    pub interface: String,
}
