//! Device nodes and the rules of their use.

use std::path::PathBuf;

use mvm_protocol::{DeviceKind, DeviceNode, DeviceRule};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::refused::{Refused, Result};

/// Character devices that are the same in every Linux: major number, and minor numbers if not all.
const IN_EVERY_LINUX: [(u32, Option<&[u32]>); 4] = [
    // Memory: null, zero, full, random and others.
    (1, None),
    // Terminals: tty, console, ptmx.
    (5, Some(&[0, 1, 2])),
    // Miscellaneous: tun and fuse.
    (10, Some(&[200, 229])),
    // Ends of pseudo-terminals.
    (136, None),
];

/// What every container may do with devices, whatever its rules say, as with runc: make nodes, and use the nodes each
/// has.
const ALWAYS: [(DeviceKind, Option<u32>, Option<u32>, &str); 11] = [
    (DeviceKind::Char, None, None, "m"),
    (DeviceKind::Block, None, None, "m"),
    (DeviceKind::Char, Some(1), Some(3), "rwm"),
    (DeviceKind::Char, Some(1), Some(5), "rwm"),
    (DeviceKind::Char, Some(1), Some(7), "rwm"),
    (DeviceKind::Char, Some(1), Some(8), "rwm"),
    (DeviceKind::Char, Some(1), Some(9), "rwm"),
    (DeviceKind::Char, Some(5), Some(0), "rwm"),
    (DeviceKind::Char, Some(5), Some(2), "rwm"),
    (DeviceKind::Char, Some(136), None, "rwm"),
    (DeviceKind::Char, Some(10), Some(200), "rwm"),
];

/// A disk of the host that a container gets the node of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDisk {
    /// Its numbers on the host, major and minor.
    pub number: (u32, u32),
    /// The container may not write to it.
    pub read_only: bool,
    /// Where in the container.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl HostDisk {
    /// Where the host has it, if it knows such a disk.
    pub fn source(&self) -> Option<PathBuf> {
        let (major, minor) = self.number;
        let facts = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
        let name = facts.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
        Some(PathBuf::from("/dev").join(name))
    }
}

/// The nodes a container gets besides those it always has, and the disks it gets nodes of. A disk is read-only if
/// the last rule about it alone does not let it be written.
///
/// # Errors
/// A device of the host that is no disk, which is not in the guest.
pub(super) fn nodes(
    given: &[LinuxDevice],
    rules: &[LinuxDeviceCgroup],
) -> Result<(Vec<DeviceNode>, Vec<HostDisk>)> {
    let (disks, others): (Vec<_>, Vec<_>) =
        given.iter().partition(|device| device.typ() == LinuxDeviceType::B);
    let nodes = others.into_iter().map(node).collect::<Result<_>>()?;
    Ok((nodes, disks.into_iter().map(|device| disk(device, rules)).collect::<Result<_>>()?))
}

fn disk(device: &LinuxDevice, rules: &[LinuxDeviceCgroup]) -> Result<HostDisk> {
    let path = device.path().display();
    let refuse = |why: &str| Refused::new("linux.devices", format!("{path} {why}"));
    let number = |value: i64| u32::try_from(value).map_err(|_| refuse("has a number below zero"));
    let path = device.path().to_str().filter(|path| path.starts_with('/'));
    let about = |rule: &&LinuxDeviceCgroup| {
        rule.typ() == Some(LinuxDeviceType::B)
            && (rule.major(), rule.minor()) == (Some(device.major()), Some(device.minor()))
    };
    let writes = |rule: &LinuxDeviceCgroup| {
        rule.allow() && rule.access().as_ref().is_none_or(|access| access.is_empty() || access.contains('w'))
    };
    Ok(HostDisk {
        read_only: !rules.iter().rfind(about).is_none_or(writes),
        number: (number(device.major())?, number(device.minor())?),
        path: path.ok_or_else(|| refuse("is no absolute path"))?.to_owned(),
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

fn node(device: &LinuxDevice) -> Result<DeviceNode> {
    let path = device.path().display();
    let refuse = |why: &str| Refused::new("linux.devices", format!("{path} {why}"));
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => DeviceKind::Char,
        LinuxDeviceType::P => DeviceKind::Fifo,
        LinuxDeviceType::A | LinuxDeviceType::B => return Err(refuse("has no type a node can have")),
    };
    let number = |value: i64| u32::try_from(value).map_err(|_| refuse("has a number below zero"));
    let (major, minor) = match kind {
        DeviceKind::Fifo => (0, 0),
        _ => (number(device.major())?, number(device.minor())?),
    };
    let known = |(m, minors): &(u32, Option<&[u32]>)| {
        *m == major && minors.is_none_or(|minors| minors.contains(&minor))
    };
    if kind == DeviceKind::Char && !IN_EVERY_LINUX.iter().any(known) {
        return Err(refuse(
            "is a device of the host, which the machine has not; for privileged pods containerd leaves them out with privileged_without_host_devices = true",
        ));
    }
    let path = device.path().to_str().filter(|path| path.starts_with('/'));
    Ok(DeviceNode {
        path: path.ok_or_else(|| refuse("is no absolute path"))?.to_owned(),
        kind,
        major,
        minor,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// The rules about devices, with what every container may and with the nodes it asked for.
///
/// # Errors
/// A rule of a kind or number there is not.
pub(super) fn rules(given: &[LinuxDeviceCgroup], nodes: &[DeviceNode]) -> Result<Vec<DeviceRule>> {
    if given.is_empty() {
        return Ok(Vec::new());
    }
    let mut rules = given.iter().map(rule).collect::<Result<Vec<_>>>()?;
    let always = ALWAYS.into_iter().map(|(kind, major, minor, access)| DeviceRule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access: access.to_owned(),
    });
    rules.extend(always);
    rules.extend(nodes.iter().filter(|node| node.kind != DeviceKind::Fifo).map(|node| DeviceRule {
        allow: true,
        kind: Some(node.kind),
        major: Some(node.major),
        minor: Some(node.minor),
        access: "rwm".to_owned(),
    }));
    Ok(rules)
}

fn rule(given: &LinuxDeviceCgroup) -> Result<DeviceRule> {
    let refuse = |why: &str| Refused::new("linux.resources.devices", format!("{given} {why}"));
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value).map(Some).map_err(|_| refuse("has a number below zero")),
    };
    let access = given.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
    if !access.bytes().all(|byte| b"rwm".contains(&byte)) {
        return Err(refuse("has an access that is not of r, w and m"));
    }
    Ok(DeviceRule {
        allow: given.allow(),
        kind: match given.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(DeviceKind::Block),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DeviceKind::Char),
            Some(LinuxDeviceType::P) => return Err(refuse("is about pipes, which have no rules")),
        },
        major: number(given.major())?,
        minor: number(given.minor())?,
        access: access.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node_of(json: &str) -> Result<DeviceNode> {
        node(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn devices_every_linux_has_become_nodes() {
        let fuse =
            node_of(r#"{"path":"/dev/fuse","type":"c","major":10,"minor":229,"fileMode":432,"gid":5}"#);
        let expected = DeviceNode {
            path: "/dev/fuse".into(),
            kind: DeviceKind::Char,
            major: 10,
            minor: 229,
            mode: 0o660,
            uid: 0,
            gid: 5,
        };
        assert_eq!(fuse.unwrap(), expected);
        assert_eq!(node_of(r#"{"path":"/dev/p","type":"p"}"#).unwrap().kind, DeviceKind::Fifo);
    }

    #[test]
    fn devices_of_the_host_are_refused_with_their_path() {
        for json in [
            r#"{"path":"/dev/sda","type":"c","major":195,"minor":0}"#,
            r#"{"path":"/dev/sda","type":"c","major":10,"minor":1}"#,
        ] {
            let refused = node_of(json).unwrap_err();
            assert_eq!(refused.field, "linux.devices");
            assert!(refused.reason.contains("/dev/sda"), "{refused}");
        }
    }

    #[test]
    fn disks_are_found_by_the_numbers_they_have_on_the_host() {
        let device = |json| serde_json::from_str::<LinuxDevice>(json).unwrap();
        let given = [
            device(r#"{"path":"/dev/fuse","type":"c","major":10,"minor":229}"#),
            device(r#"{"path":"/dev/x","type":"b","major":7,"minor":3,"fileMode":432,"gid":6}"#),
        ];
        let (nodes, disks) = nodes(&given, &[]).unwrap();
        let (path, read_only) = ("/dev/x".to_owned(), false);
        let disk = HostDisk { number: (7, 3), read_only, path, mode: 0o660, uid: 0, gid: 6 };
        assert_eq!((nodes.len(), disks.as_slice()), (1, &[disk.clone()][..]));
        assert_eq!(HostDisk { number: (4000, 1), ..disk.clone() }.source(), None);
        // Whatever disks this host has.
        for entry in std::fs::read_dir("/sys/dev/block").into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap();
            let (major, minor) = name.split_once(':').unwrap();
            let number = (major.parse().unwrap(), minor.parse().unwrap());
            let path = HostDisk { number, ..disk.clone() }.source().unwrap();
            let link = std::fs::read_link(entry.path()).unwrap();
            assert_eq!(path.file_name(), link.file_name());
        }
        let odd = device(r#"{"path":"/dev/x","type":"b","major":-1,"minor":3}"#);
        assert!(super::nodes(&[odd], &[]).is_err());
    }

    #[test]
    fn a_disk_that_the_last_rule_lets_be_read_only_is_read_only() {
        let device = r#"{"path":"/dev/x","type":"b","major":7,"minor":3}"#;
        let device: LinuxDevice = serde_json::from_str(device).unwrap();
        let read_only = |rules: &str| {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(rules).unwrap();
            super::nodes(std::slice::from_ref(&device), &rules).unwrap().1[0].read_only
        };
        let deny = r#"{"allow":false,"access":"rwm"}"#;
        let write = r#"{"allow":true,"type":"b","major":7,"minor":3,"access":"rwm"}"#;
        let read = r#"{"allow":true,"type":"b","major":7,"minor":3,"access":"rm"}"#;
        assert!(!read_only(&format!("[{deny}]")));
        assert!(!read_only(&format!("[{deny},{read},{write}]")));
        assert!(read_only(&format!("[{deny},{write},{read}]")));
    }

    #[test]
    fn a_default_of_no_device_still_lets_every_container_use_those_it_has() {
        let deny: LinuxDeviceCgroup = serde_json::from_str(r#"{"allow":false,"access":"rwm"}"#).unwrap();
        let node = node_of(r#"{"path":"/dev/fuse","type":"c","major":10,"minor":229}"#).unwrap();
        let rules = rules(&[deny], &[node]).unwrap();
        let first = DeviceRule { allow: false, kind: None, major: None, minor: None, access: "rwm".into() };
        assert_eq!(rules.first(), Some(&first));
        let allows =
            |minor| rules.iter().any(|rule| rule.allow && rule.minor == Some(minor) && rule.access == "rwm");
        assert!(allows(3) && allows(229) && !allows(11));
    }

    #[test]
    fn without_rules_none_are_made_up() {
        assert_eq!(rules(&[], &[]).unwrap(), []);
    }

    #[test]
    fn a_rule_with_an_access_there_is_not_is_refused() {
        let odd: LinuxDeviceCgroup =
            serde_json::from_str(r#"{"allow":true,"type":"c","access":"rx"}"#).unwrap();
        assert_eq!(rules(&[odd], &[]).unwrap_err().field, "linux.resources.devices");
    }
}
