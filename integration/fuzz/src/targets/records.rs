//! What is on record: about containers, snapshots and templates, and what is said about them.

use mvm_devices::testing::hostile::Reach;
use mvm_runtime::fuzzing::{owner, snapshot, state, template};
use mvm_runtime::state::{Condition, Record};
use serde_json::json;

use super::{BOTH, target, texts, told};
use crate::Target;

pub(super) const TARGETS: &[Target] = &[
    target("record", record, record_seeds, BOTH),
    target("ledger", ledger, ledger_seeds, &["entries", "nothing"]),
    target("snapshot_manifest", snapshot_manifest, snapshot_seeds, BOTH),
    target("snapshot_packed", packed, packed_seeds, BOTH),
    target("template_manifest", template_manifest, template_seeds, BOTH),
    target("owner", owners, owner_seeds, &["requests", "replies", "nothing"]),
];

fn record(bytes: &[u8], reach: &mut Reach) {
    told(reach, state::record(bytes));
}

fn record_seeds() -> Vec<Vec<u8>> {
    let conditions = [Condition::default(), Condition::Exited { code: 3, at: 9 }];
    let records = conditions.map(|condition| Record { id: "a".to_owned(), condition, ..Record::default() });
    let mut all = records.map(|record| serde_json::to_vec(&record).expect("it can be written")).to_vec();
    all.extend(texts(&["{}", "[]", r#"{"id":"../x"}"#]));
    all
}

fn ledger(bytes: &[u8], reach: &mut Reach) {
    let entries = state::ledger(bytes).expect("a directory");
    reach.add("entries", entries as u64);
    reach.add("nothing", (entries == 0).into());
}

fn ledger_seeds() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"kind":"file","path":"/x"}"#,
        r#"{"kind":"directory","path":"/x/y"}"#,
        r#"{"kind":"cgroup","path":"/sys/fs/cgroup/x"}"#,
        r#"{"kind":"process","pid":1,"started":2}"#,
        r#"{"kind":"forward","netns":"/proc/1/ns/net"}"#,
        r#"{"kind":"port","leases":"/run/x"}"#,
    ];
    let mut all = texts(&lines);
    all.extend([lines.join("\n\n").into_bytes(), lines[0].as_bytes()[..9].to_vec(), vec![b'\n'; 50]]);
    all
}

fn snapshot_manifest(bytes: &[u8], reach: &mut Reach) {
    told(reach, snapshot::manifest(bytes));
}

fn template_manifest(bytes: &[u8], reach: &mut Reach) {
    told(reach, template::manifest(bytes));
    let _ = template::key(&String::from_utf8_lossy(bytes));
}

/// One as it could have been made.
fn snapshot_seeds() -> Vec<Vec<u8>> {
    let net = json!({ "choice": "none", "publish": [], "dns": [], "mtu": null });
    let job = json!({
        "id": "0123456789ab", "name": "web", "labels": {}, "image": "image", "rootfs": "/r.erofs",
        "spec": { "ociVersion": "1.0.2" }, "restart": "no", "remove": false, "cpus": 1, "memory_mib": 128,
        "net": net, "stdin": false, "stats": false,
    });
    let disk =
        |serial: &str, read_only: bool| json!({ "serial": serial, "read_only": read_only, "bytes": 4 });
    let machine = json!({
        "cpus": 1, "memory_mib": 128, "growth": null, "contents": "0".repeat(32), "plugged": false,
        "slots": [{ "read_only": true, "serial": "a-1" }, { "read_only": false }],
        "devices": [{ "type": "balloon" }, { "type": "rng" }], "cards": [],
        "disks": [disk("a-1", true), disk("a-2", false)], "root": "main", "protocol": mvm_protocol::VERSION,
        "agent_version": "0.1.0", "kernel_release": "6.12", "memory_bytes": 7, "base": null, "state_bytes": 5,
        "held_ms": 3,
    });
    let good = json!({
        "version": 1, "name": "before", "created": 1_700_000_000, "processor": "a processor",
        "container": { "id": "0123456789ab", "name": "web" }, "vmm_sha256": "ab".repeat(32),
        "run": { "job": job, "process": 7, "machine": machine },
    });
    let changed = |pointer: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).expect("it is there") = value;
        bad.to_string().into_bytes()
    };
    let mut all = vec![
        good.to_string().into_bytes(),
        changed("/run/machine/root", json!("../x")),
        changed("/run/machine/growth", json!({ "most_mib": u64::MAX, "usable_mib": 0 })),
        changed("/run/machine/devices", json!([{ "type": "block", "disk": 0 }])),
        changed("/run/machine/disks", vec![disk("x", false); 40].into()),
    ];
    all.extend(manifest_seeds());
    all
}

fn template_seeds() -> Vec<Vec<u8>> {
    let part = json!({ "path": "/x", "facts": "f", "sha256": "ab".repeat(32) });
    let versions = (1..8).map(|version| {
        json!({
            "version": version, "key": "0".repeat(64), "created": 1, "took_ms": 2, "cpus": 1, "memory_mib": 128,
            "cmdline": "quiet", "processor": "p", "kernel": part, "agent": part, "vmm": part,
            "kernel_release": "6.12", "agent_version": "0.1.0", "memory_bytes": 7, "state_bytes": 5,
        })
    });
    versions.map(|it| it.to_string().into_bytes()).chain(manifest_seeds()).collect()
}

fn manifest_seeds() -> Vec<Vec<u8>> {
    let versions = (0..12).map(|version| json!({ "version": version, "name": "x", "run": {} }).to_string());
    let mut all: Vec<_> = versions.map(String::into_bytes).collect();
    all.extend(texts(&["", "[]", r#"{"version":-1}"#, &"0".repeat(64)]));
    all
}

/// The first two bytes say how long the file is to be.
fn packed(bytes: &[u8], reach: &mut Reach) {
    let (length, stream) = bytes.split_first_chunk().unwrap_or((&[0; 2], &[]));
    told(reach, snapshot::packed(stream, u16::from_le_bytes(*length).into()).expect("files in memory"));
}

fn packed_seeds() -> Vec<Vec<u8>> {
    [0, 1, 4096, 20_000]
        .into_iter()
        .flat_map(|length: u16| {
            let honest = [&length.to_le_bytes()[..], &snapshot::sample(length)].concat();
            [honest[..honest.len() - 1].to_vec(), honest]
        })
        .collect()
}

fn owners(bytes: &[u8], reach: &mut Reach) {
    let (requests, replies) = owner::frames(bytes);
    reach.add("requests", requests.into());
    reach.add("replies", replies.into());
    reach.add("nothing", (!requests && !replies).into());
}

fn owner_seeds() -> Vec<Vec<u8>> {
    let small = (0..12u8).flat_map(|verb| [vec![1, 0, 0, 0, verb], vec![2, 0, 0, 0, verb, 1]]);
    small.chain([vec![0xff; 8], vec![]]).collect()
}
