//! Connections to a pod's localhost.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::pod::{Pod, sh};
use crate::net::{Netns, PortForward, forward_localhost, remove_forward};

/// A guest that answers each connection with the port and what it was sent; nothing listens below 100.
fn forwarded(netns: &Netns) -> PortForward {
    forward_localhost(netns, |port| {
        if port < 100 {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let (ours, mut theirs) = UnixStream::pair()?;
        std::thread::spawn(move || -> io::Result<()> {
            let mut text = Vec::new();
            theirs.read_to_end(&mut text)?;
            theirs.write_all(format!("{port} ").as_bytes())?;
            theirs.write_all(&text)
        });
        Ok(ours)
    })
    .unwrap()
}

fn connect(netns: &Netns, ip: impl Into<IpAddr>, port: u16) -> io::Result<TcpStream> {
    let ip = ip.into();
    let stream = netns.run(|| TcpStream::connect((ip, port))).unwrap()?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

fn ask(mut stream: TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
    let mut writer = stream.try_clone()?;
    std::thread::scope(|scope| {
        scope.spawn(move || writer.write_all(text).and_then(|()| writer.shutdown(Shutdown::Write)));
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map(|_| answer)
    })
}

#[test]
fn localhost_in_the_pod_is_the_guest_at_every_port_in_both_families() {
    let pod = Pod::connected();
    let _forward = forwarded(&pod.inside);
    let stream = connect(&pod.inside, Ipv4Addr::LOCALHOST, 8080).unwrap();
    assert_eq!(ask(stream, b"hello").unwrap(), b"8080 hello");
    let stream = connect(&pod.inside, Ipv4Addr::new(127, 1, 2, 3), 443).unwrap();
    assert_eq!(ask(stream, b"").unwrap(), b"443 ");
    let stream = connect(&pod.inside, Ipv6Addr::LOCALHOST, 9000).unwrap();
    assert_eq!(ask(stream, b"six").unwrap(), b"9000 six");
}

#[test]
fn a_megabyte_arrives_whole() {
    let pod = Pod::bare();
    let _forward = forwarded(&pod.inside);
    let text: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[at as usize % 3]).collect();
    let answer = ask(connect(&pod.inside, Ipv4Addr::LOCALHOST, 8080).unwrap(), &text).unwrap();
    assert!(answer[5..] == text, "{} bytes came back", answer.len());
}

#[test]
fn a_port_on_which_the_guest_does_not_listen_is_an_error_not_an_end() {
    let pod = Pod::bare();
    let _forward = forwarded(&pod.inside);
    let mut stream = connect(&pod.inside, Ipv4Addr::LOCALHOST, 80).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn what_does_not_go_to_localhost_is_left_alone() {
    let pod = Pod::connected();
    let _forward = forwarded(&pod.inside);
    let outside = pod.outside.run(|| TcpListener::bind("10.1.0.1:8080").unwrap()).unwrap();
    let stream = connect(&pod.inside, Ipv4Addr::new(10, 1, 0, 1), 8080).unwrap();
    assert_eq!(outside.accept().unwrap().1, stream.local_addr().unwrap());
    let refused = connect(&pod.outside, Ipv4Addr::new(10, 1, 0, 2), 8080).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn the_listeners_own_port_leads_nowhere() {
    let pod = Pod::bare();
    let _forward = forwarded(&pod.inside);
    let rules = sh(&pod.inside, "nft list table inet mvm");
    let port = rules.split("redirect to :").nth(1).unwrap().split_whitespace().next().unwrap();
    let mut stream = connect(&pod.inside, Ipv4Addr::LOCALHOST, port.parse().unwrap()).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn the_end_of_forwarding_ends_connections_and_removes_the_rules() {
    let pod = Pod::bare();
    let forward = forwarded(&pod.inside);
    let mut stream = connect(&pod.inside, Ipv4Addr::LOCALHOST, 8080).unwrap();
    stream.write_all(b"half a").unwrap();
    drop(forward);
    let ended = stream.read(&mut [0; 9]);
    assert!(matches!(ended, Ok(0 | 5)) || ended.is_err(), "{ended:?}");
    assert_eq!(sh(&pod.inside, "nft list ruleset"), "");
    // The listener goes with its thread, which nobody waits for.
    let refused = (0..1000).find_map(|_| match connect(&pod.inside, Ipv4Addr::LOCALHOST, 8080) {
        Ok(_) => None,
        Err(error) => Some(error.kind()),
    });
    assert_eq!(refused, Some(ErrorKind::ConnectionRefused));
}

#[test]
fn what_a_crashed_process_forwarded_is_removed_by_its_name_space_alone() {
    let pod = Pod::bare();
    std::mem::forget(forwarded(&pod.inside));
    sh(&pod.inside, "nft add table inet other");
    let path = format!("/proc/self/fd/{}", pod.inside.as_fd().as_raw_fd());
    for _ in 0..2 {
        remove_forward(Path::new(&path)).unwrap();
        assert_eq!(sh(&pod.inside, "nft list tables"), "table inet other\n");
    }
    remove_forward(Path::new("/nonexistent/netns")).unwrap();
}

#[test]
fn the_rules_are_those_that_are_meant() {
    let pod = Pod::bare();
    let forward = forwarded(&pod.inside);
    let rules = sh(&pod.inside, "nft list table inet mvm");
    let port = rules.split("redirect to :").nth(1).unwrap().split_whitespace().next().unwrap();
    for rule in [
        format!("ip daddr 127.0.0.0/8 meta l4proto tcp tcp dport != {port} redirect to :{port}"),
        format!("ip6 daddr ::1 meta l4proto tcp tcp dport != {port} redirect to :{port}"),
        "type nat hook output priority dstnat".to_owned(),
    ] {
        let plain = rules.replace("meta l4proto tcp ", "").replace("priority -100", "priority dstnat");
        assert!(plain.contains(&rule.replace("meta l4proto tcp ", "")), "{rule}\nis not in\n{rules}");
    }
    drop(forward);
}
