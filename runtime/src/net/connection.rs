//! A network as asked for, made: cards for the machine, words for its agent, and what must be undone.

use std::net::IpAddr;
use std::path::Path;

use mvm_protocol::{Configure, Interface, Route};

use super::bridge::{DIR, Kind, MACHINES, Port, PortRequest, Subnet, plug};
use super::dns::resolv_conf;
use super::{Choice, Net, Netns, Publish, TapNet, TcpProfile, Twin, mac_of, scan, twin};
use crate::failure::Failure;
use crate::state::{Ledger, Resource};

/// Name of a guest's only interface.
const INTERFACE: &str = "eth0";
/// Largest packet on a bridge that is not ours, unless something else is asked for.
const MTU: u32 = 1500;

/// What a container's network is to be.
#[derive(Clone, Debug, Default)]
pub struct NetRequest {
    /// Which one.
    pub choice: Choice,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
    /// Name servers; without any the guest gets the host's, if its network reaches that far.
    pub dns: Vec<IpAddr>,
    /// Largest packet in bytes, if it is not the network's choice.
    pub mtu: Option<u16>,
    /// How the guest's TCP behaves.
    pub tcp: TcpProfile,
}

/// A network that is there for a machine; undone when dropped, which is to be after the machine's end.
#[derive(Debug)]
pub struct Connection {
    /// The machine's cards.
    pub nets: Vec<Net>,
    /// What the agent is told: interfaces, routes, neighbours, resolver.
    pub place: Configure,
    _held: Held,
}

/// What lasts as long as the connection.
#[derive(Debug)]
enum Held {
    Nothing,
    Port { _port: Port },
    Twins { _twins: Vec<Twin> },
}

impl NetRequest {
    /// Makes the network for the machine of this name. What would outlive this process is noted in `ledger` before.
    ///
    /// # Errors
    /// No rights, or something it needs is not there; nothing is left behind.
    pub fn connect(&self, machine: &str, ledger: Option<&Ledger>) -> Result<Connection, Failure> {
        self.connect_in(Path::new(DIR), machine, ledger)
    }

    /// The same with leases in another directory.
    pub(super) fn connect_in(
        &self,
        dir: &Path,
        machine: &str,
        ledger: Option<&Ledger>,
    ) -> Result<Connection, Failure> {
        self.check()?;
        if let (Choice::Nat(_) | Choice::HostOnly(_), Some(ledger)) = (&self.choice, ledger) {
            ledger.note(&Resource::Port { leases: dir.to_path_buf() })?;
        }
        let mut connection = match &self.choice {
            Choice::None => {
                Connection { nets: Vec::new(), place: Configure::default(), _held: Held::Nothing }
            }
            Choice::Nat(subnet) => self.on_bridge(dir, machine, Kind::Nat, *subnet)?,
            Choice::HostOnly(subnet) => self.on_bridge(dir, machine, Kind::HostOnly, *subnet)?,
            Choice::Bridge(net) => {
                let mac = net.mac.unwrap_or_else(|| mac_of(&format!("{machine}/{}", net.name)));
                let tap = plug(&net.name, mac, self.mtu.map_or(MTU, u32::from))?;
                let place = self.place(&TapNet { mac: Some(mac), ..net.clone() });
                Connection { nets: vec![Net::Open(tap)], place, _held: Held::Nothing }
            }
            Choice::Netns(path) => self.in_netns(path, ledger)?,
            Choice::Tap(net) => {
                let mac = net.mac.unwrap_or_else(|| mac_of(&format!("{machine}/{}", net.name)));
                let net = TapNet { mac: Some(mac), ..net.clone() };
                let place = self.place(&net);
                Connection { nets: vec![Net::Tap(net)], place, _held: Held::Nothing }
            }
        };
        connection.place.resolv_conf = self.resolver();
        Ok(connection)
    }

    /// What can be said before anything is made.
    fn check(&self) -> Result<(), Failure> {
        let choice = &self.choice;
        if let Some(port) = self.publish.first().filter(|_| !matches!(choice, Choice::Nat(_))) {
            return Err(Failure::new(format!("cannot publish port {port} with --net {choice}"))
                .help("ports are published with --net nat; elsewhere the guest's own address is reached"));
        }
        let by_anyone = matches!(choice, Choice::None | Choice::Tap(_));
        if !by_anyone && !nix::unistd::geteuid().is_root() {
            return Err(Failure::new(format!("cannot use --net {choice} without being root")).help(
                "run as root, or have root make a tap for you (ip tuntap add NAME mode tap user USER) and use --net tap=NAME",
            ));
        }
        Ok(())
    }

    fn on_bridge(
        &self,
        dir: &Path,
        machine: &str,
        kind: Kind,
        subnet: Option<Subnet>,
    ) -> Result<Connection, Failure> {
        let request =
            PortRequest { machine, kind, machines: MACHINES, subnet, mtu: self.mtu, publish: &self.publish };
        let port = Port::make(dir, &request)?;
        let place = self.place(&TapNet {
            name: String::new(),
            mac: Some(port.tap.mac),
            address: Some(port.address),
            gateway: (kind == Kind::Nat).then_some(port.gateway.into()),
        });
        let place = match (place, port.tap.mtu) {
            (mut place, Some(mtu)) => {
                place.interfaces.iter_mut().for_each(|interface| interface.mtu = mtu.into());
                place
            }
            (place, None) => place,
        };
        Ok(Connection { nets: vec![Net::Open(port.tap.clone())], place, _held: Held::Port { _port: port } })
    }

    fn in_netns(&self, path: &Path, ledger: Option<&Ledger>) -> Result<Connection, Failure> {
        let netns = Netns::open(path)?;
        if netns.is_host()? {
            return Err(Failure::new(format!("{} is the host's own network", path.display()))
                .help("a machine takes a network over: make one for it (ip netns add NAME)"));
        }
        let mut network = scan(&netns)?;
        if network.links.is_empty() {
            return Err(Failure::new(format!("{} has no Ethernet link that is up", path.display())));
        }
        if let Some(mtu) = self.mtu {
            network.links.iter_mut().for_each(|link| link.mtu = mtu.into());
        }
        let twins = network.links.iter().map(|link| twin(&netns, link, ledger));
        let twins = twins.collect::<Result<Vec<_>, _>>()?;
        let nets = twins.iter().map(Twin::net).collect();
        Ok(Connection { nets, place: network.configure(), _held: Held::Twins { _twins: twins } })
    }

    /// One interface and its default route.
    fn place(&self, net: &TapNet) -> Configure {
        let Some(mac) = net.mac else { return Configure::default() };
        let route = |gateway| Route {
            destination: None,
            gateway: Some(gateway),
            interface: INTERFACE.to_owned(),
            metric: 0,
            on_link: true,
        };
        let interface = Interface {
            mac: mac.bytes(),
            name: INTERFACE.to_owned(),
            mtu: self.mtu.map_or(0, u32::from),
            addresses: net.address.into_iter().collect(),
        };
        Configure {
            interfaces: vec![interface],
            routes: net.gateway.map(route).into_iter().collect(),
            ..Configure::default()
        }
    }

    fn resolver(&self) -> Option<String> {
        let reaches_out = match &self.choice {
            Choice::Nat(_) | Choice::Netns(_) => true,
            Choice::Bridge(net) | Choice::Tap(net) => net.gateway.is_some(),
            Choice::None | Choice::HostOnly(_) => false,
        };
        if reaches_out || !self.dns.is_empty() { resolv_conf(&self.dns) } else { None }
    }
}
