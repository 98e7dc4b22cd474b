//! Networks that change while they are watched.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use super::pod::{Pod, sh};
use crate::net::{Network, Watch, scan, watch};

const SOON: Duration = Duration::from_secs(10);
/// Longer than it takes a network to settle.
const A_WHILE: Duration = Duration::from_millis(300);

fn watched(pod: &Pod, known: Network) -> (Watch, Receiver<Network>) {
    let (send, reports) = channel();
    let watch = watch(&pod.inside, known, move |network| drop(send.send(network))).unwrap();
    (watch, reports)
}

#[test]
fn a_network_that_comes_late_is_reported_once_with_all_of_it() {
    let pod = Pod::bare();
    let (_watch, reports) = watched(&pod, Network::default());
    pod.plug("eth0", "out");
    sh(&pod.inside, "ip addr add 10.1.0.2/24 dev eth0; ip route add default via 10.1.0.1");
    let network = loop {
        let network = reports.recv_timeout(SOON).unwrap();
        // On a slow host the link alone may have seemed to be all.
        if !network.routes.is_empty() {
            break network;
        }
    };
    assert!(network.is_usable());
    assert_eq!(network, scan(&pod.inside).unwrap());
    assert_eq!(reports.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout), "nothing changed since");
}

#[test]
fn what_changed_before_the_watch_began_is_reported_first() {
    let pod = Pod::connected();
    let (_watch, reports) = watched(&pod, Network::default());
    assert_eq!(reports.recv_timeout(SOON).unwrap(), scan(&pod.inside).unwrap());
}

#[test]
fn changes_that_leave_the_network_as_it_was_are_not_reported() {
    let pod = Pod::connected();
    let (_watch, reports) = watched(&pod, scan(&pod.inside).unwrap());
    sh(&pod.inside, "ip link add idle type veth peer name unused; ip link del idle");
    assert_eq!(reports.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout));
    sh(&pod.inside, "ip link set eth0 mtu 1300");
    assert_eq!(reports.recv_timeout(SOON).unwrap().links[0].mtu, 1300);
    sh(&pod.inside, "ip link del eth0");
    assert_eq!(reports.recv_timeout(SOON).unwrap(), Network::default());
}

#[test]
fn reports_end_with_the_watch() {
    let pod = Pod::connected();
    let (watch, reports) = watched(&pod, scan(&pod.inside).unwrap());
    drop(watch);
    assert_eq!(reports.recv_timeout(SOON), Err(RecvTimeoutError::Disconnected));
}
