//! Bridges of ours on the host, for machines that no engine connects: made with the first machine, removed with the
//! last.
//!
//! Everything follows from the leases of machines that live: whoever comes or goes makes bridges and rules anew from
//! them, under one lock. What a crash leaves is put right by the next one.

mod host;
mod lease;
mod rules;
mod subnet;
mod tree;

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_devices::virtio::net::MacAddress;
use mvm_protocol::Address;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

pub use subnet::{NotASubnet, Subnet};
pub(crate) use tree::{MACHINES, PORTS};

use super::netlink::{Message, Netlink};
use super::nft::{dropping, remove_table};
use super::tap::{AnyTap, open_new_tap};
use super::{OpenTap, Publish, mac_of};
use crate::failure::{Context, Failure};
use host::Host;
use lease::{Entry, Lease, Ledger};
use tree::Branch;

/// Where the leases are.
pub(super) const DIR: &str = "/run/mvm/net";
/// The kernel picks a free number. Not the pattern of taps in pods, and not the name of a bridge.
const TAP_NAME: &str = "mvmtap%d";

/// Addresses for guests in the subnet that is tried first, a /20.
pub(crate) const DEFAULT_GUESTS: u64 = (1 << 12) - 3;

/// What a bridge is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Guests reach everything the host reaches.
    Nat,
    /// Guests reach the host and each other.
    HostOnly,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Nat, Self::HostOnly];

    /// The first bridge's name.
    fn bridge(self) -> &'static str {
        match self {
            Self::Nat => "mvm0",
            Self::HostOnly => "mvmhost",
        }
    }

    /// Subnets to be tried, none of them a habit of other programs.
    fn subnets(self) -> [&'static str; 3] {
        match self {
            Self::Nat => ["10.213.128.0/20", "172.29.208.0/20", "192.168.213.0/24"],
            Self::HostOnly => ["10.213.144.0/20", "172.29.224.0/20", "192.168.214.0/24"],
        }
    }
}

/// What is asked of a bridge.
#[derive(Clone, Debug)]
pub(super) struct PortRequest<'a> {
    /// Name of the machine.
    pub(super) machine: &'a str,
    pub(super) kind: Kind,
    /// Machines of one bridge before there is a further one.
    pub(super) machines: u32,
    /// The bridge's subnet, if it matters.
    pub(super) subnet: Option<Subnet>,
    pub(super) mtu: Option<u16>,
    pub(super) publish: &'a [Publish],
}

/// A machine's port on a bridge. Its address, ports and, if it is the last, the bridge go with it.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) tap: OpenTap,
    pub(super) address: Address,
    pub(super) gateway: Ipv4Addr,
    dir: PathBuf,
    lease: Option<Lease>,
    _reserved: Vec<OwnedFd>,
}

impl Port {
    /// Makes a port, and the bridge if there is none or none with room; the leases are in `dir`.
    ///
    /// # Errors
    /// No rights, no free address, a published port that is in use, a subnet that the host uses otherwise.
    pub(super) fn make(dir: &Path, request: &PortRequest<'_>) -> Result<Self, Failure> {
        let reserved = request.publish.iter().map(Publish::reserve).collect::<Result<_, _>>()?;
        let ledger = open(dir)?;
        let leases = leases(&ledger, request.kind)?;
        let made = Host::read().and_then(|host| {
            let subnet = host.bridge(request, leases.is_empty())?;
            let Place { tap, ip, branch } = host.find_place(request, subnet, &leases)?;
            let (machine, ports) = (request.machine.to_owned(), request.publish.to_vec());
            let entry = Entry { machine, ip, ports, branch };
            let lease = ledger
                .lease(request.kind.bridge(), &entry)
                .context(|| format!("cannot take the address {ip} in {}", dir.display()))?;
            let (address, gateway) = (subnet.guest(ip), subnet.host_ip());
            let dir = dir.to_path_buf();
            Ok(Self { tap, address, gateway, dir, lease: Some(lease), _reserved: reserved })
        });
        // After a failure this undoes what was begun.
        let settled = settle(&ledger);
        drop(ledger);
        let port = made?;
        settled?;
        if request.kind == Kind::Nat {
            warn_of_dropping();
        }
        Ok(port)
    }

    /// As if its process had been killed: locks go, and nothing is given back.
    #[cfg(test)]
    pub(super) fn die(mut self) {
        drop(self.lease.take());
    }

    fn give_back(&mut self) -> Result<(), Failure> {
        let Some(lease) = self.lease.take() else { return Ok(()) };
        let ledger = open(&self.dir)?;
        ledger.give_back(lease).context(|| "cannot give a network address back".to_owned())?;
        settle(&ledger)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Err(failure) = self.give_back() {
            log::warn!("{}", failure.report());
        }
    }
}

/// Says when rules of others stand in the way: an accepting rule of ours cannot outdo them.
fn warn_of_dropping() {
    let bridge = Kind::Nat.bridge();
    for chain in dropping(bridge).unwrap_or_default() {
        log::warn!(
            "nftables' {chain} drops packets that it is not told to accept, guests' as well; with docker: \
             iptables -I DOCKER-USER -i {bridge}+ -j ACCEPT; iptables -I DOCKER-USER -o {bridge}+ -j ACCEPT"
        );
    }
}

/// Removes what machines that are gone left of bridges and rules.
///
/// # Errors
/// No rights, or the kernel refuses.
pub fn sweep() -> Result<(), Failure> {
    sweep_leases(Path::new(DIR))
}

/// The same for the leases in `dir`.
///
/// # Errors
/// As for [`sweep`].
pub fn sweep_leases(dir: &Path) -> Result<(), Failure> {
    if dir.exists() { settle(&open(dir)?) } else { Ok(()) }
}

/// Where a machine is put.
struct Place {
    tap: OpenTap,
    ip: Ipv4Addr,
    branch: u32,
}

impl Host {
    /// Makes a tap for the first address that is free, unless its bridge is full: others may have ports there, and
    /// those of machines that were killed may go later than their leases.
    fn find_place(
        &self,
        request: &PortRequest<'_>,
        subnet: Subnet,
        leases: &[Entry],
    ) -> Result<Place, Failure> {
        let taken: HashSet<_> = leases.iter().map(|entry| entry.ip).collect();
        let mtu = request.mtu.map_or_else(|| self.mtu(), u32::from);
        let mut full = None;
        for (place, ip) in (0..).zip(subnet.guests()) {
            let number = place / request.machines.max(1);
            if full == Some(number) || taken.contains(&ip) {
                continue;
            }
            let branch = Branch { kind: request.kind, number };
            branch.grow(self, mtu)?;
            // The same address always has the same card: nobody's memory of it is wrong.
            let mac = mac_of(&format!("{}/{ip}", request.kind.bridge()));
            match plug_in(&branch.name(), mac, mtu)? {
                Some(tap) => return Ok(Place { tap, ip, branch: number }),
                None => full = Some(number),
            }
        }
        Err(Failure::new(match full {
            Some(_) => format!("no bridge with a free address of {subnet} has a port left"),
            None => format!("every address of {subnet} is taken"),
        })
        .help("name a wider subnet: --net nat:SUBNET"))
    }
}

/// Makes a tap that is a port of a bridge, which may be anyone's. It goes away with its last user.
///
/// # Errors
/// No rights, there is no such bridge, or it is full.
pub(super) fn plug(bridge: &str, mac: MacAddress, mtu: u32) -> Result<OpenTap, Failure> {
    if Host::read()?.find(bridge)?.is_none() {
        return Err(Failure::new(format!("there is no bridge {bridge}"))
            .help("make one (ip link add NAME type bridge), or have mvm make its own: --net nat"));
    }
    plug_in(bridge, mac, mtu)?.ok_or_else(|| {
        Failure::new(format!("bridge {bridge} has no port left: Linux gives it {PORTS}"))
            .help("put the machine on another, or on mvm's own, which are as many as it takes: --net nat")
    })
}

/// The same for a bridge that is there; `None` if it is full.
fn plug_in(bridge: &str, mac: MacAddress, mtu: u32) -> Result<Option<OpenTap>, Failure> {
    let AnyTap { file, name } = open_new_tap(TAP_NAME)?;
    let connect = || {
        let mut kernel = Netlink::open()?;
        let [tap, bridge] = [if_nametoindex(name.as_str())?, if_nametoindex(bridge)?];
        // Without IPv6 in the kernel there is nothing to keep quiet.
        let _ = kernel.perform(Message::without_ipv6(tap));
        kernel.perform(Message::set_bridge(tap, bridge))?;
        kernel.perform(Message::raise(tap, Some(mtu)))
    };
    match connect() {
        Err(Errno::EXFULL) => return Ok(None),
        connected => connected.context(|| format!("cannot connect a tap to bridge {bridge}"))?,
    }
    Ok(Some(OpenTap { file: Arc::new(file), mac, mtu: u16::try_from(mtu).ok(), only_own_mac: true }))
}

fn open(dir: &Path) -> Result<Ledger, Failure> {
    Ledger::open(dir).context(|| format!("cannot use {} for leases", dir.display()))
}

fn leases(ledger: &Ledger, kind: Kind) -> Result<Vec<Entry>, Failure> {
    ledger.leases(kind.bridge()).context(|| format!("cannot read the leases of {}", kind.bridge()))
}

/// Makes rules follow from leases, and removes bridges without any.
fn settle(ledger: &Ledger) -> Result<(), Failure> {
    let mut rules = rules::Rules::default();
    let host = Host::read()?;
    for kind in Kind::ALL {
        let leases = leases(ledger, kind)?;
        let branches = leases.iter().map(|entry| Branch { kind, number: entry.branch });
        let further = tree::further(branches);
        tree::prune(&host, kind, &further)?;
        let Some(index) = host.find(kind.bridge())? else { continue };
        match host.subnet(index) {
            Some(subnet) if !leases.is_empty() => rules.add(kind, subnet, &leases),
            _ => remove_bridge(kind, index)?,
        }
        further.iter().for_each(|branch| rules.switch(&branch.name()));
    }
    if rules.is_empty() {
        return remove_table(rules::TABLE).context(|| "cannot remove the rules of nftables".to_owned());
    }
    rules.install()
}

fn remove_bridge(kind: Kind, index: u32) -> Result<(), Failure> {
    match Netlink::open().and_then(|mut kernel| kernel.perform(Message::remove_link(index))) {
        Err(Errno::ENODEV) => Ok(()),
        result => result.context(|| format!("cannot remove bridge {}", kind.bridge())),
    }
}
