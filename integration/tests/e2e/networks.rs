//! Networks of `mvm run`: what a guest reaches and from where it is reached.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::thread;

use mvm_integration::vm::TestVm;
use mvm_runtime::agent::StdioSpec;
use mvm_runtime::net::{Netns, TcpProfile};

use crate::Test;
use crate::network::{assert_answers, pings};

pub(crate) const TESTS: &[Test] = &[
    ("a_guest_behind_nat_reaches_out_and_is_reached_at_its_published_port", nat),
    ("a_guest_takes_the_place_of_a_name_spaces_link", netns),
    ("a_guest_has_the_tcp_profile_that_was_asked_for", tcp_profile),
];

const QUIET: StdioSpec = StdioSpec::Pipes { stdin: false, stdout: false, stderr: false };

/// A name space whose `eth0`, with `ip`, is at the other end of this host's link `link`.
fn neighbour(link: &str, ip: &str) -> Netns {
    let there = Netns::fresh().expect("root");
    let path = format!("/proc/{}/fd/{}", std::process::id(), there.as_fd().as_raw_fd());
    shell(&format!("ip link add {link} type veth peer name eth0 netns {path} && ip link set {link} up"));
    let inside = format!("ip link set lo up && ip link set eth0 up && ip addr add {ip} dev eth0");
    there.run(|| shell(&inside)).expect("root");
    there
}

fn shell(script: &str) {
    let status = Command::new("/bin/sh").args(["-ec", script]).status().expect("a shell");
    assert!(status.success(), "{script}");
}

fn text(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("text");
    text
}

fn nat() {
    let outside = neighbour("mvmwan", "10.91.0.2/24");
    shell("ip addr add 10.91.0.1/24 dev mvmwan");
    let listener = outside.run(|| TcpListener::bind("10.91.0.2:7000").expect("an address")).expect("root");
    let mut vm = TestVm::new().net("nat").publish("8080:80").boot();
    let server = thread::spawn(move || {
        let (mut stream, from) = listener.accept().expect("a connection");
        stream.write_all(b"far away\n").expect("it listens");
        from.ip().to_string()
    });
    assert_eq!(vm.sh("nc 10.91.0.2 7000 </dev/null"), "far away\n");
    assert_eq!(server.join().expect("no panic"), "10.91.0.1");

    vm.start(&["nc", "-ll", "-p", "80", "-e", "/bin/echo", "from the guest"], QUIET);
    vm.sh("until nc 127.0.0.1 80 </dev/null; do usleep 10000; done");
    let from_outside =
        outside.run(|| TcpStream::connect("10.91.0.1:8080").expect("it is published")).expect("root");
    from_outside.shutdown(Shutdown::Write).expect("an end");
    assert_eq!(text(from_outside), "from the guest\n");
    drop(vm);
    let left = Command::new("ip").args(["link", "show", "mvm0"]).output().expect("iproute2");
    assert!(!left.status.success(), "the bridge is left behind");
}

fn netns() {
    let pod = neighbour("mvmpod", "10.92.0.2/24");
    shell("ip addr add 10.92.0.1/24 dev mvmpod");
    let path = format!("/proc/{}/fd/{}", std::process::id(), pod.as_fd().as_raw_fd());
    let mut vm = TestVm::new().net(&format!("netns:{path}")).boot();
    let report = vm.sh(&pings("10.92.0.1"));
    assert_eq!(report.matches("1 packets received").count(), 3, "{report}");
    assert_answers("10.92.0.2");
    let mac = vm.sh("cat /sys/class/net/eth0/address");
    let of_link = pod
        .run(|| {
            let output = Command::new("ip").args(["-o", "link", "show", "eth0"]).output().expect("iproute2");
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
        .expect("root");
    assert!(of_link.contains(mac.trim()), "{of_link}");
}

fn tcp_profile() {
    let mut vm = TestVm::new().tcp(TcpProfile::Wan).boot();
    for (name, value) in TcpProfile::Wan.sysctls() {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&vm.sh(&format!("cat {path}"))), words(&value), "{name}");
    }
}
