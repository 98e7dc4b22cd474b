//! Which name spaces a container has of its own, and which are its machine's.

use std::path::{Path, PathBuf};

use mvm_protocol::{Namespace, Namespaces};
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType};

use super::refused::{Refused, Result};

/// The name spaces of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spaces {
    /// Those the agent makes with the root.
    pub namespaces: Namespaces,
    /// Its processes see those of the whole machine; else its own, with its first process as PID 1.
    pub machines_processes: bool,
    /// The host's network name space it is to be connected to; `None` is one without any interface yet.
    pub network: Option<PathBuf>,
}

/// Translates the name spaces of a container.
///
/// A name space that is shared by its path with a process of the host, `/proc/PID/ns/KIND`, is the machine's: that is
/// how engines say that a container shares it with its pod. So is one that is not listed at all.
///
/// # Errors
/// The first name space that a machine cannot give.
pub(super) fn spaces(linux: Option<&Linux>) -> Result<Spaces> {
    let listed = linux.and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    for namespace in listed {
        check(namespace)?;
    }
    let find = |kind| listed.iter().find(|namespace| namespace.typ() == kind);
    let own = |kind| match find(kind) {
        Some(namespace) if namespace.path().is_none() => Namespace::Own,
        _ => Namespace::Guest,
    };
    let Some(network) = find(LinuxNamespaceType::Network) else {
        let reason = "without one of kind \"network\" the container would use the host's network, which a machine \
                      cannot: give it a network of its own (no --net-host, no hostNetwork)";
        return Err(Refused::new("linux.namespaces", reason));
    };
    Ok(Spaces {
        namespaces: Namespaces {
            ipc: own(LinuxNamespaceType::Ipc),
            uts: own(LinuxNamespaceType::Uts),
            // Not listed on hosts of cgroup v1, where a container sees its own cgroups all the same.
            cgroup: match find(LinuxNamespaceType::Cgroup).map(LinuxNamespace::path) {
                Some(Some(_)) => Namespace::Guest,
                _ => Namespace::Own,
            },
        },
        machines_processes: own(LinuxNamespaceType::Pid) == Namespace::Guest,
        network: network.path().clone(),
    })
}

fn check(namespace: &LinuxNamespace) -> Result<()> {
    let kind = namespace.typ();
    let refuse = |reason: String| Err(Refused::new("linux.namespaces", reason));
    match (kind, namespace.path()) {
        (LinuxNamespaceType::User, _) => refuse(
            "kind \"user\": owners are not mapped in a machine; its kernel is what keeps the container from the host"
                .to_owned(),
        ),
        (LinuxNamespaceType::Mount, Some(_)) => {
            refuse("kind \"mount\" with a path: mounts are not shared between host and machine".to_owned())
        }
        (LinuxNamespaceType::Network | LinuxNamespaceType::Mount, _) | (_, None) => Ok(()),
        (_, Some(path)) if is_process(path) => Ok(()),
        (_, Some(path)) => refuse(format!(
            "{} is not of a process of the container's own pod: a machine cannot join name spaces of the host",
            path.display()
        )),
    }
}

/// Whether a path is `/proc/PID/ns/KIND`.
fn is_process(path: &Path) -> bool {
    let text = path.to_str().unwrap_or_default();
    let parts: Vec<_> = text.split('/').collect();
    matches!(parts.as_slice(), ["", "proc", pid, "ns", _] if pid.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(list: &str) -> Result<Spaces> {
        let linux: Linux = serde_json::from_str(&format!(r#"{{"namespaces":[{list}]}}"#)).unwrap();
        spaces(Some(&linux))
    }

    #[test]
    fn a_container_alone_has_all_of_its_own() {
        let spaces =
            of(r#"{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}"#);
        let expected = Spaces {
            namespaces: Namespaces { ipc: Namespace::Own, uts: Namespace::Own, cgroup: Namespace::Own },
            machines_processes: false,
            network: None,
        };
        assert_eq!(spaces.unwrap(), expected);
    }

    #[test]
    fn a_container_of_a_pod_shares_what_it_names_by_the_pods_process() {
        let spaces = of(r#"{"type":"pid"},{"type":"ipc","path":"/proc/77/ns/ipc"},
            {"type":"uts","path":"/proc/77/ns/uts"},{"type":"mount"},{"type":"cgroup"},
            {"type":"network","path":"/proc/77/ns/net"}"#)
        .unwrap();
        assert_eq!(spaces.namespaces.ipc, Namespace::Guest);
        assert_eq!(spaces.namespaces.uts, Namespace::Guest);
        assert_eq!(spaces.namespaces.cgroup, Namespace::Own);
        assert!(!spaces.machines_processes);
        assert_eq!(spaces.network.as_deref(), Some(Path::new("/proc/77/ns/net")));
        let shared = of(r#"{"type":"pid","path":"/proc/77/ns/pid"},{"type":"network"}"#).unwrap();
        assert!(shared.machines_processes);
    }

    #[test]
    fn what_only_the_host_has_is_refused() {
        for list in [
            r#"{"type":"pid"}"#,
            r#"{"type":"network"},{"type":"user"}"#,
            r#"{"type":"network"},{"type":"mount","path":"/proc/1/ns/mnt"}"#,
            r#"{"type":"network"},{"type":"ipc","path":"/run/ipcns/other"}"#,
        ] {
            assert_eq!(of(list).unwrap_err().field, "linux.namespaces", "{list}");
        }
        assert_eq!(spaces(None).unwrap_err().field, "linux.namespaces");
    }
}
