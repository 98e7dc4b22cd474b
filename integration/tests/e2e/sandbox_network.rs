//! A network of a sandbox that comes late. One that is there first, and the pod's localhost, are containerd's suites.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use mvm_protocol::SignalTarget;
use mvm_runtime::net::Netns;

use crate::Test;
use crate::sandbox::{Fixture, PIPES, bundle, shell, unwrap};

pub(crate) const TESTS: &[Test] = &[("a_network_that_comes_after_the_container_reaches_it", late)];

/// A name space of its own, with the far end of a link.
struct Peer(Netns);

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2");
    assert!(done.success(), "ip {arguments}");
}

impl Peer {
    /// Links a new name space to that of process `pid`, where the link is `eth0` with 10.9.0.2.
    fn link(pid: u32) -> Self {
        let (near, far) = (unwrap(Netns::fresh()), unwrap(Netns::open(&namespace(pid))));
        let made = near.run(|| {
            ip(&format!("link add v0 type veth peer name eth0 netns {pid}"));
            ip("addr add 10.9.0.1/24 dev v0");
            ip("link set v0 up");
        });
        unwrap(made);
        let placed = far.run(|| {
            ip("addr add 10.9.0.2/24 dev eth0");
            ip("link set eth0 mtu 1400 up");
            ip("route add default via 10.9.0.1");
        });
        unwrap(placed);
        Self(near)
    }

    /// Whether the far end answers.
    fn pings(&self) -> bool {
        let ping = || {
            Command::new("busybox")
                .args(["ping", "-c", "1", "-W", "60", "10.9.0.2"])
                .stdout(Stdio::null())
                .status()
        };
        unwrap(self.0.run(ping)).expect("busybox-static").success()
    }
}

fn namespace(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

fn late() {
    let (bundle, spec) = bundle("network-late", |_| {});
    let fixture = Fixture::boot(&spec, false);
    fixture.create("c1", &bundle, &spec);
    let init = unwrap(fixture.sandbox.start("c1", &shell(&spec, "busybox ip link; read line"), PIPES));
    let peer = Peer::link(fixture.sandbox.pid());
    let script = "until busybox ip route | grep default; do sleep 0.2; done; busybox ping -c 1 -W 60 10.9.0.1; \
                  busybox ip link";
    let (_, text) = fixture.run("c1", &shell(&spec, script));
    assert!(text.contains("1 packets received") && text.contains("mtu 1400"), "{text}");
    assert!(peer.pings());
    unwrap(fixture.sandbox.signal(init.id, libc::SIGKILL, SignalTarget::Process));
    unwrap(fixture.sandbox.wait(init.id));
    fixture.end();
}
