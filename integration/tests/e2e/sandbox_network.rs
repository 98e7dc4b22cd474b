//! Networks of sandboxes: one that is there, one that comes late, and the pod's localhost.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use mvm_protocol::{ExitStatus, SignalTarget};
use mvm_runtime::net::Netns;
use serde_json::json;

use crate::Test;
use crate::sandbox::{Fixture, PIPES, bundle, shell, unwrap};

pub(crate) const TESTS: &[Test] = &[
    ("a_sandbox_takes_the_place_of_the_link_in_its_name_space", early),
    ("a_network_that_comes_after_the_container_reaches_it", late),
];

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
                .args(["ping", "-c", "1", "-W", "20", "10.9.0.2"])
                .stdout(Stdio::null())
                .status()
        };
        unwrap(self.0.run(ping)).expect("busybox-static").success()
    }
}

fn namespace(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// A process that keeps a network name space, as an engine makes one for a pod.
fn holder() -> Child {
    let mut child = Command::new("unshare")
        .args(["--net", "sh", "-c", "echo ready; exec sleep 3600"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("util-linux");
    let mut ready = [0; 6];
    child.stdout.as_mut().expect("piped").read_exact(&mut ready).expect("it is ready");
    child
}

fn early() {
    let mut holder = holder();
    let peer = Peer::link(holder.id());
    let (bundle, spec) = bundle("network-early", |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({"type": "network", "path": namespace(holder.id())}));
    });
    let fixture = Fixture::boot(&spec, true);
    let link = |pid| std::fs::read_link(namespace(pid)).expect("a process");
    assert_eq!(link(fixture.sandbox.pid()), link(holder.id()), "the machine lives where its network is");
    fixture.create("c1", &bundle, &spec);
    let init = unwrap(fixture.sandbox.start("c1", &shell(&spec, "read line"), PIPES));
    let script = "busybox ip addr show eth0; busybox ip route; busybox ping -c 1 -W 20 10.9.0.1";
    let (status, text) = fixture.run("c1", &shell(&spec, script));
    assert_eq!(status, ExitStatus::Code(0), "{text}");
    for part in ["10.9.0.2/24", "mtu 1400", "default via 10.9.0.1"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    assert!(peer.pings());

    let script = "echo hello | busybox nc -l -p 8080 -s 127.0.0.1";
    let server = unwrap(fixture.sandbox.start("c1", &shell(&spec, script), PIPES));
    let (_, text) =
        fixture.run("c1", &shell(&spec, "until busybox netstat -tln | grep 8080; do sleep 0.2; done"));
    assert!(text.contains("127.0.0.1:8080"), "{text}");
    let pod = unwrap(Netns::open(&namespace(holder.id())));
    let connected = unwrap(pod.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 8080))));
    let mut hello = String::new();
    let mut connected = connected.expect("the pod's localhost is the guest's");
    connected.write_all(b"x").expect("it is connected");
    connected.shutdown(std::net::Shutdown::Write).expect("it is connected");
    connected.read_to_string(&mut hello).expect("it is connected");
    assert_eq!(hello, "hello\n");
    assert_eq!(unwrap(fixture.sandbox.wait(server.id)), ExitStatus::Code(0));
    drop(init.stdin);
    unwrap(fixture.sandbox.wait(init.id));
    fixture.end();
    let taps = unwrap(pod.run(|| Command::new("ip").args(["-o", "link"]).output())).expect("iproute2");
    let taps = String::from_utf8_lossy(&taps.stdout).into_owned();
    assert!(!taps.contains("mvm"), "a tap is left: {taps}");
    holder.kill().expect("it is there");
    holder.wait().expect("it is there");
}

fn late() {
    let (bundle, spec) = bundle("network-late", |_| {});
    let fixture = Fixture::boot(&spec, false);
    fixture.create("c1", &bundle, &spec);
    let init = unwrap(fixture.sandbox.start("c1", &shell(&spec, "busybox ip link; read line"), PIPES));
    let peer = Peer::link(fixture.sandbox.pid());
    let script = "until busybox ip route | grep default; do sleep 0.2; done; busybox ping -c 1 -W 20 10.9.0.1; \
                  busybox ip link";
    let (_, text) = fixture.run("c1", &shell(&spec, script));
    assert!(text.contains("1 packets received") && text.contains("mtu 1400"), "{text}");
    assert!(peer.pings());
    unwrap(fixture.sandbox.signal(init.id, libc::SIGKILL, SignalTarget::Process));
    unwrap(fixture.sandbox.wait(init.id));
    fixture.end();
}
