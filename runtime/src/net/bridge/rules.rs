//! The rules that bridges need, from the leases.

use std::net::{Ipv4Addr, SocketAddr};

use mvm_protocol::Address;

use super::lease::Entry;
use super::{Kind, Subnet};
use crate::failure::{Context, Failure};
use crate::net::Publish;
use crate::net::nft::{Hook, Rule, Table};

/// Our table. Nobody else's is touched.
pub(super) const TABLE: &str = "mvm";

const ANY: Address = Address { ip: std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), prefix: 0 };
const LOOPBACK: Address = Address { ip: std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), prefix: 8 };

/// Rules by where they apply.
#[derive(Debug, Default)]
pub(super) struct Rules {
    raw: Vec<Rule>,
    prerouting: Vec<Rule>,
    output: Vec<Rule>,
    postrouting: Vec<Rule>,
    forward: Vec<Rule>,
    input: Vec<Rule>,
}

impl Rules {
    pub(super) fn is_empty(&self) -> bool {
        // No bridge is without rules about what passes.
        self.forward.is_empty()
    }

    /// Adds what a bridge with these guests needs.
    pub(super) fn add(&mut self, kind: Kind, subnet: Subnet, leases: &[Entry]) {
        let bridge = kind.bridge();
        if kind == Kind::HostOnly {
            self.forward.push(Rule::new().came_in_on(bridge).not_goes_out_on(bridge).discard());
            self.forward.push(Rule::new().goes_out_on(bridge).not_came_in_on(bridge).discard());
            return;
        }
        self.postrouting.push(Rule::new().from(subnet.address()).not_goes_out_on(bridge).masquerade());
        // The host's own loopback is no address a guest could answer.
        self.postrouting.push(Rule::new().from(LOOPBACK).goes_out_on(bridge).masquerade());
        self.input.push(Rule::new().came_in_on(bridge).to(LOOPBACK).begins().discard());
        // Only published ports are reached from outside.
        let begun_outside = Rule::new().goes_out_on(bridge).not_came_in_on(bridge).begins();
        self.forward.push(begun_outside.not_sent_elsewhere().discard());
        for entry in leases {
            for port in &entry.ports {
                self.prerouting.push(publish(port, entry.ip));
                self.output.push(publish(port, entry.ip));
                self.postrouting.push(around(port, entry.ip, subnet, bridge));
            }
        }
    }

    /// Adds what makes a further bridge of a network a mere switch.
    pub(super) fn switch(&mut self, bridge: &str) {
        self.raw.push(Rule::new().came_in_on(bridge).untracked());
        self.input.push(Rule::new().came_in_on(bridge).discard());
        self.forward.push(Rule::new().came_in_on(bridge).not_goes_out_on(bridge).discard());
    }

    /// Puts them in place of those that are there, all at once.
    pub(super) fn install(self) -> Result<(), Failure> {
        let mut chains = vec![
            (Hook::Prerouting, self.prerouting),
            (Hook::Output, self.output),
            (Hook::Postrouting, self.postrouting),
            (Hook::Forward, self.forward),
            (Hook::Input, self.input),
        ];
        if !self.raw.is_empty() {
            chains.push((Hook::Raw, self.raw));
        }
        Table { name: TABLE, chains }
            .install()
            .context(|| "cannot set the rules of nftables".to_owned())
            .map_err(|failure| {
                failure.help("the kernel needs nf_tables with nat, masquerade, ct and fib (CONFIG_NFT_*)")
            })
    }
}

/// What comes to the host's port goes to the guest's.
fn publish(port: &Publish, guest: Ipv4Addr) -> Rule {
    let host = match port.address {
        Some(ip) => Rule::new().to(Address { ip: ip.into(), prefix: 32 }),
        None => Rule::new().to(ANY).for_this_host(),
    };
    let to = SocketAddr::from((guest, port.guest));
    host.transport(port.transport).for_port(port.host).send_to(to)
}

/// A guest that comes to another's port, or its own, by way of the host is answered by way of the host.
fn around(port: &Publish, guest: Ipv4Addr, subnet: Subnet, bridge: &str) -> Rule {
    let guest = Address { ip: guest.into(), prefix: 32 };
    let rule = Rule::new().from(subnet.address()).to(guest).goes_out_on(bridge);
    rule.transport(port.transport).for_port(port.guest).masquerade()
}
