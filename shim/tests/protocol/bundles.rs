//! Specifications of containers.

use serde_json::{Value, json};

/// A container that runs a shell script.
pub(crate) fn shell(script: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": process(&["sh", "-c", script]),
        "root": {"path": "rootfs"},
    })
}

/// A container of a pod.
pub(crate) fn in_pod(mut config: Value, kind: &str, pod: &str) -> Value {
    config["annotations"] = json!({
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": pod,
    });
    config
}

/// A process in a container.
pub(crate) fn process(args: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/bin:/bin"],
        "cwd": "/",
    })
}
