//! The guest's network, set in the agent's own network name space and read back with iproute2.

use std::io::Read;

use mvm_protocol::{Address, Configure, FailureKind, Interface, Neighbour, Route};

use super::guest::{Guest, shell};
use crate::agent::Error;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn address(ip: &str, prefix: u8) -> Address {
    Address { ip: ip.parse().unwrap(), prefix }
}

fn output(guest: &Guest, script: &str) -> String {
    let mut process = guest.client.start(shell(script)).unwrap();
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// A guest with one network card, which is called something else yet.
fn with_card() -> Guest {
    let guest = Guest::new();
    let made =
        "ip link add first address 02:00:00:00:00:07 type veth peer name other && ip link set other up";
    assert_eq!(output(&guest, &format!("{made} 2>&1")), "");
    guest
}

fn configuration() -> Configure {
    let route = |destination, gateway: Option<&str>, metric, on_link| Route {
        destination,
        gateway: gateway.map(|it| it.parse().unwrap()),
        interface: "eth0".to_owned(),
        metric,
        on_link,
    };
    Configure {
        interfaces: vec![Interface {
            mac: MAC,
            name: "eth0".to_owned(),
            mtu: 1400,
            addresses: vec![address("10.1.2.3", 24), address("fd00::3", 64)],
        }],
        routes: vec![
            route(Some(address("169.254.1.1", 32)), None, 0, false),
            route(None, Some("169.254.1.1"), 0, false),
            route(Some(address("10.9.0.0", 16)), Some("10.8.0.1"), 7, true),
            route(None, Some("fd00::1"), 0, false),
        ],
        neighbours: vec![Neighbour {
            ip: "169.254.1.1".parse().unwrap(),
            mac: [0xee; 6],
            interface: "eth0".to_owned(),
        }],
        ..Configure::default()
    }
}

#[test]
fn a_card_found_by_its_mac_gets_name_mtu_addresses_routes_and_neighbours() {
    let guest = with_card();
    guest.client.configure(configuration()).unwrap();
    let expected = "inet 10.1.2.3/24 brd 10.1.2.255 scope global eth0\n";
    assert_eq!(output(&guest, "ip -o -4 addr show eth0 | grep -o 'inet.*eth0'"), expected);
    let expected = "inet6 fd00::3/64 scope global nodad \n";
    assert_eq!(output(&guest, "ip -o -6 addr show eth0 scope global | grep -o 'inet6.*nodad '"), expected);
    assert_eq!(
        output(&guest, "ip link show eth0 | grep -o 'UP.*mtu 1400'").split(' ').next(),
        Some("UP,LOWER_UP>")
    );
    let routes = output(
        &guest,
        "ip route show proto static | sed 's/ *$//'; ip -6 route show default | cut -d' ' -f-5",
    );
    let expected = "default via 169.254.1.1 dev eth0\n\
                    10.9.0.0/16 via 10.8.0.1 dev eth0 metric 7 onlink\n\
                    169.254.1.1 dev eth0 scope link\n\
                    default via fd00::1 dev eth0\n";
    assert_eq!(routes, expected);
    let neighbour = output(&guest, "ip neigh show 169.254.1.1 | sed 's/ *$//'");
    assert_eq!(neighbour, "169.254.1.1 dev eth0 lladdr ee:ee:ee:ee:ee:ee PERMANENT\n");
    assert!(output(&guest, "ip link show lo").contains("LOOPBACK,UP"));
}

#[test]
fn a_configuration_sent_twice_is_the_same_configuration() {
    let guest = with_card();
    guest.client.configure(configuration()).unwrap();
    let once = output(&guest, "ip -o addr; ip route; ip -6 route show default; ip neigh");
    guest.client.configure(configuration()).unwrap();
    assert_eq!(output(&guest, "ip -o addr; ip route; ip -6 route show default; ip neigh"), once);
}

#[test]
fn a_card_that_is_not_there_is_named() {
    let guest = Guest::new();
    let error = guest.client.configure(configuration()).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::NotFound, .. }), "{error:?}");
    assert_eq!(error.to_string(), "no interface has the MAC address of eth0");
}
