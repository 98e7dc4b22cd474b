//! The host's links, addresses and routes, and a bridge with a subnet that nobody there uses.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::{Kind, PortRequest, Subnet, remove_bridge};
use crate::failure::{Context, Failure};
use crate::net::mac_of;
use crate::net::netlink::{AddressEntry, LinkEntry, Message, Netlink, RouteEntry};

/// Largest packet if the host has no default route whose link would say.
const MTU: u32 = 1500;
/// Lets the host pass packets on between its links.
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// The host's network as it is, without taps: there may be thousands.
pub(super) struct Host {
    /// Bridges and pairs.
    pub(super) links: Vec<LinkEntry>,
    addresses: Vec<AddressEntry>,
    routes: Vec<RouteEntry>,
}

impl Host {
    pub(super) fn read() -> Result<Self, Failure> {
        let read = || {
            let mut kernel = Netlink::open()?;
            let mut links = kernel.list(Message::links_of("bridge"), LinkEntry::parse)?;
            links.extend(kernel.list(Message::links_of("veth"), LinkEntry::parse)?);
            Ok::<_, Errno>(Self {
                links,
                addresses: kernel.list(Message::addresses().of_ipv4(), AddressEntry::parse)?,
                routes: kernel.list(Message::routes().of_ipv4(), RouteEntry::parse)?,
            })
        };
        read().context(|| "cannot read the host's network".to_owned())
    }

    /// The number of a bridge, if it is there.
    pub(super) fn find(&self, name: &str) -> Result<Option<u32>, Failure> {
        let bridge = self.links.iter().find(|link| link.name == name && link.kind == "bridge");
        match bridge {
            None if if_nametoindex(name).is_ok() => Err(Failure::new(format!("{name} is not a bridge"))),
            bridge => Ok(bridge.map(|link| link.index)),
        }
    }

    pub(super) fn subnet(&self, index: u32) -> Option<Subnet> {
        self.addresses.iter().filter(|it| it.index == index).find_map(|it| Subnet::around(it.address))
    }

    /// What the way out of the host can carry.
    pub(super) fn mtu(&self) -> u32 {
        let default = self.routes.iter().filter(|route| route.ipv4 && route.destination.is_none());
        let Some(way) = default.min_by_key(|route| route.metric) else { return MTU };
        let link = Netlink::open().and_then(|mut it| it.get(Message::link(way.index), LinkEntry::parse));
        link.ok().flatten().map_or(MTU, |link| link.mtu)
    }

    /// The subnet of the bridge that is asked for, which is made if it is not there or nobody's.
    pub(super) fn bridge(&self, request: &PortRequest<'_>, unused: bool) -> Result<Subnet, Failure> {
        let (kind, name) = (request.kind, request.kind.bridge());
        let present = self.find(name)?;
        if let Some(index) = present.filter(|_| !unused)
            && let Some(subnet) = self.subnet(index)
        {
            return match request.subnet {
                Some(wanted) if wanted != subnet => {
                    Err(Failure::new(format!("bridge {name} has {subnet}, not {wanted}"))
                        .help("leave the subnet out, or end the machines that use it"))
                }
                _ => Ok(subnet),
            };
        }
        if let Some(index) = present {
            remove_bridge(kind, index)?;
        }
        let subnet = self.choose(request, present)?;
        make_bridge(name, subnet).context(|| format!("cannot make bridge {name}"))?;
        switch_on(kind).map(|()| subnet)
    }

    /// A subnet that the host does not know yet; `own` is the bridge that is about to go.
    fn choose(&self, request: &PortRequest<'_>, own: Option<u32>) -> Result<Subnet, Failure> {
        let known = |subnet: Subnet| {
            let others = self.routes.iter().filter(|route| Some(route.index) != own);
            others.filter_map(|route| route.destination).find(|network| subnet.overlaps(*network))
        };
        if let Some(wanted) = request.subnet {
            return match known(wanted) {
                None => Ok(wanted),
                Some(network) => Err(Failure::new(format!(
                    "the host already has a route to {}/{}, which {wanted} overlaps",
                    network.ip, network.prefix
                ))),
            };
        }
        let mut candidates = request.kind.subnets().into_iter().filter_map(|text| text.parse().ok());
        candidates.find(|subnet| known(*subnet).is_none()).ok_or_else(|| {
            Failure::new("the host has routes to every subnet that would be tried for a bridge")
                .help("name one: --net nat:SUBNET")
        })
    }
}

fn make_bridge(name: &str, subnet: Subnet) -> nix::Result<()> {
    let mut kernel = Netlink::open()?;
    kernel.perform(Message::new_bridge(name, mac_of(name).bytes()))?;
    let index = nix::net::if_::if_nametoindex(name)?;
    let _ = kernel.perform(Message::without_ipv6(index));
    kernel.perform(Message::add_address(index, subnet.host()))?;
    kernel.perform(Message::raise(index, None))
}

/// Has the kernel pass packets on, and take those from its loopback to published ports. The rules see to it that
/// guests do not reach the loopback that way.
fn switch_on(kind: Kind) -> Result<(), Failure> {
    if kind != Kind::Nat {
        return Ok(());
    }
    let set = |path: &str| -> io::Result<()> {
        if fs::read_to_string(path)?.trim() == "1" { Ok(()) } else { fs::write(path, "1") }
    };
    for path in [IP_FORWARD, &format!("/proc/sys/net/ipv4/conf/{}/route_localnet", kind.bridge())] {
        set(path).context(|| format!("cannot switch {path} on"))?;
    }
    Ok(())
}
