//! What a network name space holds, as a guest that takes its place must have it.

use std::net::IpAddr;

use mvm_devices::virtio::net::MacAddress;
use mvm_protocol::{Address, Configure, Interface, Neighbour, Route};

use super::Netns;
use super::netlink::{AddressEntry, LinkEntry, Message, NeighbourEntry, Netlink, RouteEntry};
use crate::failure::{Context, Failure};

/// Driver of taps and tuns: another machine's, or ours.
pub(super) const TUN: &str = "tun";

/// The network of a name space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Its Ethernet links that are up, without taps of ours.
    pub links: Vec<Link>,
    /// Its routes through them, in an order in which they can be added.
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// One link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Number in its name space.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Hardware address, which the guest's card must have.
    pub mac: MacAddress,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Addresses, without link-local IPv6 ones, which follow from the hardware address.
    pub addresses: Vec<Address>,
}

impl Network {
    /// Whether a guest could talk to anyone: a link has an address.
    pub fn is_usable(&self) -> bool {
        self.links.iter().any(|link| !link.addresses.is_empty())
    }

    /// The same for the agent: interfaces, routes and neighbours; the rest is left empty.
    pub fn configure(&self) -> Configure {
        let interface = |link: &Link| Interface {
            mac: link.mac.bytes(),
            name: link.name.clone(),
            mtu: link.mtu,
            addresses: link.addresses.clone(),
        };
        Configure {
            interfaces: self.links.iter().map(interface).collect(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
            ..Configure::default()
        }
    }
}

/// Reads what is in `netns` now.
///
/// # Errors
/// The name space cannot be entered, or the kernel does not answer.
pub fn scan(netns: &Netns) -> Result<Network, Failure> {
    netns.run(scan_here)?
}

/// The same for the calling thread's name space.
///
/// # Errors
/// The kernel does not answer.
pub(super) fn scan_here() -> Result<Network, Failure> {
    let tables = Tables::read().context(|| "cannot read the network name space's tables".to_owned())?;
    Ok(tables.network())
}

/// What the kernel tells.
struct Tables {
    links: Vec<LinkEntry>,
    addresses: Vec<AddressEntry>,
    routes: Vec<RouteEntry>,
    neighbours: Vec<NeighbourEntry>,
}

impl Tables {
    fn read() -> nix::Result<Self> {
        let mut kernel = Netlink::open()?;
        Ok(Self {
            links: kernel.list(Message::links(), LinkEntry::parse)?,
            addresses: kernel.list(Message::addresses(), AddressEntry::parse)?,
            routes: kernel.list(Message::routes(), RouteEntry::parse)?,
            neighbours: kernel.list(Message::neighbours(), NeighbourEntry::parse)?,
        })
    }

    fn network(self) -> Network {
        let links: Vec<Link> = self.links.iter().filter_map(|entry| self.link(entry)).collect();
        let name = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
        let peers = self.addresses.iter().filter(|entry| entry.scope == libc::RT_SCOPE_UNIVERSE);
        let mut routes: Vec<Route> =
            peers.filter_map(|entry| peer_route(entry, name(entry.index)?)).collect();
        routes.extend(self.routes.iter().filter_map(|entry| route(entry, name(entry.index)?)));
        in_order(&mut routes);
        let neighbour = |entry: &NeighbourEntry| {
            Some(Neighbour { ip: entry.ip, mac: entry.mac, interface: name(entry.index)? })
        };
        let neighbours = self.neighbours.iter().filter_map(neighbour).collect();
        Network { links, routes, neighbours }
    }

    /// What a guest is to have of a link, if it is to have it.
    fn link(&self, entry: &LinkEntry) -> Option<Link> {
        if !entry.ethernet || !entry.up || entry.kind == TUN {
            return None;
        }
        let own = |it: &&AddressEntry| {
            it.index == entry.index && !it.temporary && it.scope != libc::RT_SCOPE_HOST && !is_link_local(it)
        };
        Some(Link {
            index: entry.index,
            name: entry.name.clone(),
            mac: MacAddress::new(entry.mac.as_slice().try_into().ok()?).ok()?,
            mtu: entry.mtu,
            addresses: self.addresses.iter().filter(own).map(address).collect(),
        })
    }
}

/// IPv6 addresses that every link gives itself. IPv4 ones of that kind are somebody's choice.
fn is_link_local(entry: &AddressEntry) -> bool {
    entry.address.ip.is_ipv6() && entry.scope == libc::RT_SCOPE_LINK
}

/// An address with its network; one with a peer is alone, and the peer gets a route.
fn address(entry: &AddressEntry) -> Address {
    let ip = entry.address.ip;
    match entry.peer {
        Some(_) => Address { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } },
        None => entry.address,
    }
}

fn peer_route(entry: &AddressEntry, interface: String) -> Option<Route> {
    let destination = Some(network_of(Address { ip: entry.peer?, prefix: entry.address.prefix }));
    Some(Route { destination, gateway: None, interface, metric: 0, on_link: false })
}

/// A route for the guest; those that its own kernel makes from its addresses are left to it.
fn route(entry: &RouteEntry, interface: String) -> Option<Route> {
    if entry.from_address {
        return None;
    }
    let &RouteEntry { mut destination, gateway, metric, on_link, ipv4, .. } = entry;
    if destination.is_none() && gateway.is_none() && !ipv4 {
        // Nothing else would say that this default route is one of IPv6.
        destination = Some(Address { ip: IpAddr::from([0u16; 8]), prefix: 0 });
    }
    Some(Route { destination, gateway, interface, metric, on_link })
}

/// Puts routes that lead directly to a link first, since gateways are found by them; default routes last.
fn in_order(routes: &mut [Route]) {
    routes.sort_by_key(|route| (route.gateway.is_some(), route.destination.is_none()));
}

/// The first address of an address's network.
fn network_of(address: Address) -> Address {
    let prefix = address.prefix;
    let ip = match address.ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32u32.saturating_sub(prefix.into())).unwrap_or(0);
            IpAddr::V4((ip.to_bits() & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128u32.saturating_sub(prefix.into())).unwrap_or(0);
            IpAddr::V6((ip.to_bits() & mask).into())
        }
    };
    Address { ip, prefix }
}
