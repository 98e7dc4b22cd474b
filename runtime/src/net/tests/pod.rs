//! A pod's name space as a network plug-in leaves it, and the world outside of it.

use std::process::Command;

use crate::net::{Link, Netns, scan};

/// Two name spaces with a veth pair between them: `eth0` in the pod, `out` outside.
pub(super) struct Pod {
    pub(super) inside: Netns,
    pub(super) outside: Netns,
}

impl Pod {
    /// Name spaces without anything in them but loopback, which is up.
    pub(super) fn bare() -> Self {
        let pod = Self { inside: Netns::fresh().unwrap(), outside: Netns::fresh().unwrap() };
        sh(&pod.inside, "ip link set lo up");
        sh(&pod.outside, "ip link set lo up");
        pod
    }

    /// The pod is 10.1.0.2, the outside 10.1.0.1, its gateway.
    pub(super) fn connected() -> Self {
        let pod = Self::bare();
        pod.plug("eth0", "out");
        sh(&pod.inside, "ip addr add 10.1.0.2/24 dev eth0 && ip route add default via 10.1.0.1");
        sh(&pod.outside, "ip addr add 10.1.0.1/24 dev out");
        pod
    }

    /// Makes a veth pair that is up at both ends.
    pub(super) fn plug(&self, inside: &str, outside: &str) {
        use std::os::fd::{AsFd, AsRawFd};
        let there = format!("/proc/{}/fd/{}", std::process::id(), self.outside.as_fd().as_raw_fd());
        sh(
            &self.inside,
            &format!(
                "ip link add {inside} mtu 1400 type veth peer name {outside} mtu 1400 &&
                 ip link set {outside} netns {there} && ip link set {inside} up"
            ),
        );
        sh(&self.outside, &format!("ip link set {outside} up"));
    }

    /// The link of this name in the pod.
    pub(super) fn link(&self, name: &str) -> Link {
        let network = scan(&self.inside).unwrap();
        network.links.into_iter().find(|link| link.name == name).expect("the link is there")
    }
}

/// Runs a shell script in a name space; returns what it prints.
pub(super) fn sh(netns: &Netns, script: &str) -> String {
    let output = netns.run(|| Command::new("/bin/sh").args(["-ec", script]).output().unwrap()).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
