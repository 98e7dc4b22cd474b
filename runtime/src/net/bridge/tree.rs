//! More machines than a bridge has ports for: further bridges of the same network.
//!
//! A bridge of Linux has 1,023 ports. Machines beyond that are on further bridges, each joined by a pair of virtual
//! Ethernet links (`veth`) to one above it, the first at the top. To guests that is one Ethernet: they find each other
//! and the gateway by ARP, hear each other's broadcasts and speak IPv6 as before, and addresses come from one subnet.
//! Routing between bridges would do without the joints, but each would need a subnet of its own or answer ARP for all
//! others', broadcasts would end there, `host-only` would need the host to pass packets on, and whatever rules the host
//! has for what passes would see what goes from one guest to another.
//!
//! An address belongs to one bridge: its place among the subnet's divided by [`MACHINES`]. Addresses are given from the
//! lowest, so bridges fill in order, and the hardware address that goes with an address is always behind the same port:
//! no bridge remembers it where it no longer is.
//!
//! Only the first bridge has an address of the host. A further one must be nothing but a switch, although the host
//! listens on every link: it answers no ARP (the host would, for any address of its own, and guests would send there
//! what other rules apply to), rules drop what is sent to it, and keep what crosses it out of connection tracking: where
//! `br_netfilter` shows bridged packets to rules of IP, a connection would else be taken for decided here before the
//! first bridge sees it, and be masqueraded here.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::Kind;
use super::host::Host;
use crate::failure::{Context, Failure};
use crate::net::mac_of;
use crate::net::netlink::{LinkEntry, Message, Netlink};

/// Ports of a bridge: `BR_MAX_PORTS` (net/bridge/br_private.h) is 1024, and 0 is none.
pub(crate) const PORTS: u32 = 1023;
/// Bridges below one. The default subnet has room for this many and the first: nobody's way to the gateway is longer
/// than one joint.
const BELOW: u32 = 4;
/// Machines of one bridge; its other ports are for joints, with the bridge above and those below.
pub(crate) const MACHINES: u32 = PORTS - 1 - BELOW;

/// One of a network's bridges; 0 is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Branch {
    pub(super) kind: Kind,
    pub(super) number: u32,
}

impl Branch {
    /// The bridge's name.
    pub(super) fn name(self) -> String {
        let first = self.kind.bridge();
        if self.number == 0 { first.to_owned() } else { format!("{first}-{}", self.number) }
    }

    /// Itself and all above it but the first.
    fn further(self) -> impl Iterator<Item = Self> {
        let further = |branch: &Self| branch.number > 0;
        std::iter::successors(Some(self).filter(further), move |it| Some(it.above()).filter(further))
    }

    fn above(self) -> Self {
        Self { number: self.number.saturating_sub(1) / BELOW, ..self }
    }

    /// The ends of the joint with the bridge above: the port of this one, and of that.
    fn joint(self) -> [String; 2] {
        ["u", "d"].map(|end| format!("{}{end}", self.name()))
    }

    /// The further bridge that a link of this name is, or joins.
    fn of_link(kind: Kind, link: &str) -> Option<Self> {
        let rest = link.strip_prefix(kind.bridge())?.strip_prefix('-')?;
        let number = rest.strip_suffix(['u', 'd']).unwrap_or(rest).parse().ok()?;
        (number > 0).then_some(Self { kind, number })
    }

    /// Makes it and those above it, as far as they are missing; the first is there. Its joint carries packets of `mtu`
    /// bytes at least.
    ///
    /// # Errors
    /// The kernel refuses, or a name is another's.
    pub(super) fn grow(self, host: &Host, mtu: u32) -> Result<(), Failure> {
        let missing: Vec<_> = self.further().collect();
        missing.into_iter().rev().try_for_each(|branch| branch.make(host, mtu))
    }

    fn make(self, host: &Host, mtu: u32) -> Result<(), Failure> {
        let name = self.name();
        let there = host.find(&name)?.is_some();
        if there && !host.links.iter().any(|link| link.name == name && self.is_ours(link)) {
            return Err(Failure::new(format!("there is a bridge {name} that is not mvm's"))
                .help("rename it: mvm needs that name for more machines than one bridge has ports for"));
        }
        self.make_bridge(there)
            .and_then(|()| self.join(host, mtu))
            .context(|| format!("cannot join bridge {name} to {}", self.above().name()))
    }

    fn make_bridge(self, there: bool) -> nix::Result<()> {
        let name = self.name();
        let mut kernel = Netlink::open()?;
        if !there {
            kernel.perform(Message::new_bridge(&name, mac_of(&name).bytes()))?;
        }
        let index = if_nametoindex(name.as_str())?;
        let _ = kernel.perform(Message::without_ipv6(index));
        kernel.perform(Message::without_arp(index))?;
        kernel.perform(Message::raise(index, None))
    }

    fn join(self, host: &Host, mtu: u32) -> nix::Result<()> {
        let mut kernel = Netlink::open()?;
        let [end, other] = self.joint();
        let known = host.links.iter().find(|link| link.name == end);
        if known.is_none() {
            kernel.perform(Message::new_pair(&end, &other))?;
        }
        // What two machines may say to each other must fit, and a bridge takes the smallest of its ports'.
        let mtu = known.map_or(mtu, |link| link.mtu.max(mtu));
        for (end, bridge) in [(end, self), (other, self.above())] {
            let index = if_nametoindex(end.as_str())?;
            let _ = kernel.perform(Message::without_ipv6(index));
            kernel.perform(Message::set_bridge(index, if_nametoindex(bridge.name().as_str())?))?;
            kernel.perform(Message::raise(index, Some(mtu)))?;
        }
        Ok(())
    }

    /// Whether mvm made a link: the bridge's address follows from its name.
    fn is_ours(self, link: &LinkEntry) -> bool {
        match link.kind.as_str() {
            "bridge" => link.mac == mac_of(&self.name()).bytes(),
            kind => kind == "veth" && self.joint().contains(&link.name),
        }
    }
}

/// The further bridges that these, and those below the first that lead to them, are.
pub(super) fn further(branches: impl Iterator<Item = Branch>) -> BTreeSet<Branch> {
    branches.flat_map(Branch::further).collect()
}

/// Removes further bridges of a network, and their joints, that are not among `needed`.
///
/// # Errors
/// The kernel refuses.
pub(super) fn prune(host: &Host, kind: Kind, needed: &BTreeSet<Branch>) -> Result<(), Failure> {
    for link in &host.links {
        let Some(branch) = Branch::of_link(kind, &link.name) else { continue };
        if needed.contains(&branch) || !branch.is_ours(link) {
            continue;
        }
        match Netlink::open().and_then(|mut kernel| kernel.perform(Message::remove_link(link.index))) {
            // The other end of a joint that has just gone.
            Err(Errno::ENODEV) => {}
            result => result.context(|| format!("cannot remove {}", link.name))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(number: u32) -> Branch {
        Branch { kind: Kind::Nat, number }
    }

    #[test]
    fn a_bridge_has_ports_for_its_machines_and_joints() {
        let below = |above| (1..100).filter(|number| branch(*number).above() == branch(above)).count();
        for number in 0..5 {
            let joints = below(number) + usize::from(number > 0);
            assert!(usize::try_from(MACHINES).unwrap() + joints <= usize::try_from(PORTS).unwrap());
        }
    }

    #[test]
    fn a_bridge_needs_those_above_it() {
        let numbers = |of: &[u32]| {
            let further = further(of.iter().map(|number| branch(*number)));
            further.into_iter().map(|branch| branch.number).collect::<Vec<_>>()
        };
        assert!(numbers(&[0]).is_empty());
        assert_eq!(numbers(&[0, 4]), [4]);
        assert_eq!(numbers(&[21, 2]), [1, 2, 5, 21]);
    }

    #[test]
    fn names_are_told_from_others_and_fit() {
        let host_only = Branch { kind: Kind::HostOnly, number: 16_000 };
        assert_eq!((branch(0).name().as_str(), host_only.name().as_str()), ("mvm0", "mvmhost-16000"));
        for name in host_only.joint().into_iter().chain([host_only.name()]) {
            assert!(name.len() < libc::IFNAMSIZ);
            assert_eq!(Branch::of_link(Kind::HostOnly, &name), Some(host_only));
            assert_eq!(Branch::of_link(Kind::Nat, &name), None);
        }
        for other in ["mvm0", "mvm0-", "mvm0-0", "mvm0-x", "mvm0-1x", "mvm01", "eth0"] {
            assert_eq!(Branch::of_link(Kind::Nat, other), None, "{other}");
        }
    }
}
