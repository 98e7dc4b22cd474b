//! Machines on bridges of a host, which is a name space here.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use mvm_protocol::Address;
use tempfile::TempDir;

use super::guest::{Datagram, Guest, Mac};
use super::pod::{Pod, sh};
use crate::failure::Failure;
use crate::net::{Choice, Connection, Net, NetRequest, OpenTap};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 213, 128, 1);

/// A host with a way out, and a directory for leases.
struct Host {
    world: Pod,
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        Self { world: Pod::connected(), dir: tempfile::tempdir().unwrap() }
    }

    fn connect(&self, request: &NetRequest) -> Result<Machine<'_>, Failure> {
        let dir = self.dir.path().join("net");
        let connection = self.world.inside.run(|| request.connect_in(&dir, "otter", None)).unwrap()?;
        Ok(Machine { host: self, connection: Some(connection) })
    }

    fn sh(&self, script: &str) -> String {
        sh(&self.world.inside, script)
    }

    /// What there is of links and rules, and of leases.
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
}

/// A connection, undone on its host.
struct Machine<'a> {
    host: &'a Host,
    connection: Option<Connection>,
}

impl Machine<'_> {
    fn connection(&self) -> &Connection {
        self.connection.as_ref().unwrap()
    }

    fn address(&self) -> Address {
        self.connection().place.interfaces[0].addresses[0]
    }

    fn tap(&self) -> OpenTap {
        let [Net::Open(tap)] = self.connection().nets.as_slice() else { panic!("not one card") };
        tap.clone()
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let connection = self.connection.take();
        self.host.world.inside.run(|| drop(connection)).unwrap();
    }
}

fn guest<'a>(machine: &Machine<'_>, tap: &'a OpenTap) -> Guest<'a> {
    let IpAddr::V4(ip) = machine.address().ip else { panic!("not IPv4") };
    Guest { tap: &tap.file, mac: tap.mac.bytes(), ip }
}

fn request(net: &str, publish: &[&str]) -> NetRequest {
    let publish = publish.iter().map(|port| port.parse().unwrap()).collect();
    NetRequest { choice: net.parse().unwrap(), publish, ..NetRequest::default() }
}

fn received(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut bytes = [0; 100];
    let (count, from) = socket.recv_from(&mut bytes).unwrap();
    (bytes[..count].to_vec(), from)
}

#[test]
fn a_guest_reaches_out_under_the_hosts_address_and_is_answered() {
    let host = Host::new();
    let machine = host.connect(&request("nat", &[])).unwrap();
    assert_eq!(machine.address(), Address { ip: Ipv4Addr::new(10, 213, 128, 2).into(), prefix: 20 });
    let place = &machine.connection().place;
    assert_eq!((place.routes[0].gateway, place.routes[0].destination), (Some(GATEWAY.into()), None));
    assert_eq!(place.interfaces[0].mtu, 1400, "the way out carries no more");
    let (tap, far) = (machine.tap(), host.socket(OUTSIDE, 7000));
    let mut guest = guest(&machine, &tap);
    let gateway = guest.ask_for(GATEWAY);
    guest.send(gateway, 40000, (OUTSIDE, 7000), b"out");
    let (text, from) = received(&far);
    assert_eq!((text.as_slice(), from.ip()), (&b"out"[..], HOST.into()));
    far.send_to(b"back", from).unwrap();
    assert_eq!(guest.next_datagram(), Datagram { from: (OUTSIDE, 7000), to: 40000, text: b"back".to_vec() });
}

/// Sends to a published port; the guest answers, and the answer comes from where it was sent to.
fn ask(guest: &mut Guest<'_>, gateway: Mac, socket: &UdpSocket, to: (Ipv4Addr, u16)) {
    socket.send_to(b"question", to).unwrap();
    let Datagram { from, to: port, text } = guest.next_datagram();
    assert_eq!((port, text.as_slice()), (53, &b"question"[..]));
    guest.send(gateway, 53, from, b"answer");
    assert_eq!(received(socket), (b"answer".to_vec(), to.into()));
}

#[test]
fn a_published_port_is_the_guests_from_outside_and_from_the_host_itself() {
    let host = Host::new();
    let machine = host.connect(&request("nat", &["8053:53/udp"])).unwrap();
    let tap = machine.tap();
    let mut guest = guest(&machine, &tap);
    let gateway = guest.ask_for(GATEWAY);
    ask(&mut guest, gateway, &host.socket(OUTSIDE, 7000), (HOST, 8053));
    ask(&mut guest, gateway, &host.socket(HOST, 7001), (HOST, 8053));
    ask(&mut guest, gateway, &host.socket(Ipv4Addr::LOCALHOST, 7002), (Ipv4Addr::LOCALHOST, 8053));
}

#[test]
fn a_port_published_on_one_address_is_not_on_others() {
    let host = Host::new();
    let machine = host.connect(&request("nat", &["127.0.0.1:8053:53/udp"])).unwrap();
    let tap = machine.tap();
    let mut guest = guest(&machine, &tap);
    let gateway = guest.ask_for(GATEWAY);
    host.socket(HOST, 7001).send_to(b"not this", (HOST, 8053)).unwrap();
    ask(&mut guest, gateway, &host.socket(Ipv4Addr::LOCALHOST, 7002), (Ipv4Addr::LOCALHOST, 8053));
}

#[test]
fn what_is_not_published_is_not_reached_from_outside() {
    let host = Host::new();
    let machine = host.connect(&request("nat", &["8053:53/udp"])).unwrap();
    sh(&host.world.outside, "ip route add 10.213.128.0/20 via 10.1.0.2");
    let tap = machine.tap();
    let mut guest = guest(&machine, &tap);
    let gateway = guest.ask_for(GATEWAY);
    let far = host.socket(OUTSIDE, 7000);
    far.send_to(b"not this", (guest.ip, 53)).unwrap();
    ask(&mut guest, gateway, &far, (HOST, 8053));
}

#[test]
fn a_guest_does_not_reach_the_hosts_loopback() {
    let host = Host::new();
    let machine = host.connect(&request("nat", &[])).unwrap();
    let tap = machine.tap();
    let mut guest = guest(&machine, &tap);
    let gateway = guest.ask_for(GATEWAY);
    let local = host.socket(Ipv4Addr::UNSPECIFIED, 7003);
    guest.send(gateway, 1, (Ipv4Addr::LOCALHOST, 7003), b"not this");
    guest.send(gateway, 1, (GATEWAY, 7003), b"this");
    assert_eq!(received(&local).0, b"this");
}

#[test]
fn host_only_reaches_the_host_and_nothing_behind_it() {
    let host = Host::new();
    let machine = host.connect(&request("host-only", &[])).unwrap();
    assert_eq!(machine.connection().place.routes, []);
    sh(&host.world.inside, "sysctl -qw net.ipv4.ip_forward=1");
    sh(&host.world.outside, "ip route add 10.213.144.0/20 via 10.1.0.2");
    let (tap, far) = (machine.tap(), host.socket(OUTSIDE, 7000));
    let mut guest = guest(&machine, &tap);
    let gateway = guest.ask_for(Ipv4Addr::new(10, 213, 144, 1));
    let near = host.socket(HOST, 7000);
    guest.send(gateway, 1, (OUTSIDE, 7000), b"not this");
    guest.send(gateway, 1, (HOST, 7000), b"this");
    assert_eq!(received(&near).0, b"this");
    far.set_nonblocking(true).unwrap();
    assert!(far.recv_from(&mut [0; 9]).is_err());
}

#[test]
fn the_last_machine_takes_bridge_rules_and_leases_with_it() {
    let host = Host::new();
    let before = host.traces();
    let first = host.connect(&request("nat", &["8080:80"])).unwrap();
    let second = host.connect(&request("nat", &["8081:80"])).unwrap();
    let third = host.connect(&request("host-only", &[])).unwrap();
    assert_ne!(first.address(), second.address());
    assert_eq!(host.sh("ip -o link show master mvm0").lines().count(), 2);
    drop(first);
    let rules = host.sh("nft list table inet mvm");
    assert!(rules.contains("tcp dport 8081") && !rules.contains("8080"), "{rules}");
    drop(second);
    assert!(host.traces().contains("mvmhost"));
    assert!(!host.traces().contains("mvm0"));
    drop(third);
    assert_eq!(host.traces(), before);
}

#[test]
fn the_rules_are_those_that_are_meant() {
    let host = Host::new();
    let _machine = host.connect(&request("nat", &["8080:80", "10.1.0.2:8053:53/udp"])).unwrap();
    let rules = host.sh("nft list table inet mvm");
    for rule in [
        r#"fib daddr type local meta l4proto tcp tcp dport 8080 dnat ip to 10.213.128.2:80"#,
        r#"ip daddr 10.1.0.2 meta l4proto udp udp dport 8053 dnat ip to 10.213.128.2:53"#,
        r#"ip saddr 10.213.128.0/20 oifname != "mvm0" masquerade"#,
        r#"ip saddr 127.0.0.0/8 oifname "mvm0" masquerade"#,
        r#"iifname "mvm0" ip daddr 127.0.0.0/8 ct state"#,
        r#"oifname "mvm0" iifname != "mvm0""#,
    ] {
        // Versions of nft leave out more or less of what another condition implies.
        let plain = |text: &str| text.replace("meta l4proto tcp ", "").replace("meta l4proto udp ", "");
        assert!(plain(&rules).contains(&plain(rule)), "{rule}\nis not in\n{rules}");
    }
}

#[test]
fn chains_of_others_that_drop_what_passes_are_found() {
    let host = Host::new();
    let find = || host.world.inside.run(|| crate::net::nft::dropping("mvm0").unwrap()).unwrap();
    assert_eq!(find(), Vec::<String>::new());
    host.sh("nft add table ip filter
         nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'
         nft add chain ip filter INPUT '{ type filter hook input priority 0; policy drop; }'
         nft add chain ip filter plain
         nft add table inet other
         nft add chain inet other passing '{ type filter hook forward priority 0; policy accept; }'");
    assert_eq!(find(), ["filter FORWARD"]);
    host.sh("nft add chain ip filter USER; nft add rule ip filter USER iifname mvm0 accept");
    assert_eq!(find(), Vec::<String>::new());
}

#[test]
fn what_a_crash_left_is_put_right_by_the_next_machine() {
    let host = Host::new();
    let leases = host.dir.path().join("net/mvm0");
    fs::create_dir_all(&leases).unwrap();
    fs::write(leases.join("10.213.128.2"), "half a lea").unwrap();
    host.sh("ip link add mvm0 type bridge; ip addr add 10.99.0.1/24 dev mvm0; nft add table inet mvm");
    let machine = host.connect(&request("nat", &[])).unwrap();
    assert_eq!(machine.address().ip, Ipv4Addr::new(10, 213, 128, 2));
    assert!(!host.sh("ip -o addr show mvm0").contains("10.99"));
}

#[test]
fn machines_that_come_at_once_get_different_addresses() {
    let host = Host::new();
    let host = &host;
    let machines: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..6).map(|_| scope.spawn(move || host.connect(&request("nat", &[])).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut addresses: Vec<_> = machines.iter().map(|machine| machine.address().ip).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 6);
}

#[test]
fn a_subnet_that_the_host_knows_is_not_taken() {
    let host = Host::new();
    host.sh("ip route add 10.213.0.0/16 via 10.1.0.1");
    let wanted = host.connect(&request("nat:10.213.7.0/24", &[])).err().unwrap();
    assert!(wanted.to_string().contains("already has a route to 10.213.0.0/16"), "{wanted}");
    let machine = host.connect(&request("nat", &[])).unwrap();
    assert_eq!(machine.address().ip, Ipv4Addr::new(172, 29, 208, 2));
    let other = host.connect(&request("nat:10.77.0.0/24", &[])).err().unwrap();
    assert_eq!(other.to_string(), "bridge mvm0 has 172.29.208.0/20, not 10.77.0.0/24");
}

#[test]
fn a_full_subnet_and_a_port_in_use_are_errors_that_leave_nothing() {
    let host = Host::new();
    let before = host.traces();
    let _held = host.world.inside.run(|| std::net::TcpListener::bind((HOST, 8080)).unwrap()).unwrap();
    let failure = host.connect(&request("nat", &["8080:80"])).err().unwrap();
    assert_eq!(failure.to_string(), "cannot publish port 0.0.0.0:8080/tcp");
    assert!(failure.remedy().unwrap().contains("choose another host port"));
    assert_eq!(host.traces(), before);
    let all: Vec<_> = (0..5).map(|_| host.connect(&request("nat:10.77.0.0/29", &[])).unwrap()).collect();
    let failure = host.connect(&request("nat", &[])).err().unwrap();
    assert_eq!(failure.to_string(), "every address of 10.77.0.0/29 is taken");
    drop(all);
    assert_eq!(host.traces(), before);
}

#[test]
fn a_bridge_that_is_there_gets_a_port_and_one_that_is_not_is_named() {
    let host = Host::new();
    let failure = host.connect(&request("bridge:br0", &[])).err().unwrap();
    assert_eq!(failure.to_string(), "there is no bridge br0");
    let failure = host.connect(&request("bridge:eth0", &[])).err().unwrap();
    assert_eq!(failure.to_string(), "eth0 is not a bridge");
    host.sh("ip link add br0 type bridge && ip addr add 10.50.0.1/24 dev br0 && ip link set br0 up");
    let machine = host.connect(&request("bridge:br0,ip=10.50.0.7/24,gateway=10.50.0.1", &[])).unwrap();
    let tap = machine.tap();
    let mut guest = guest(&machine, &tap);
    guest.ask_for(Ipv4Addr::new(10, 50, 0, 1));
    assert_eq!(machine.connection().place.interfaces[0].mac, tap.mac.bytes());
    drop((machine, tap));
    assert_eq!(host.sh("ip -o link show master br0"), "");
}

#[test]
fn a_name_space_is_taken_over_and_the_hosts_own_is_refused() {
    use std::os::fd::{AsFd, AsRawFd};
    let (host, pod) = (Host::new(), Pod::connected());
    let path = format!("/proc/{}/fd/{}", std::process::id(), pod.inside.as_fd().as_raw_fd());
    let asked = NetRequest {
        choice: Choice::Netns(path.into()),
        dns: vec!["9.9.9.9".parse().unwrap()],
        mtu: Some(1200),
        ..NetRequest::default()
    };
    let machine = host.connect(&asked).unwrap();
    let place = &machine.connection().place;
    assert_eq!(machine.address().ip, Ipv4Addr::new(10, 1, 0, 2));
    assert_eq!((place.interfaces[0].mtu, machine.tap().mtu), (1200, Some(1200)));
    assert_eq!(place.resolv_conf.as_deref(), Some("nameserver 9.9.9.9\n"));
    assert!(sh(&pod.inside, "tc qdisc show dev eth0").contains("ingress"));
    drop(machine);
    assert!(!sh(&pod.inside, "tc qdisc show dev eth0").contains("ingress"));
    let failure = host.connect(&request("netns:/proc/thread-self/ns/net", &[])).err().unwrap();
    assert!(failure.to_string().ends_with("is the host's own network"), "{failure}");
}

#[test]
fn ports_are_published_with_nat_alone() {
    for net in ["none", "host-only", "bridge:br0", "netns:/x", "tap=t0"] {
        let failure =
            request(net, &["80:80"]).connect_in(Path::new("/nonexistent"), "otter", None).unwrap_err();
        assert_eq!(failure.to_string(), format!("cannot publish port 0.0.0.0:80/tcp with --net {net}"));
    }
}

#[test]
fn no_network_and_taps_need_nothing_of_the_host() {
    let nowhere = Path::new("/nonexistent");
    let none = request("none", &[]).connect_in(nowhere, "otter", None).unwrap();
    assert!(none.nets.is_empty() && none.place == Default::default());
    let tap =
        request("tap=t0,ip=10.0.0.2/24,gateway=10.0.0.1", &[]).connect_in(nowhere, "otter", None).unwrap();
    let [Net::Tap(net)] = tap.nets.as_slice() else { panic!("not a tap") };
    assert_eq!(net.mac.unwrap().bytes(), tap.place.interfaces[0].mac);
}
