//! The network card: a tap between guest and host.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;

use mvm_integration::vm::{TestVm, Vm, initrd};
use mvm_runtime::machine::{ConsoleKind, Kernel, Origin, Plan, prepare};
use mvm_runtime::net::Netns;
use mvm_vmm::exit::Exit;
use sha2::{Digest, Sha256};

use crate::{Test, programs};

/// Bytes of the stream; the emulated host is slow.
const STREAM: usize = 100 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("guest_and_host_ping_each_other_over_a_tap", ping),
    ("a_100_mb_stream_over_a_tap_arrives_unchanged_both_ways", stream),
    ("a_machine_lives_in_its_network_name_space_and_so_does_its_tap", name_space),
];

/// A tap with an address, and a guest on it with the next.
fn connected(name: &str, network: &str, memory_mib: u64) -> Vm {
    let ip = |arguments: &[&str]| {
        let done = Command::new("ip").args(arguments).status().expect("iproute2");
        assert!(done.success(), "ip {arguments:?}");
    };
    ip(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"]);
    ip(&["addr", "add", &format!("{network}.1/24"), "dev", name]);
    ip(&["link", "set", name, "up"]);
    let vm = TestVm::new().memory_mib(memory_mib);
    vm.net(&format!("tap={name},ip={network}.2/24,gateway={network}.1")).boot()
}

fn ping() {
    let mut vm = connected("mvmping", "10.77.1", 128);
    let report = vm.sh(&pings("10.77.1.1"));
    assert_eq!(report.matches("1 packets received").count(), 3, "{report}");
    assert_answers("10.77.1.2");
}

/// A shell's words for three pings that must be answered, each a minute to be: of several in a row busybox gives the
/// last one only twice as long as the slowest before it took.
pub(crate) fn pings(address: &str) -> String {
    format!("for i in 1 2 3; do ping -c 1 -W 60 {address} || exit 1; done")
}

/// Pings an address of this host's networks.
pub(crate) fn assert_answers(address: &str) {
    let script = format!("ping() {{ /bin/busybox ping \"$@\"; }}; {}", pings(address));
    let answered = Command::new("/bin/sh").args(["-c", &script]).output().expect("busybox");
    let report = String::from_utf8_lossy(&answered.stdout).into_owned();
    assert_eq!(report.matches("1 packets received").count(), 3, "{report}");
}

fn stream() {
    let mut vm = connected("mvmstream", "10.77.2", 384);
    let listener = TcpListener::bind("10.77.2.1:7000").expect("an address");
    let block: Vec<u8> = (0..1_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let sent: Vec<u8> = block.iter().copied().cycle().take(STREAM).collect();
    let hash = format!("{:x}", HexDigest(Sha256::digest(&sent).into()));
    let to_guest = thread::spawn(move || {
        let (mut guest, _) = listener.accept().expect("a connection");
        guest.write_all(&sent).expect("it takes all");
        guest.shutdown(std::net::Shutdown::Write).expect("an end");
        receive(guest)
    });
    let report = vm.sh("nc 10.77.2.1 7000 < /dev/null > /tmp/got; sha256sum < /tmp/got");
    assert_eq!(report.split_whitespace().next(), Some(hash.as_str()));
    assert!(to_guest.join().expect("no panic").is_empty());

    let listener = TcpListener::bind("10.77.2.1:7001").expect("an address");
    let from_guest =
        thread::spawn(move || Sha256::digest(receive(listener.accept().expect("a connection").0)));
    vm.sh("nc 10.77.2.1 7001 < /tmp/got");
    assert_eq!(format!("{:x}", HexDigest(from_guest.join().expect("no panic").into())), hash);
}

fn receive(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("it ends in order");
    bytes
}

/// A digest as `sha256sum` prints it.
struct HexDigest([u8; 32]);

impl std::fmt::LowerHex for HexDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn name_space() {
    let netns = Netns::fresh().unwrap_or_else(|failure| panic!("{}", failure.report()));
    let kernel = Kernel {
        image: programs().join("share/mvm/vmlinux"),
        initrd: Some(initrd("name-space", "cat /sys/class/net/eth0/address; read line; poweroff -f")),
        cmdline: "quiet panic=-1".to_owned(),
    };
    let plan = Plan {
        nets: vec!["tap=mvmns0,mac=02:00:00:00:00:55".parse().expect("a network")],
        netns: Some(netns.clone()),
        console: Some(ConsoleKind::Virtio),
        vsock: false,
        ..Plan::new("in-a-name-space".parse().expect("a name"), Origin::Kernel(kernel))
    };
    let prepared = prepare(&plan).unwrap_or_else(|failure| panic!("{}", failure.report()));
    let mut machine = prepared.start(None).unwrap_or_else(|failure| panic!("{}", failure.report()));
    let theirs = format!("/proc/{}/ns/net", machine.pid());
    let theirs = Netns::open(Path::new(&theirs)).unwrap_or_else(|failure| panic!("{}", failure.report()));
    assert!(theirs.is(&netns).expect("two name spaces"));
    assert!(!Path::new("/sys/class/net/mvmns0").exists(), "the tap is not here");
    let mut console = machine.console.take().expect("asked for");
    let mut line = String::new();
    BufReader::new(&mut console.from_guest).read_line(&mut line).expect("it speaks");
    assert_eq!(line.trim(), "02:00:00:00:00:55");
    console.to_guest.write_all(b"go\n").expect("it listens");
    assert_eq!(machine.wait().unwrap_or_else(|failure| panic!("{}", failure.report())), Exit::Shutdown);
}
