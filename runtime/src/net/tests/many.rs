//! More machines on a network than one bridge has ports for. The host is a name space.

use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::guest::{Datagram, Guest};
use super::pod::{Pod, sh};
use crate::failure::Failure;
use crate::net::bridge::{Kind, MACHINES, PORTS, Port, PortRequest, Subnet, plug};
use crate::net::{Publish, mac_of, sweep_leases};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 213, 128, 1);

/// A host with a way out, whose bridges have room for few machines.
struct Host {
    world: Pod,
    dir: TempDir,
    kind: Kind,
    machines: u32,
}

impl Host {
    fn new(kind: Kind, machines: u32) -> Self {
        Self { world: Pod::connected(), dir: tempfile::tempdir().unwrap(), kind, machines }
    }

    fn dir(&self) -> PathBuf {
        self.dir.path().join("net")
    }

    fn try_port<'a>(&self, change: impl FnOnce(&mut PortRequest<'a>)) -> Result<Machine<'_>, Failure> {
        let (kind, machines) = (self.kind, self.machines);
        let mut request =
            PortRequest { machine: "otter", kind, machines, subnet: None, mtu: None, publish: &[] };
        change(&mut request);
        let port = self.world.inside.run(|| Port::make(&self.dir(), &request)).unwrap()?;
        Ok(Machine { host: self, port: Some(port) })
    }

    fn port(&self) -> Machine<'_> {
        self.try_port(|_| ()).unwrap()
    }

    fn ports(&self, count: usize) -> Vec<Machine<'_>> {
        (0..count).map(|_| self.port()).collect()
    }

    fn sh(&self, script: &str) -> String {
        sh(&self.world.inside, script)
    }

    /// Links of a network, without machines'.
    fn bridges(&self) -> Vec<String> {
        let list = self.sh("ip -o link | cut -d' ' -f2 | sed 's/[@:].*//' | grep '^mvm[0h]' || true");
        let mut names: Vec<_> = list.lines().map(str::to_owned).collect();
        names.sort();
        names
    }

    fn traces(&self) -> String {
        let leases = format!("find {} -type f ! -name lock", self.dir.path().display());
        self.sh(&format!("ip -o link | cut -d' ' -f2; nft list ruleset; {leases}"))
    }

    fn socket(&self, ip: Ipv4Addr, port: u16) -> UdpSocket {
        let netns = if ip == OUTSIDE { &self.world.outside } else { &self.world.inside };
        let socket = netns.run(|| UdpSocket::bind((ip, port)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    /// Whether rules about IP see what bridges pass on, as on hosts of Kubernetes and some of docker.
    fn show_bridged_packets(&self, shown: bool) {
        let path = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        self.sh(&format!("if [ -e {path} ]; then echo {} > {path}; fi", u8::from(shown)));
    }
}

/// A port, undone on its host.
struct Machine<'a> {
    host: &'a Host,
    port: Option<Port>,
}

impl Machine<'_> {
    fn ip(&self) -> Ipv4Addr {
        let std::net::IpAddr::V4(ip) = self.port.as_ref().unwrap().address.ip else { panic!("not IPv4") };
        ip
    }

    fn guest(&self) -> Guest<'_> {
        let tap = &self.port.as_ref().unwrap().tap;
        Guest { tap: &tap.file, mac: tap.mac.bytes(), ip: self.ip() }
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let port = self.port.take();
        self.host.world.inside.run(|| drop(port)).unwrap();
    }
}

/// One guest finds another and is heard by it, under its own address.
fn says(one: &Machine<'_>, other: &Machine<'_>) {
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| other.guest().next_datagram());
        let mut guest = one.guest();
        let mac = guest.ask_for(other.ip());
        assert_eq!(mac, other.guest().mac);
        guest.send(mac, 4000, (other.ip(), 5000), b"hello");
        let expected = Datagram { from: (one.ip(), 4000), to: 5000, text: b"hello".to_vec() };
        assert_eq!(heard.join().unwrap(), expected);
    });
}

#[test]
fn guests_of_all_bridges_reach_each_other_the_gateway_and_the_outside() {
    for shown in [false, true] {
        let host = Host::new(Kind::Nat, 2);
        host.show_bridged_packets(shown);
        // The fifth further bridge is below one that is below the first.
        let machines = host.ports(12);
        assert_eq!(host.sh("ip -o link show type bridge").lines().count(), 6);
        let far = host.socket(OUTSIDE, 7000);
        for (number, machine) in machines.iter().enumerate() {
            assert_eq!(machine.ip(), Ipv4Addr::from(GATEWAY.to_bits() + 1 + u32::try_from(number).unwrap()));
            says(machine, &machines[(number + 2) % 12]);
            let mut guest = machine.guest();
            assert_eq!(guest.ask_for(GATEWAY), mac_of("mvm0").bytes());
            guest.send(mac_of("mvm0").bytes(), 40000, (OUTSIDE, 7000), b"out");
            let (_, from) = far.recv_from(&mut [0; 9]).unwrap();
            assert_eq!(from.ip(), HOST);
            far.send_to(b"back", from).unwrap();
            assert_eq!(guest.next_datagram().text, b"back");
        }
        says(&machines[0], &machines[11]);
        says(&machines[11], &machines[2]);
    }
}

#[test]
fn a_port_of_a_guest_on_a_further_bridge_is_published_to_outside_host_and_guests() {
    for shown in [false, true] {
        let host = Host::new(Kind::Nat, 1);
        host.show_bridged_packets(shown);
        let others = host.ports(2);
        let published: [Publish; 1] = ["8053:53/udp".parse().unwrap()];
        let machine = host.try_port(|request| request.publish = &published).unwrap();
        let mut guest = machine.guest();
        let gateway = guest.ask_for(GATEWAY);
        for ip in [OUTSIDE, HOST] {
            let socket = host.socket(ip, 7000);
            socket.send_to(b"question", (HOST, 8053)).unwrap();
            let Datagram { from, to, .. } = guest.next_datagram();
            guest.send(gateway, to, from, b"answer");
            assert_eq!(socket.recv_from(&mut [0; 9]).unwrap().1, (HOST, 8053).into());
        }
        for other in &others {
            let mut asking = other.guest();
            asking.ask_for(GATEWAY);
            asking.send(gateway, 4000, (HOST, 8053), b"question");
            let Datagram { from, to, .. } = guest.next_datagram();
            assert_eq!((from.0, to), (GATEWAY, 53), "by way of the host");
            guest.send(gateway, to, from, b"answer");
            assert_eq!(asking.next_datagram().from, (HOST, 8053));
        }
    }
}

#[test]
fn a_further_bridge_answers_and_takes_nothing_for_the_host() {
    let host = Host::new(Kind::HostOnly, 1);
    let machines = host.ports(2);
    host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0");
    sh(&host.world.outside, "ip route add 10.213.144.0/20 via 10.1.0.2");
    let (near, far) = (host.socket(HOST, 7000), host.socket(OUTSIDE, 7000));
    let gateway = mac_of("mvmhost").bytes();
    let mut guest = machines[1].guest();
    for _ in 0..3 {
        assert_eq!(guest.ask_for(Ipv4Addr::new(10, 213, 144, 1)), gateway);
    }
    for switch in ["mvmhost", "mvmhost-1"].map(|name| mac_of(name).bytes()) {
        guest.send(switch, 1, (OUTSIDE, 7000), b"not this");
    }
    guest.send(mac_of("mvmhost-1").bytes(), 1, (HOST, 7000), b"not this");
    guest.send(gateway, 1, (HOST, 7000), b"this");
    let mut text = [0; 9];
    let (count, _) = near.recv_from(&mut text).unwrap();
    assert_eq!(&text[..count], b"this");
    far.set_nonblocking(true).unwrap();
    assert!(far.recv_from(&mut text).is_err());
}

#[test]
fn bridges_go_with_their_last_machine_and_nothing_of_others_does() {
    let host = Host::new(Kind::Nat, 1);
    host.sh("ip link add mvm0-9 type bridge; ip tuntap add mvm0-8d mode tap; ip link add mvm0-x type bridge");
    let before = host.traces();
    let mut machines = host.ports(6);
    let joint = |number: u32| ["", "d", "u"].map(|end| format!("mvm0-{number}{end}"));
    let expected = |numbers: &[u32]| {
        let mut all: Vec<_> = numbers.iter().flat_map(|number| joint(*number)).collect();
        all.extend(["mvm0", "mvm0-9", "mvm0-8d", "mvm0-x"].map(str::to_owned));
        all.sort();
        all
    };
    assert_eq!(host.bridges(), expected(&[1, 2, 3, 4, 5]));
    // The fifth is below the first further one, which stays for it.
    drop(machines.drain(0..4));
    assert_eq!(host.bridges(), expected(&[1, 4, 5]));
    says(&machines[0], &machines[1]);
    assert_eq!(host.port().ip(), Ipv4Addr::new(10, 213, 128, 2), "the lowest that is free");
    drop(machines.pop());
    assert_eq!(host.bridges(), expected(&[4]));
    drop(machines);
    assert_eq!(host.traces(), before);
}

#[test]
fn a_bridge_of_somebody_else_is_not_taken_for_a_further_one() {
    let host = Host::new(Kind::Nat, 1);
    host.sh("ip link add mvm0-1 type bridge");
    let _first = host.port();
    let failure = host.try_port(|_| ()).err().unwrap();
    assert_eq!(failure.to_string(), "there is a bridge mvm0-1 that is not mvm's");
    host.sh("ip link del mvm0-1; ip tuntap add mvm0-1 mode tap");
    let failure = host.try_port(|_| ()).err().unwrap();
    assert_eq!(failure.to_string(), "mvm0-1 is not a bridge");
}

#[test]
fn what_a_crash_left_is_mended_or_removed() {
    let host = Host::new(Kind::Nat, 1);
    let before = host.traces();
    let (first, second) = (host.port(), host.port());
    host.sh("ip link del mvm0-1u; ip link set mvm0-1 down arp on");
    drop(second);
    let second = host.port();
    says(&first, &second);
    // Killed: their locks go, and nothing is given back.
    for machine in [first, second] {
        let mut machine = machine;
        host.world.inside.run(|| machine.port.take().unwrap().die()).unwrap();
    }
    assert!(host.traces().contains("mvm0-1"));
    host.world.inside.run(|| sweep_leases(&host.dir())).unwrap().unwrap();
    assert_eq!(host.traces(), before);
}

#[test]
fn an_end_of_addresses_is_an_error_that_leaves_nothing_more() {
    let host = Host::new(Kind::Nat, 2);
    let small: Subnet = "10.77.0.0/29".parse().unwrap();
    let machine = |_| host.try_port(|request| request.subnet = Some(small)).unwrap();
    let machines: Vec<_> = (0..5).map(machine).collect();
    let before = host.traces();
    let failure = host.try_port(|_| ()).err().unwrap();
    assert_eq!(failure.to_string(), "every address of 10.77.0.0/29 is taken");
    assert_eq!(host.traces(), before);
    drop(machines);
}

#[test]
fn the_joint_carries_what_the_widest_machine_below_it_sends() {
    let host = Host::new(Kind::Nat, 2);
    let mtu = |name: &str| {
        let text = host.sh(&format!("ip -o link show {name}"));
        let mut words = text.split_whitespace().skip_while(|word| *word != "mtu");
        words.nth(1).unwrap().parse::<u32>().unwrap()
    };
    let _machines = host.ports(3);
    assert_eq!(["mvm0-1u", "mvm0-1d", "mvm0"].map(mtu), [1400; 3]);
    let _wide = host.try_port(|request| request.mtu = Some(9000)).unwrap();
    assert_eq!(["mvm0-1u", "mvm0-1d", "mvm0"].map(mtu), [9000, 9000, 1400]);
}

/// A thousand ports stand for machines: those of one bridge, and all it has beyond that are joints, but one.
#[test]
fn when_linux_has_no_port_left_on_a_bridge_the_next_machine_is_on_another() {
    let host = Host::new(Kind::Nat, 1);
    let first = host.port();
    let count = |bridge: &str| host.sh(&format!("ip -o link show master {bridge}")).lines().count();
    let plug = || plug("mvm0", mac_of("m"), 1400).map_err(|failure| failure.to_string());
    let taps = |count: u32| host.world.inside.run(|| (0..count).map(|_| plug()).collect::<Vec<_>>()).unwrap();
    let mut others = taps(MACHINES - 1);
    let below = host.ports(4);
    others.extend(taps(1));
    assert_eq!(count("mvm0"), usize::try_from(PORTS).unwrap());
    assert!(others.iter().all(Result::is_ok));
    assert_eq!(taps(1).remove(0).unwrap_err(), "bridge mvm0 has no port left: Linux gives it 1023");
    says(&first, &below[3]);
    drop(first);
    others.extend(taps(1));
    let next = host.port();
    assert_eq!((next.ip(), count("mvm0-5")), (Ipv4Addr::new(10, 213, 128, 7), 2));
    says(&below[3], &next);
    // All at once: one by one the kernel takes its time for each.
    host.sh(
        "ip -o link show master mvm0 | grep -o 'mvmtap[0-9]*' | sed 's/.*/link set & group 7/' | ip -batch -
             ip link del group 7",
    );
}
