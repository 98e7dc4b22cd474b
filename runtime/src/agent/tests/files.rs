//! Files and ports of containers, against the real agent. Needs the right to mount.

use std::{
    io::{Read, Write},
    net::TcpListener,
};

use mvm_protocol::{
    ContainerSource, ExitStatus, FailureKind, Get, GotContent, Place, Put, PutContent, PutEntry,
    Surroundings, limits::MAX_PART,
};
use nix::mount::MsFlags;

use super::{
    containers::{bound, file, output, root, shared, usual_mounts},
    guest::{Guest, SOON},
};
use crate::agent::Error;

#[test]
fn files_are_put_in_parts_and_come_back_whole() {
    let guest = Guest::new();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    let place = || Place::Root("c1".to_owned());
    let bytes: Vec<u8> = (0..600_000_u32).map(|at| (at / 3) as u8).collect();
    let parts = bytes.chunks(MAX_PART).enumerate();
    for (at, part) in parts {
        let offset = (at * MAX_PART) as u64;
        let last = offset as usize + part.len() == bytes.len();
        assert_eq!(output(&guest, "c1", "test -e /srv/big || echo no"), "no\n");
        let content = PutContent::File { offset, bytes: part.to_vec(), last };
        let entry = PutEntry { path: "srv/big".to_owned(), mode: 0o600, uid: 0, gid: 0, content };
        guest.client.put(Put { place: place(), entries: vec![entry] }).unwrap();
    }
    let mut seen = Vec::new();
    loop {
        let get = Get { place: place(), path: "srv/big".to_owned(), offset: seen.len() as u64 };
        let got = guest.client.get(get).unwrap();
        assert_eq!((got.size, got.mode), (600_000, libc::S_IFREG | 0o600));
        match got.content {
            GotContent::File(part) if part.is_empty() => break,
            GotContent::File(part) => seen.extend(part),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen == bytes);
    let list = guest.client.get(Get { place: place(), path: "srv".to_owned(), offset: 0 }).unwrap();
    assert_eq!(list.content, GotContent::Directory(vec!["big".to_owned()]));
    let remove = PutEntry { path: "srv".to_owned(), mode: 0, uid: 0, gid: 0, content: PutContent::Remove };
    guest.client.put(Put { place: place(), entries: vec![remove] }).unwrap();
    let error = guest.client.get(Get { place: place(), path: "srv".to_owned(), offset: 0 }).unwrap_err();
    assert!(matches!(error, Error::Refused { errno: libc::ENOENT, .. }), "{error}");
}

#[test]
fn an_update_of_a_shared_file_is_seen_in_the_container() {
    let guest = Guest::new();
    guest.client.put(shared("conf", vec![file("key", b"old\n")])).unwrap();
    let mut mounts = usual_mounts();
    mounts.push(bound(ContainerSource::Shared("conf".to_owned()), "/conf", MsFlags::MS_RDONLY));
    guest.client.set_up_root(root(&guest, "c1", Surroundings { mounts, ..Default::default() })).unwrap();
    assert_eq!(output(&guest, "c1", "cat /conf/key"), "old\n");
    guest.client.put(shared("conf", vec![file("key", b"new\n")])).unwrap();
    assert_eq!(output(&guest, "c1", "cat /conf/key; ls -A /conf"), "new\nkey\n");
    for bad in ["root", "../x", "", "d/0"] {
        assert!(guest.client.put(shared(bad, vec![file("key", b"")])).is_err(), "{bad}");
    }
}

#[test]
fn what_a_container_has_mounted_over_a_file_stays_whatever_is_written_below_it() {
    let guest = Guest::new();
    let hosts = |text: &str| mvm_protocol::Configure { hosts: Some(text.to_owned()), ..Default::default() };
    guest.client.configure(hosts("the machine's\n")).unwrap();
    guest.client.put(shared("hosts", vec![file("", b"the pod's\n")])).unwrap();
    let mut mounts = usual_mounts();
    mounts.push(bound(ContainerSource::Shared("hosts".to_owned()), "/etc/hosts", MsFlags::empty()));
    guest.client.set_up_root(root(&guest, "c1", Surroundings { mounts, ..Default::default() })).unwrap();
    assert_eq!(output(&guest, "c1", "cat /etc/hosts"), "the pod's\n");
    guest.client.configure(hosts("later\n")).unwrap();
    let put = |entry| guest.client.put(Put { place: Place::Root("c1".to_owned()), entries: vec![entry] });
    let error = put(file("etc/hosts", b"copied")).unwrap_err();
    assert!(matches!(error, Error::Refused { errno: libc::EBUSY, .. }), "{error}");
    let remove = PutEntry { content: PutContent::Remove, ..file("dev", b"") };
    assert!(put(remove).is_err());
    assert_eq!(output(&guest, "c1", "cat /etc/hosts; ls -d /dev/null"), "the pod's\n/dev/null\n");
}

#[test]
fn a_port_of_the_guest_is_reached_and_each_direction_ends_on_its_own() {
    let guest = Guest::new();
    // The agent's network is its own; the server runs there.
    let server = guest.sh("ip link set lo up 2>/dev/null; exec busybox nc -l -p 4000 -e busybox rev");
    let mut stream = (0..).find_map(|_| guest.client.forward(4000).ok()).expect("it listens at last");
    stream.write_all(b"olleh").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    assert_eq!(guest.client.wait(server.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
    // A port of this machine's is not the guest's.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = guest.client.forward(listener.local_addr().unwrap().port()).unwrap_err();
    assert!(matches!(error, Error::Refused { errno: libc::ECONNREFUSED, .. }), "{error}");
}

#[test]
fn a_trial_run_leaves_this_machines_devices_alone() {
    let guest = Guest::new();
    let error = guest.client.rescan().unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::NotFound, .. }), "{error}");
    let error = guest.client.eject("no such disk").unwrap_err();
    assert_eq!(error.to_string(), "no disk has the serial no such disk");
}
