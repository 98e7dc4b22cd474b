//! Capabilities by name become bits by number.

use mvm_protocol::Capabilities;
use oci_spec::runtime::{Capabilities as Names, Capability, LinuxCapabilities};

/// The sets of a process. A specification without any gives none, as runc reads it.
pub(super) fn capabilities(given: Option<&LinuxCapabilities>) -> Capabilities {
    let Some(given) = given else { return Capabilities::default() };
    Capabilities {
        bounding: bits(given.bounding().as_ref()),
        effective: bits(given.effective().as_ref()),
        inheritable: bits(given.inheritable().as_ref()),
        permitted: bits(given.permitted().as_ref()),
        ambient: bits(given.ambient().as_ref()),
    }
}

fn bits(names: Option<&Names>) -> u64 {
    names.into_iter().flatten().fold(0, |bits, name| bits | 1 << number(*name))
}

/// Its number in Linux (`linux/capability.h`).
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_bits_linux_has_for_them() {
        let given: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_CHOWN","CAP_NET_RAW"],"ambient":["CAP_CHECKPOINT_RESTORE"]}"#,
        )
        .unwrap();
        let sets = capabilities(Some(&given));
        assert_eq!((sets.bounding, sets.ambient, sets.permitted), (1 << 13 | 1, 1 << 40, 0));
    }

    #[test]
    fn a_process_without_capabilities_has_none() {
        assert_eq!(capabilities(None), Capabilities::default());
    }
}
