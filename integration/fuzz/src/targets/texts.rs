//! Texts that people write and that the kernel writes.

use std::str::FromStr;

use mvm_devices::testing::hostile::Reach;
use mvm_devices::virtio::net::MacAddress;
use mvm_runtime::fuzzing::{self, image, net, template};
use mvm_runtime::guest::cpio::Archive;
use mvm_runtime::net::{Choice, Net, Publish, Subnet, TcpProfile};
use mvm_runtime::state::Restart;
use mvm_vmm::config::{MachineId, MemSize};

use super::{BOTH, target, texts, told};
use crate::Target;

pub(super) const TARGETS: &[Target] = &[
    target("procfs", procfs, procfs_seeds, &["cgroup", "mountinfo", "stat", "meminfo", "smaps", "place"]),
    target("netlink", netlink, netlink_seeds, &["entries", "nothing"]),
    target("resolver", resolver, resolver_seeds, BOTH),
    target("reference", reference, reference_seeds, &["names", "digests", "refused"]),
    target("port", port, port_seeds, BOTH),
    target("mac", mac, mac_seeds, BOTH),
    target("network", network, network_seeds, BOTH),
    target("sizes", sizes, size_seeds, BOTH),
    target("cpio", cpio, cpio_seeds, &["entries"]),
];

/// Reads `bytes` as a `T`; what is one is one again when it is printed.
fn parsed<T: FromStr + ToString + PartialEq>(bytes: &[u8], reach: &mut Reach) {
    let Ok(text) = std::str::from_utf8(bytes) else { return reach.add("refused", 1) };
    let value = text.parse::<T>();
    if let Ok(value) = &value {
        let again = value.to_string();
        assert!(again.parse::<T>().is_ok_and(|again| again == *value), "{text:?} is printed as {again:?}");
    }
    told(reach, value.is_ok());
}

fn procfs(bytes: &[u8], reach: &mut Reach) {
    let text = &String::from_utf8_lossy(bytes);
    reach.add("cgroup", fuzzing::cgroups(text).into());
    reach.add("mountinfo", fuzzing::mountinfo(text).into());
    reach.add("stat", fuzzing::stat(text).into());
    reach.add("meminfo", fuzzing::meminfo(text).into());
    reach.add("smaps", fuzzing::smaps(text, 4096).into());
    reach.add("place", fuzzing::cgroup_place(text).into());
    let _ = template::cpuinfo(text);
}

fn procfs_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "12:memory:/a/b\n3:cpu,cpuacct:/\n0::/user.slice\n",
        "0::/\n",
        "35 28 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n30 1 0:2 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "7 (a) b) (c) S 1 1 1 0 -1 4194560 9 8 7 6 18446744073709551615 18446744073709551615 0 0\n",
        "MemFree: 12 kB\nMemAvailable: 99 kB\nKernelStack: 1 kB\nPercpu: 9223372036854775807 kB\n  count: 9223372036854775807\n",
        "1000-2000 rw-p 0 0:0 0\nPss: 18446744073709551615 kB\nAnonymous: 7 kB\n2000-3000 r--p\nPss: 9 kB\n",
        "system.slice:mvm:one",
        "-.slice:a:b",
        "/../../x",
        "a-b-c.slice::d.slice",
        "processor : 0\nvendor_id : AuthenticAMD\nflags : fpu vme\nbugs : x\n\nprocessor : 1\n",
    ])
}

fn netlink(bytes: &[u8], reach: &mut Reach) {
    let entries = net::netlink(bytes);
    reach.add("entries", entries as u64);
    reach.add("nothing", (entries == 0).into());
}

fn netlink_seeds() -> Vec<Vec<u8>> {
    let message = |payload: &[u8]| {
        let length = 16 + payload.len() as u32;
        [&length.to_ne_bytes()[..], &[16, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0], payload].concat()
    };
    let attribute = |kind: u16, value: &[u8]| {
        let mut bytes = [&(4 + value.len() as u16).to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let fixed = [2, 24, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let address = [&fixed[..8], &attribute(1, &[10, 0, 0, 1]), &attribute(2, &[10, 0, 0, 1])].concat();
    let link =
        [&fixed[..], &attribute(3, b"eth0\0"), &attribute(1, &[2; 6]), &attribute(4, &[5, 0, 0, 0])].concat();
    let route = [&fixed[..12], &attribute(4, &[1, 0, 0, 0]), &attribute(5, &[10, 0, 0, 2])].concat();
    let neighbour = [&fixed[..12], &attribute(1, &[10, 0, 0, 9]), &attribute(2, &[2; 6])].concat();
    let all = [address, link, route, neighbour].map(|payload| message(&payload));
    let mut seeds = all.to_vec();
    seeds.extend([all.concat(), message(&[0; 4]), vec![0; 20], vec![8, 0, 0, 0, 0, 0], vec![]]);
    seeds
}

fn resolver(bytes: &[u8], reach: &mut Reach) {
    told(reach, net::resolver(&String::from_utf8_lossy(bytes)));
}

fn resolver_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "nameserver 1.1.1.1\nsearch x\n",
        "nameserver 127.0.0.53\n",
        "; c\nnameserver ::1\nnameserver fe80::1%eth0\n",
        "",
    ])
}

fn reference(bytes: &[u8], reach: &mut Reach) {
    let (name, digest) = image::reference(&String::from_utf8_lossy(bytes));
    reach.add("names", name.into());
    reach.add("digests", digest.into());
    reach.add("refused", (!name && !digest).into());
}

fn reference_seeds() -> Vec<Vec<u8>> {
    let digest = image::digest(b"x");
    let named = format!("ghcr.io/a/b@{digest}");
    texts(&[
        "busybox",
        "a/b:c",
        "localhost:5000/x/y:z",
        &digest,
        &named,
        "../x",
        "A",
        "",
        "x:",
        "sha256:../../etc",
    ])
}

fn port(bytes: &[u8], reach: &mut Reach) {
    let Ok(text) = std::str::from_utf8(bytes) else { return reach.add("refused", 1) };
    let port = text.parse::<Publish>();
    if let Ok(port) = &port {
        // One of any address is told as of them all.
        let again = port.as_given().parse::<Publish>().map(|it| (it.host, it.guest, it.transport));
        assert_eq!(again, Ok((port.host, port.guest, port.transport)), "{text:?}");
    }
    told(reach, port.is_ok());
}

fn port_seeds() -> Vec<Vec<u8>> {
    texts(&["8080:80", "127.0.0.1:53:53/udp", "0:1", "65536:1", "1:2:3:4", "::1:1:1", "1:1/sctp", "+1:+1"])
}

fn mac(bytes: &[u8], reach: &mut Reach) {
    parsed::<MacAddress>(bytes, reach);
}

fn mac_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "52:54:00:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "01:00:5e:00:00:01",
        "0:0:0:0:0:0",
        "52-54-00-00-00-01",
        "+1:02:03:04:05:06",
    ])
}

fn network(bytes: &[u8], reach: &mut Reach) {
    let Ok(text) = std::str::from_utf8(bytes) else { return reach.add("refused", 1) };
    let _ = (text.parse::<Net>().is_ok(), text.parse::<TcpProfile>().is_ok());
    let choice = text.parse::<Choice>();
    if let Ok(choice) = &choice {
        assert!(!choice.to_string().is_empty());
    }
    told(reach, choice.is_ok());
    parsed::<Subnet>(bytes, reach);
}

fn network_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "none",
        "nat",
        "nat:10.213.0.0/20",
        "host-only:10.0.0.0/8",
        "bridge:br0,ip=10.0.0.2/24,gateway=10.0.0.1,mac=52:54:00:00:00:01",
        "netns:/run/netns/x",
        "tap=tap0,ip=fe80::1/64",
        "10.0.0.0/29",
        "10.0.0.1/24",
        "0.0.0.0/0",
        "255.255.255.248/29",
        "tap=..",
        "nat:x",
    ])
}

fn sizes(bytes: &[u8], reach: &mut Reach) {
    parsed::<MemSize>(bytes, reach);
    parsed::<MachineId>(bytes, reach);
    let _ = String::from_utf8_lossy(bytes).parse::<Restart>().is_ok();
}

fn size_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "128M",
        "2G",
        "0",
        "17592186044416M",
        "18446744073709551615G",
        "1.5G",
        "-1M",
        "machine-1.x",
        "../x",
        "on-failure:3",
        "always",
    ])
}

/// Names and contents, a byte each for their lengths; what is archived is there again.
fn cpio(bytes: &[u8], reach: &mut Reach) {
    let mut archive = Archive::new();
    let (mut rest, mut wanted) = (bytes, 0);
    while let Some(([name, content], after)) = rest.split_first_chunk() {
        let (name, after) = after.split_at(usize::from(*name).min(after.len()));
        let (content, after) = after.split_at(usize::from(*content).min(after.len()));
        let name = String::from_utf8_lossy(name).replace('\0', "0");
        archive.program(&format!("n{name}"), content).link(&format!("l{name}"), &name);
        (rest, wanted) = (after, wanted + 2);
    }
    let bytes = archive.finish();
    let (mut at, mut entries) = (0, 0);
    while let Some(header) = bytes.get(at..at + 110) {
        let field = |i: usize| {
            let text = std::str::from_utf8(&header[6 + 8 * i..14 + 8 * i]).expect("hex digits");
            usize::from_str_radix(text, 16).expect("hex digits")
        };
        assert_eq!(&header[..6], b"070701");
        at = (at + 110 + field(11)).next_multiple_of(4);
        at = (at + field(6)).next_multiple_of(4);
        entries += 1;
    }
    // The usual ones and the end besides.
    assert_eq!((entries, at), (wanted + 7, bytes.len()));
    reach.add("entries", wanted as u64);
}

fn cpio_seeds() -> Vec<Vec<u8>> {
    vec![vec![], [&[3, 4][..], b"abcdefg", &[1, 0, b'x']].concat(), vec![255; 600]]
}
