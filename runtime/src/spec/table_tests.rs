//! The tables of the documentation, fed to this module row by row.

use serde_json::{Map, Value, json};

use super::*;
use crate::spec::settings::{ALLOWED, Host, Settings};

const DOCUMENT: &str = include_str!("../../../docs/oci-spec.md");

/// One row: what becomes of a field that has the example's value.
struct Row {
    field: String,
    verdict: String,
    example: Value,
}

fn rows() -> Vec<Row> {
    let lines = DOCUMENT.lines().filter(|line| line.starts_with("| `"));
    lines
        .map(|line| {
            let cells: Vec<_> = line.split(" | ").map(str::trim).collect();
            let code = |cell: &str| cell.trim_matches(['|', ' ', '`']).to_owned();
            let example = code(cells[2]);
            let example = serde_json::from_str(&example).unwrap_or_else(|error| panic!("{line}: {error}"));
            Row { field: code(cells[0]), verdict: cells[1].to_owned(), example }
        })
        .collect()
}

/// A specification that says as little as it may.
fn least() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {
            "args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "terminal": true, "consoleSize": {"height": 24, "width": 80},
        },
        "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]},
    })
}

/// What must be there for fields below a path to mean anything.
fn template(path: &str) -> Value {
    match path {
        "mounts[]" => json!({"destination": "/x", "type": "bind", "source": "/s"}),
        "process.rlimits[]" => json!({"type": "RLIMIT_CORE", "soft": 1, "hard": 2}),
        "process.scheduler" => json!({"policy": "SCHED_OTHER"}),
        "process.ioPriority" => json!({"class": "IOPRIO_CLASS_BE", "priority": 4}),
        "linux.namespaces[]" => json!({"type": "ipc"}),
        "linux.devices[]" => json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}),
        "linux.resources.devices[]" => json!({"allow": false}),
        "linux.personality" => json!({"domain": "LINUX"}),
        "linux.seccomp" => json!({"defaultAction": "SCMP_ACT_ERRNO"}),
        "linux.seccomp.syscalls[]" => {
            json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2})
        }
        "linux.seccomp.syscalls[].args[]" => {
            json!({"index": 0, "value": 1, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"})
        }
        _ => Value::Object(Map::new()),
    }
}

/// Sets a field, making what is above it; of lists, in the element `fresh` adds, or in the last there is. Without
/// a value only what is above it is made.
fn set(spec: &mut Value, field: &str, value: Option<&Value>, fresh: bool) {
    let mut at = spec;
    let mut path = String::new();
    let parts: Vec<_> = field.split('.').collect();
    for (depth, part) in parts.iter().enumerate() {
        let last = depth + 1 == parts.len();
        path = if path.is_empty() { (*part).to_owned() } else { format!("{path}.{part}") };
        let name = part.trim_end_matches("[]");
        let object = at.as_object_mut().unwrap();
        if part.ends_with("[]") {
            let list = object.entry(name).or_insert_with(|| json!([])).as_array_mut().unwrap();
            match (last, value) {
                (true, None) => return,
                (true, Some(value)) => return list.push(value.clone()),
                (false, _) if fresh || list.is_empty() => list.push(template(&path)),
                (false, _) => {}
            }
            at = list.last_mut().unwrap();
        } else if last {
            if let Some(value) = value {
                object.insert(name.to_owned(), value.clone());
            }
            return;
        } else {
            at = object.entry(name).or_insert_with(|| template(&path));
        }
    }
}

/// Everything this module makes of a specification.
fn everything(spec: &Value) -> Result<impl PartialEq + std::fmt::Debug + use<>> {
    let spec: Spec = serde_json::from_value(spec.clone()).unwrap_or_else(|error| panic!("{error}: {spec}"));
    let translated = translate(&spec, Path::new("/bundle"), 4)?;
    let process = process(spec.process().as_ref().unwrap(), &translated.profile)?;
    let settings = Settings::of(spec.annotations().as_ref(), &ALLOWED)?;
    let host = Host { cpus: 1, memory_mib: 64 };
    let root = spec.root().as_ref().map(|root| root.path().clone());
    Ok((translated, process, size(&spec, &settings, host), root))
}

#[test]
fn every_row_of_the_table_is_true() {
    let rows = rows();
    assert!(rows.len() > 150, "{} rows", rows.len());
    for Row { field, verdict, example } in rows {
        let (mut without, mut with) = (least(), least());
        set(&mut without, &field, None, true);
        set(&mut with, &field, Some(&example), true);
        let said = format!("{field} = {example} is said to be {verdict}");
        let without = everything(&without).unwrap_or_else(|error| panic!("{said}; without it: {error}"));
        match (verdict.as_str(), everything(&with)) {
            ("honoured", Ok(with)) => assert_ne!(with, without, "{said}"),
            ("ignored", Ok(with)) => assert_eq!(with, without, "{said}"),
            ("refused", Err(refused)) => {
                let plain = field.replace("[]", "");
                let named = refused.field.starts_with(&plain) || plain.starts_with(&refused.field);
                assert!(named, "{said}; the error names {}", refused.field);
            }
            (_, result) => panic!("{said}, but: {:?}", result.err()),
        }
    }
}

/// All examples in one specification: what is not in it then is a field no row is about.
#[test]
fn no_field_is_missing_from_the_table() {
    let mut full = least();
    for Row { field, example, .. } in rows() {
        if field != "linux.namespaces" {
            set(&mut full, &field, Some(&example), false);
        }
    }
    // Elements of a list that were added whole stand for rows of their own.
    full["linux"]["namespaces"] = json!([{"type": "ipc", "path": "/proc/77/ns/ipc"}]);
    for kind in ["createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        full["hooks"][kind] = full["hooks"]["prestart"].clone();
    }
    let spec: Spec = serde_json::from_value(full).unwrap();
    let parts = [
        format!("{:#?}", spec.root()),
        format!("{:#?}", spec.process()),
        format!("{:#?}", spec.mounts()),
        format!("{:#?}", spec.hooks()),
        format!("{:#?}", spec.linux()),
    ];
    for part in parts {
        let unset: Vec<_> = part.lines().filter(|line| line.contains(": None")).collect();
        assert!(unset.is_empty(), "no row is about {unset:?} of {part}");
    }
    for given in [spec.hostname().is_some(), spec.domainname().is_some(), spec.annotations().is_some()] {
        assert!(given);
    }
}

/// What `ctr` and CRI hand out by default is honoured whole.
#[test]
fn a_default_specification_is_honoured() {
    let spec: Spec =
        serde_json::from_str(include_str!("../../../integration/tests/e2e/sandbox_default.json")).unwrap();
    let translated = translate(&spec, Path::new("/bundle"), 1).unwrap();
    assert_eq!(translated.mounts.len(), 7);
    let process = process(spec.process().as_ref().unwrap(), &translated.profile).unwrap();
    assert_eq!(process.confinement.capabilities.unwrap().bounding, 0xa804_25fb);
}

/// A container of a pod as Kubernetes asks for it through CRI.
#[test]
fn a_container_of_a_pod_is_honoured() {
    let bind = |source: &str, target: &str, mode: &str| json!({"destination": target, "type": "bind", "source": source, "options": ["rbind", "rprivate", mode]});
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 65532, "gid": 65532, "additionalGids": [65532, 2000]}, "args": ["/app"], "cwd": "/",
            "env": ["KUBERNETES_SERVICE_HOST=10.96.0.1"], "oomScoreAdj": 985, "noNewPrivileges": true,
            "apparmorProfile": "cri-containerd.apparmor.d",
            "capabilities": {"bounding": ["CAP_NET_BIND_SERVICE"], "effective": ["CAP_NET_BIND_SERVICE"],
                             "permitted": ["CAP_NET_BIND_SERVICE"]},
        },
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            bind("/var/lib/kubelet/pods/7/etc-hosts", "/etc/hosts", "rw"),
            bind("/var/lib/kubelet/pods/7/containers/app/1", "/dev/termination-log", "rw"),
            bind("/run/containerd/sandboxes/7/shm", "/dev/shm", "rw"),
            bind("/var/lib/kubelet/pods/7/volumes/kubernetes.io~projected/token",
                 "/var/run/secrets/kubernetes.io/serviceaccount", "ro"),
        ],
        "linux": {
            "cgroupsPath": "/kubepods/burstable/pod7/c",
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "network", "path": "/proc/7/ns/net"},
            ],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 134217728, "swap": 134217728},
                "cpu": {"shares": 102, "quota": 20000, "period": 100000},
                "hugepageLimits": [{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 0}],
                "unified": {"memory.oom.group": "1"},
            },
            "maskedPaths": ["/proc/asound", "/sys/devices/virtual/powercap"],
            "readonlyPaths": ["/proc/bus"],
        },
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "7"},
    });
    let spec: Spec = serde_json::from_value(spec).unwrap();
    let translated = translate(&spec, Path::new("/bundle"), 1).unwrap();
    let hosts = translated.mounts.iter().filter(|mount| matches!(mount, MountPart::Host(_))).count();
    assert_eq!((translated.mounts.len(), hosts), (6, 4));
    let limits = translated.surroundings.limits.files.iter().map(|(name, text)| format!("{name}={text}"));
    let expected = ["memory.max=134217728", "cpu.weight=4", "cpu.max=20000 100000", "memory.oom.group=1"];
    assert_eq!(limits.collect::<Vec<_>>(), expected);
    assert!(process(spec.process().as_ref().unwrap(), &translated.profile).is_ok());
}
