//! Nothing of ours is left wherever a process is killed: a sample of `make crash-matrix`, and that what is left is seen.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mvm_integration::crash::{Picture, world};
use nix::fcntl::{Flock, FlockArg};

const MACHINE: &str = env!("CARGO_BIN_EXE_fake_machine");

/// Runs one test of this program inside; whether it is the one that is there already.
fn is_inside(test: &str) -> bool {
    if !world::inside() {
        let words = ["--exact", test, "--nocapture"].map(OsString::from);
        let status = world::enter(MACHINE.as_ref(), words).expect("root can have name spaces of its own");
        assert!(status.success(), "{status}");
    }
    world::inside()
}

fn sh(script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
}

/// Something is left, seen under this name, taken away, and seen no more.
fn planted<T>(kind: &str, before: &Picture, plant: impl FnOnce() -> T, clear: impl FnOnce(T)) {
    let thing = plant();
    let found = Picture::take().difference(before);
    let named = found.iter().any(|line| line.starts_with(&format!("+ {kind}")));
    assert!(named, "{kind} is not reported: {found:?}");
    clear(thing);
    assert_eq!(before.await_return(), [""; 0], "{kind} is gone");
}

/// What is left, as it is reported; how it is made, and taken away.
const MADE: &[(&str, &str, &str)] = &[
    ("mount", "mkdir /tmp/m; mount -t tmpfs x /tmp/m", "umount /tmp/m; rmdir /tmp/m"),
    ("link", "ip tuntap add tap9 mode tap", "ip link del tap9"),
    ("link", "ip link add v0 type veth peer name v1", "ip link del v0"),
    ("link", "ip link add br9 type bridge", "ip link del br9"),
    ("address", "ip addr add 10.9.9.9/32 dev lo", "ip addr del 10.9.9.9/32 dev lo"),
    ("route", "ip route add 10.9.8.0/24 dev lo", "ip route del 10.9.8.0/24 dev lo"),
    ("rule", "nft add table inet left", "nft delete table inet left"),
    ("name space", "ip netns add left", "ip netns del left; umount /run/netns; rmdir /run/netns"),
    ("file", "touch /run/left", "rm /run/left"),
    ("directory", "mkdir /tmp/left", "rmdir /tmp/left"),
    ("fifo", "mkfifo /run/left", "rm /run/left"),
    ("link file", "ln -s nowhere /run/left", "rm /run/left"),
    ("lease", "mkdir -p /run/mvm/net; echo x >/run/mvm/net/l", "rm -r /run/mvm"),
    ("shared memory", "ipcmk -M 4096 >/dev/null", "ipcrm --all=shm"),
    ("file", "touch /dev/shm/left", "rm /dev/shm/left"),
];

#[test]
fn whatever_is_made_and_left_is_reported_by_its_kind() {
    if !is_inside("whatever_is_made_and_left_is_reported_by_its_kind") {
        return;
    }
    let before = Picture::take();
    assert_eq!(before.await_return_within(Duration::ZERO), [""; 0], "nothing is something");
    for (kind, make, unmake) in MADE {
        planted(kind, &before, || sh(make), |()| sh(unmake));
    }
}

#[test]
fn whoever_is_left_is_reported_with_what_he_holds() {
    if !is_inside("whoever_is_left_is_reported_with_what_he_holds") {
        return;
    }
    let before = Picture::take();
    let sleeper = |stdin: Stdio| Command::new("sleep").arg("1000").stdin(stdin).spawn().unwrap();
    let kill = |mut child: Child| child.kill().and_then(|()| child.wait()).map(drop).unwrap();
    planted("process", &before, || sleeper(Stdio::null()), kill);
    planted("open file of", &before, || sleeper(File::open("/dev/zero").unwrap().into()), kill);
    let zombie = || Command::new("true").spawn().unwrap();
    planted("process", &before, zombie, |mut child| child.wait().map(drop).unwrap());
    let gone = || fs::remove_file("/run/left").unwrap();
    planted("socket ", &before, || UnixListener::bind("/run/left").unwrap(), |_listener| gone());
    let name = SocketAddr::from_abstract_name("left").unwrap();
    planted("abstract socket", &before, || UnixListener::bind_addr(&name).unwrap(), drop);
    let locked = || Flock::lock(File::create("/run/left").unwrap(), FlockArg::LockExclusive).unwrap();
    planted("lock", &before, locked, |_lock| gone());
}

#[test]
fn a_sample_of_the_crash_matrix_leaves_nothing() {
    for arguments in [&["--quick"][..], &["--quick", "--faults"]] {
        let status = Command::new(env!("CARGO_BIN_EXE_crash_matrix")).args(arguments).status().unwrap();
        assert!(status.success(), "{arguments:?}: {status}");
    }
}
