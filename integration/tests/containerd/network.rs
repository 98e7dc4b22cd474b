//! Networks: none, one that is there first, one that comes late; names, TCP and UDP.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;

use mvm_integration::containerd::daemon::{BRIDGE, GATEWAY};
use serde_json::Value;

use crate::context::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    ("a_container_without_a_network_has_only_a_loopback", none),
    ("a_network_that_is_there_first_carries_tcp_udp_and_names", early),
    ("a_network_that_comes_late_carries_tcp", late),
];

/// Shows what the name server answers. A question waits for seconds only, so it is asked until there is an answer.
const RESOLVE: &str = "tries=0; until nslookup host.test. > /tmp/names 2>&1; grep -q 'Address[ 1]*: 10.88.0.1' /tmp/names; do \
     tries=$((tries + 1)); test $tries -lt 12 || break; done; cat /tmp/names";

/// Answers one TCP connection at `port` of every address: reads to the end, answers in capitals.
fn tcp_server(port: u16) -> thread::JoinHandle<String> {
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("a port");
    thread::spawn(move || {
        let (mut stream, peer) = listener.accept().expect("a connection");
        let mut line = [0; 64];
        let length = stream.read(&mut line).expect("a line");
        stream.write_all(&line[..length].to_ascii_uppercase()).expect("it takes it");
        peer.ip().to_string()
    })
}

/// Answers every question for a name with the gateway's address (RFC 1035), until it is dropped.
fn name_server() -> UdpSocket {
    let socket = UdpSocket::bind(("0.0.0.0", 53)).expect("a port");
    let answering = socket.try_clone().expect("a copy");
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, peer)) = answering.recv_from(&mut question) {
            let Some(answer) = answer(&question[..length]) else { return };
            let _ = answering.send_to(&answer, peer);
        }
    });
    socket
}

/// An answer that repeats the question and adds one A record if it is asked for; nothing when there is no question.
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    const A: [u8; 2] = [0, 1];
    let name = question.get(12..)?.iter().position(|&byte| byte == 0)? + 13;
    let asked = question.get(12..name + 4)?;
    let address = asked.get(asked.len() - 4..asked.len() - 2)? == A;
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(address), 0, 0, 0, 0]);
    answer.extend(asked);
    if address {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 88, 0, 1]);
    }
    Some(answer)
}

/// A network name space that CNI has put on the bridge.
pub(crate) struct Wired<'a> {
    context: &'a Context,
    name: String,
    /// Without the length of its prefix.
    pub(crate) address: String,
}

impl<'a> Wired<'a> {
    pub(crate) fn new(context: &'a Context) -> Self {
        let name = context.id();
        ip(&["netns", "add", &name]);
        let mut this = Self { context, name, address: String::new() };
        this.add();
        this
    }

    /// Takes its link away and makes another, with another address.
    pub(crate) fn renew(&mut self) {
        self.plugin("DEL");
        self.add();
    }

    fn add(&mut self) {
        let result: Value = serde_json::from_str(&self.plugin("ADD")).expect("JSON");
        let address = result["ips"][0]["address"].as_str().expect("an address");
        self.address = address.split('/').next().unwrap_or_default().to_owned();
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Calls the bridge plugin as an engine does (the CNI specification, version 0.4.0).
    fn plugin(&self, operation: &str) -> String {
        let dir = &self.context.daemon.dir;
        let text = fs::read_to_string(dir.join("net.d/10-mvm-test.conflist")).expect("the configuration");
        let list: Value = serde_json::from_str(&text).expect("JSON");
        let mut config = list["plugins"][0].clone();
        (config["cniVersion"], config["name"]) = (list["cniVersion"].clone(), list["name"].clone());
        let plugins = &self.context.daemon.installation.plugins;
        let mut command = Command::new(plugins.join("bridge"));
        command.env("CNI_COMMAND", operation).env("CNI_CONTAINERID", &self.name).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", self.path()).env("CNI_PATH", plugins);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the plugin");
        let mut stdin = child.stdin.take().expect("asked for");
        stdin.write_all(config.to_string().as_bytes()).expect("it takes it");
        drop(stdin);
        let output = child.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "bridge {operation}: {text}");
        text
    }
}

impl Drop for Wired<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.plugin("DEL");
        }
        ip(&["netns", "delete", &self.name]);
    }
}

fn ip(args: &[&str]) {
    assert!(Command::new("ip").args(args).status().expect("iproute2").success(), "ip {args:?}");
}

fn none(context: &Context) {
    // A machine has a card for the network that may still come; it has no address and leads nowhere.
    assert_eq!(context.sh(&[], "ip -4 -o addr | awk '$2 != \"lo\"'; ip route"), "");
}

fn early(context: &Context) {
    let wired = Wired::new(context);
    let resolver = context.daemon.dir.join("resolv.conf");
    fs::write(&resolver, format!("nameserver {GATEWAY}\n")).expect("a file");
    let names = name_server();
    let server = tcp_server(7000);
    let namespace = format!("network:{}", wired.path());
    let mount = format!("type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro", resolver.display());
    let script = format!(
        "ip -4 -o addr show eth0; ip route; ping -c 1 -W 60 {GATEWAY} >&2; {RESOLVE}; echo hello | nc {GATEWAY} 7000"
    );
    let text = context.sh(&["--with-ns", &namespace, "--mount", &mount], &script);
    assert!(text.contains(&wired.address), "{text}");
    assert!(text.contains(&format!("default via {GATEWAY}")), "{text}");
    assert!(text.contains("Address: 10.88.0.1") || text.contains("Address 1: 10.88.0.1"), "{text}");
    assert!(text.ends_with("HELLO\n"), "{text}");
    assert_eq!(server.join().expect("no panic"), wired.address);
    fs::remove_file(resolver).expect("it was written");
    // An empty question ends the server.
    names.send_to(b"", ("127.0.0.1", 53)).expect("it is sent");
}

fn late(context: &Context) {
    let server = tcp_server(7001);
    let script =
        format!("while ! ip route | grep -q default; do sleep 0.1; done; echo late | nc {GATEWAY} 7001");
    assert_eq!(context.sh(&["--cni"], &script), "LATE\n");
    assert!(server.join().expect("no panic").starts_with("10.88."));
    assert!(
        fs::metadata(format!("/sys/class/net/{BRIDGE}")).is_err(),
        "the bridge belongs to the suite's name space"
    );
}
