//! Taps that stand for links.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::guest::{Datagram, Guest};
use super::pod::{Pod, sh};
use crate::net::{Net, Netns, SpareTap, TwinTrace, mac_of, scan, twin};
use crate::state::{Ledger, Resource};

const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);

/// A socket outside of the pod.
fn outside(pod: &Pod, ip: Ipv4Addr) -> UdpSocket {
    let socket = pod.outside.run(|| UdpSocket::bind((ip, 7000)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// A datagram goes in and an answer comes out, then the other way round.
fn talk(guest: &mut Guest<'_>, socket: &UdpSocket) {
    let them = socket.local_addr().unwrap();
    let std::net::IpAddr::V4(their_ip) = them.ip() else { panic!("not IPv4") };
    socket.send_to(b"ping", (guest.ip, 53)).unwrap();
    let expected = Datagram { from: (their_ip, 7000), to: 53, text: b"ping".to_vec() };
    assert_eq!(guest.next_datagram(), expected);
    let hardware = guest.ask_for(their_ip);
    guest.send(hardware, 53, (their_ip, 7000), b"pong");
    let mut bytes = [0; 100];
    let (count, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..count], from), (&b"pong"[..], (guest.ip, 53).into()));
}

#[test]
fn a_guest_on_the_tap_is_reached_at_the_links_address_and_reaches_out() {
    let pod = Pod::connected();
    let link = pod.link("eth0");
    let twin = twin(&pod.inside, &link, None).unwrap();
    assert_eq!(twin.mac(), link.mac);
    let Net::Open(nic) = twin.net() else { panic!("not open") };
    assert_eq!((nic.mac, nic.mtu), (link.mac, Some(1400)));
    assert!(sh(&pod.inside, &format!("ip link show {}", twin.tap())).contains("mtu 1400"));
    let mut guest = Guest { tap: twin.file(), mac: link.mac.bytes(), ip: INSIDE };
    talk(&mut guest, &outside(&pod, OUTSIDE));
}

#[test]
fn the_pods_own_kernel_does_not_talk_on_the_tap() {
    let pod = Pod::connected();
    let twin = twin(&pod.inside, &pod.link("eth0"), None).unwrap();
    assert_eq!(sh(&pod.inside, &format!("ip -o addr show dev {}", twin.tap())), "");
}

#[test]
fn each_of_several_links_has_its_twin() {
    let pod = Pod::connected();
    pod.plug("net1", "out1");
    sh(&pod.inside, "ip addr add 10.2.0.2/24 dev net1");
    sh(&pod.outside, "ip addr add 10.2.0.1/24 dev out1");
    let links = scan(&pod.inside).unwrap().links;
    let twins: Vec<_> = links.iter().map(|link| twin(&pod.inside, link, None).unwrap()).collect();
    assert_eq!(links.len(), 2);
    assert_ne!(twins[0].tap(), twins[1].tap());
    for (it, third) in twins.iter().zip([1, 2]) {
        let ip = Ipv4Addr::new(10, third, 0, 2);
        let mut guest = Guest { tap: it.file(), mac: it.mac().bytes(), ip };
        talk(&mut guest, &outside(&pod, Ipv4Addr::new(10, third, 0, 1)));
    }
    assert_eq!(scan(&pod.inside).unwrap().links, links, "taps of ours are no links of the pod");
}

#[test]
fn a_tap_made_before_the_network_gives_the_link_its_hardware_address() {
    let pod = Pod::bare();
    let spare = SpareTap::make(&pod.inside, mac_of("early")).unwrap();
    pod.plug("eth0", "out");
    sh(&pod.inside, "ip addr add 10.1.0.2/24 dev eth0");
    sh(&pod.outside, "ip addr add 10.1.0.1/24 dev out");
    let twin = spare.connect(&pod.link("eth0"), None).unwrap();
    assert_eq!(pod.link("eth0").mac, mac_of("early"));
    let mut guest = Guest { tap: twin.file(), mac: twin.mac().bytes(), ip: INSIDE };
    talk(&mut guest, &outside(&pod, OUTSIDE));
}

#[test]
fn removal_leaves_nothing_even_while_a_machine_has_the_tap_open() {
    let pod = Pod::connected();
    let before = sh(&pod.inside, "ip -o link; tc qdisc; ip addr; ip route");
    let twin = twin(&pod.inside, &pod.link("eth0"), None).unwrap();
    assert!(sh(&pod.inside, "tc qdisc").contains("ingress"));
    let machine = twin.file().try_clone().unwrap();
    twin.remove().unwrap();
    assert_eq!(sh(&pod.inside, "ip -o link; tc qdisc; ip addr; ip route"), before);
    drop(machine);
}

#[test]
fn dropping_removes_as_well_and_a_link_that_is_gone_is_no_error() {
    let pod = Pod::connected();
    drop(twin(&pod.inside, &pod.link("eth0"), None).unwrap());
    assert_eq!(sh(&pod.inside, "tc qdisc show ingress; ip -o link show type tun"), "");
    let twin = twin(&pod.inside, &pod.link("eth0"), None).unwrap();
    sh(&pod.inside, "ip link del eth0");
    twin.remove().unwrap();
    assert_eq!(sh(&pod.inside, "ip -o link show type tun"), "");
}

/// A twin of `eth0` whose machine crashes; what its ledger says of it. This process keeps its tap open.
fn crashed(pod: &Pod, ledger: &Ledger) -> TwinTrace {
    let netns = Netns::open(&path(pod)).unwrap();
    std::mem::forget(twin(&netns, &pod.link("eth0"), Some(ledger)).unwrap());
    let last = ledger.entries().unwrap().pop();
    let Some(Resource::Twin(trace)) = last else { panic!("{last:?}") };
    trace
}

fn path(pod: &Pod) -> PathBuf {
    format!("/proc/self/fd/{}", pod.inside.as_fd().as_raw_fd()).into()
}

#[test]
fn what_a_crashed_machine_left_is_removed_by_what_its_ledger_says() {
    let pod = Pod::connected();
    let before = sh(&pod.inside, "ip -o link; tc qdisc");
    let dir = tempfile::tempdir().unwrap();
    let trace = crashed(&pod, &Ledger::of(dir.path()).unwrap());
    assert_ne!(sh(&pod.inside, "ip -o link; tc qdisc"), before);
    for _ in 0..2 {
        trace.remove().unwrap();
        assert_eq!(sh(&pod.inside, "ip -o link; tc qdisc"), before);
    }
    TwinTrace { netns: "/nonexistent/netns".into(), ..trace }.remove().unwrap();
}

#[test]
fn what_a_crashed_machine_left_does_not_stand_in_the_way_of_the_next_which_outlives_its_removal() {
    let pod = Pod::connected();
    let link = pod.link("eth0");
    let dir = tempfile::tempdir().unwrap();
    let trace = crashed(&pod, &Ledger::of(dir.path()).unwrap());
    let second = twin(&pod.inside, &link, None).unwrap();
    let mut guest = Guest { tap: second.file(), mac: link.mac.bytes(), ip: INSIDE };
    for _ in 0..2 {
        talk(&mut guest, &outside(&pod, OUTSIDE));
        trace.remove().unwrap();
    }
    talk(&mut guest, &outside(&pod, OUTSIDE));
}

#[test]
fn redirections_of_another_link_of_the_same_name_are_left_alone() {
    let pod = Pod::connected();
    let dir = tempfile::tempdir().unwrap();
    let trace = crashed(&pod, &Ledger::of(dir.path()).unwrap());
    sh(&pod.inside, &format!("ip link del eth0; ip link del {}", trace.tap));
    pod.plug("eth0", "other");
    sh(&pod.inside, "tc qdisc add dev eth0 ingress");
    trace.remove().unwrap();
    assert!(sh(&pod.inside, "tc qdisc show dev eth0").contains("ingress"));
}

#[test]
fn a_link_that_is_not_there_is_an_error_that_names_it_and_leaves_no_tap() {
    let pod = Pod::connected();
    let link = pod.link("eth0");
    sh(&pod.inside, "ip link del eth0");
    let failure = twin(&pod.inside, &link, None).unwrap_err();
    assert!(failure.to_string().starts_with("cannot connect a tap to eth0 in "), "{failure}");
    assert_eq!(sh(&pod.inside, "ip -o link show type tun"), "");
}

#[test]
fn name_spaces_are_told_apart_and_the_hosts_is_known() {
    let own = Netns::current().unwrap();
    let fresh = Netns::fresh().unwrap();
    assert!(own.is_host().unwrap());
    assert!(!fresh.is_host().unwrap());
    assert!(!fresh.is(&own).unwrap());
    assert!(fresh.run(Netns::current).unwrap().unwrap().is(&fresh).unwrap());
    let failure = Netns::open(Path::new("/dev/null")).unwrap_err();
    assert_eq!(failure.to_string(), "/dev/null is not a network name space");
}
