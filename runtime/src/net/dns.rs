//! The guest's resolver.

use std::fs;
use std::net::IpAddr;

/// What the host resolves with; behind a local stub, what the stub resolves with.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// Text of the guest's `/etc/resolv.conf`: these name servers, or the host's that a guest can reach.
pub(super) fn resolv_conf(servers: &[IpAddr]) -> Option<String> {
    if !servers.is_empty() {
        return Some(servers.iter().map(|ip| format!("nameserver {ip}\n")).collect());
    }
    let found = FILES.iter().find_map(|path| reachable(&fs::read_to_string(path).ok()?));
    if found.is_none() {
        log::warn!("the host has no name server that the guest could reach; name one with --dns");
    }
    found
}

/// A host's configuration without name servers that are the host itself; `None` if none is left.
pub(super) fn reachable(text: &str) -> Option<String> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().and_then(|ip| ip.parse::<IpAddr>().ok()))
    };
    let of_use = |ip: Option<IpAddr>| ip.is_some_and(|ip| !ip.is_loopback() && !ip.is_unspecified());
    let is_comment = |line: &&str| line.starts_with(['#', ';']);
    let lines: Vec<&str> = text.lines().filter(|line| !is_comment(line)).collect();
    let kept = lines.iter().filter(|line| server(line).is_none_or(of_use));
    let any = lines.iter().any(|line| server(line).is_some_and(of_use));
    any.then(|| kept.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_were_named_are_all_there_is() {
        let servers = ["1.1.1.1".parse().unwrap(), "2606::1".parse().unwrap()];
        assert_eq!(resolv_conf(&servers).as_deref(), Some("nameserver 1.1.1.1\nnameserver 2606::1\n"));
    }

    #[test]
    fn the_hosts_own_stub_is_left_out_and_everything_else_kept() {
        let text = "# stub\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nsearch example.org\noptions edns0\n";
        let expected = "nameserver 10.0.0.1\nsearch example.org\noptions edns0\n";
        assert_eq!(reachable(text).as_deref(), Some(expected));
        assert_eq!(reachable("nameserver 127.0.0.53\nnameserver ::1\nsearch a\n"), None);
        assert_eq!(reachable("nameserver\nnameserver x\n"), None);
    }
}
