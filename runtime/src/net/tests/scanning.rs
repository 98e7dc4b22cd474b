//! What is read from a name space.

use mvm_protocol::{Address, Neighbour, Route};

use super::pod::{Pod, sh};
use crate::net::{Netns, Network, scan};

fn address(ip: &str, prefix: u8) -> Address {
    Address { ip: ip.parse().unwrap(), prefix }
}

fn route(to: Option<Address>, gateway: Option<&str>, metric: u32, on_link: bool) -> Route {
    let gateway = gateway.map(|ip| ip.parse().unwrap());
    Route { destination: to, gateway, interface: "eth0".to_owned(), metric, on_link }
}

#[test]
fn a_name_space_without_links_is_an_empty_network() {
    let network = scan(&Netns::fresh().unwrap()).unwrap();
    assert_eq!(network, Network::default());
    assert!(!network.is_usable());
}

#[test]
fn links_have_their_hardware_address_mtu_and_all_addresses_but_link_local_ones() {
    let pod = Pod::bare();
    pod.plug("eth0", "out");
    sh(
        &pod.inside,
        "ip link set eth0 address 02:00:00:00:00:aa
         ip addr add 10.1.2.3/24 dev eth0
         ip addr add fd00::3/64 dev eth0 nodad
         ip link add idle type veth peer name unused",
    );
    let network = scan(&pod.inside).unwrap();
    let [link] = network.links.as_slice() else { panic!("{:?}", network.links) };
    assert_eq!((link.name.as_str(), link.mtu), ("eth0", 1400));
    assert_eq!(link.mac.to_string(), "02:00:00:00:00:aa");
    assert_eq!(link.addresses, [address("10.1.2.3", 24), address("fd00::3", 64)]);
    assert!(network.is_usable());
    assert_eq!(network.routes, [], "the guest's kernel makes the routes of its addresses itself");
    let configure = network.configure();
    assert_eq!(configure.interfaces[0].mac, [2, 0, 0, 0, 0, 0xaa]);
    assert_eq!((configure.hostname, configure.resolv_conf), (None, None));
}

#[test]
fn a_gateway_off_the_subnet_comes_after_the_route_to_it() {
    let pod = Pod::bare();
    pod.plug("eth0", "out");
    // As Calico leaves a pod.
    sh(
        &pod.inside,
        "ip addr add 192.168.7.9/32 dev eth0
         ip route add 169.254.1.1 dev eth0 scope link
         ip route add default via 169.254.1.1 dev eth0
         ip route add 10.9.0.0/16 via 10.8.0.1 dev eth0 onlink metric 7
         ip neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent
         ip neigh add 192.168.7.1 lladdr ee:ee:ee:ee:ee:01 dev eth0 nud reachable",
    );
    let network = scan(&pod.inside).unwrap();
    let expected = [
        route(Some(address("169.254.1.1", 32)), None, 0, false),
        route(Some(address("10.9.0.0", 16)), Some("10.8.0.1"), 7, true),
        route(None, Some("169.254.1.1"), 0, false),
    ];
    assert_eq!(network.routes, expected);
    let neighbour =
        Neighbour { ip: "169.254.1.1".parse().unwrap(), mac: [0xee; 6], interface: "eth0".to_owned() };
    assert_eq!(network.neighbours, [neighbour]);
}

#[test]
fn ipv6_routes_and_neighbours_are_read_too() {
    let pod = Pod::bare();
    pod.plug("eth0", "out");
    sh(
        &pod.inside,
        "ip addr add fd00::3/64 dev eth0 nodad
         ip -6 route add default via fd00::1 dev eth0
         ip -6 neigh add fd00::1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
    );
    let network = scan(&pod.inside).unwrap();
    assert_eq!(network.routes, [route(None, Some("fd00::1"), 1024, false)]);
    assert_eq!(network.neighbours.len(), 1);
}

#[test]
fn an_address_with_a_peer_is_alone_and_the_peer_has_a_route() {
    let pod = Pod::bare();
    pod.plug("eth0", "out");
    sh(&pod.inside, "ip addr add 10.5.0.2 peer 10.6.0.1/24 dev eth0");
    let network = scan(&pod.inside).unwrap();
    assert_eq!(network.links[0].addresses, [address("10.5.0.2", 32)]);
    assert_eq!(network.routes, [route(Some(address("10.6.0.0", 24)), None, 0, false)]);
}

#[test]
fn what_was_read_can_be_added_in_its_order() {
    let pod = Pod::connected();
    sh(
        &pod.inside,
        "ip route add 10.7.0.0/16 via 10.1.0.1; ip route add 10.2.0.1 dev eth0; ip route add 10.3.0.0/16 via 10.2.0.1",
    );
    let network = scan(&pod.inside).unwrap();
    sh(&pod.inside, "ip route flush dev eth0 proto boot");
    for route in &network.routes {
        let to = route.destination.map_or("default".to_owned(), |it| format!("{}/{}", it.ip, it.prefix));
        let via = route.gateway.map_or(String::new(), |it| format!("via {it}"));
        sh(&pod.inside, &format!("ip route add {to} {via} dev eth0"));
    }
    assert_eq!(scan(&pod.inside).unwrap().routes.len(), 4);
}
