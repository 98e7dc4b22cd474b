//! Device nodes and the rules of their use.

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

/// The nodes a container gets besides those it always has.
///
/// # Errors
/// A device of the host, which is not in the guest.
pub(super) fn nodes(given: &[LinuxDevice]) -> Result<Vec<DeviceNode>> {
    given.iter().map(node).collect()
}

fn node(device: &LinuxDevice) -> Result<DeviceNode> {
    let path = device.path().display();
    let refuse = |why: &str| Refused::new("linux.devices", format!("{path} {why}"));
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => DeviceKind::Char,
        LinuxDeviceType::P => DeviceKind::Fifo,
        LinuxDeviceType::B => {
            return Err(refuse(
                "is a disk of the host: mount it instead (a bind mount of the device, or ext4)",
            ));
        }
        LinuxDeviceType::A => return Err(refuse("has no type a node can have")),
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
            r#"{"path":"/dev/sda","type":"b","major":8,"minor":0}"#,
            r#"{"path":"/dev/sda","type":"c","major":195,"minor":0}"#,
            r#"{"path":"/dev/sda","type":"c","major":10,"minor":1}"#,
        ] {
            let refused = node_of(json).unwrap_err();
            assert_eq!(refused.field, "linux.devices");
            assert!(refused.reason.contains("/dev/sda"), "{refused}");
        }
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
