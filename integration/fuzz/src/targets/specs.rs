//! Specifications of containers: what an engine says, part of it chosen by its users.

use std::collections::HashMap;
use std::path::Path;

use mvm_devices::testing::hostile::Reach;
use mvm_runtime::container::{Wishes, spec as made};
use mvm_runtime::image::ImageConfig;
use mvm_runtime::spec::{self, ALLOWED, Host, Settings};
use oci_spec::runtime::{LinuxResources, Process, Spec};

use super::{BOTH, target, texts, told};
use crate::Target;

pub(super) const TARGETS: &[Target] = &[
    Target { most_mib: 64, ..target("oci_spec", whole, whole_seeds, &["accepted", "refused", "sized"]) },
    Target { most_mib: 64, ..target("oci_process", process, process_seeds, BOTH) },
    target("oci_resources", resources, resources_seeds, BOTH),
    target("annotations", annotations, annotation_seeds, BOTH),
];

const HOST: Host = Host { cpus: 8, memory_mib: 16 * 1024 };

fn whole(bytes: &[u8], reach: &mut Reach) {
    let Ok(given) = serde_json::from_slice::<Spec>(bytes) else { return reach.add("refused", 1) };
    if let Ok(settings) = Settings::of(given.annotations().as_ref(), &ALLOWED) {
        let size = spec::size(&given, &settings, HOST);
        assert!(u32::from(size.cpus.get()) <= HOST.cpus, "{size:?}");
        reach.add("sized", 1);
    }
    let translated = spec::translate(&given, Path::new("/bundle"), 2);
    if let Err(refused) = &translated {
        assert!(!refused.to_string().is_empty());
    }
    told(reach, translated.is_ok());
}

fn whole_seeds() -> Vec<Vec<u8>> {
    let image = ImageConfig { cmd: vec!["sh".to_owned()], ..Default::default() };
    let usual = made(&image, &Wishes::default()).expect("a specification");
    let text = serde_json::to_string(&usual).expect("it can be written");
    let mut all = texts(&[
        text.as_str(),
        r#"{"ociVersion":"1.2.0","mounts":[{"destination":"/x","type":"bind","source":"../..","options":["rbind"]}]}"#,
        r#"{"ociVersion":"1.2.0","linux":{"resources":{"memory":{"limit":-1}},"cgroupsPath":"a:b:c"}}"#,
        r#"{"ociVersion":"1.2.0","annotations":{"io.kubernetes.cri.sandbox-memory":"9223372036854775807"}}"#,
        r#"{"ociVersion":"1.2.0","linux":{"devices":[{"path":"/dev/x","type":"b","major":8,"minor":0}]}}"#,
        r#"{"ociVersion":"1.2.0","linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#,
        r#"{"ociVersion":"1.2.0","hooks":{"prestart":[{"path":"/x"}]},"solaris":{}}"#,
        "{}",
        "",
    ]);
    let seccomp = r#""seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read","nosuch"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#;
    all.push(format!(r#"{{"ociVersion":"1.2.0","linux":{{{seccomp}}}}}"#).into_bytes());
    all
}

fn process(bytes: &[u8], reach: &mut Reach) {
    let Ok(given) = serde_json::from_slice::<Process>(bytes) else { return reach.add("refused", 1) };
    told(reach, spec::process(&given, &Default::default()).is_ok());
}

fn process_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0}}"#,
        r#"{"args":[],"cwd":"/","user":{"uid":0,"gid":0}}"#,
        r#"{"args":["a"],"cwd":"/","user":{"uid":0,"gid":0,"umask":4095},"terminal":true,"consoleSize":{"height":99999,"width":1}}"#,
        r#"{"args":["a"],"cwd":"x","user":{"uid":0,"gid":0},"rlimits":[{"type":"RLIMIT_NOFILE","hard":1,"soft":2}]}"#,
        r#"{"args":["a"],"cwd":"/","user":{"uid":0,"gid":0},"ioPriority":{"class":"IOPRIO_CLASS_RT","priority":99}}"#,
        "{}",
    ])
}

fn resources(bytes: &[u8], reach: &mut Reach) {
    let Ok(given) = serde_json::from_slice::<LinuxResources>(bytes) else { return reach.add("refused", 1) };
    told(reach, spec::limits(&given, 2).is_ok());
}

fn resources_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"memory":{"limit":1000000,"swap":2000000,"reservation":5}}"#,
        r#"{"cpu":{"shares":1024,"quota":-1,"period":100000,"cpus":"0-1,3"}}"#,
        r#"{"cpu":{"quota":9223372036854775807,"period":1,"burst":18446744073709551615}}"#,
        r#"{"cpu":{"cpus":"0-4294967295"}}"#,
        r#"{"pids":{"limit":-9},"unified":{"memory.high":"max","../x":"1"}}"#,
        r#"{"blockIO":{"weight":500}}"#,
        "[]",
    ])
}

/// Lines of a name and a value.
fn annotations(bytes: &[u8], reach: &mut Reach) {
    let text = String::from_utf8_lossy(bytes);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let map: HashMap<String, String> =
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    told(reach, Settings::of(Some(&map), &ALLOWED).is_ok());
}

fn annotation_seeds() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = ALLOWED
        .iter()
        .flat_map(|name| {
            ["1", "256M", "0", "-1", "99999999999999999999", "x", "1G"].map(|value| format!("{name}={value}"))
        })
        .map(String::into_bytes)
        .collect();
    all.extend(texts(&["other=1", &format!("{}nosuch=1", spec::PREFIX)]));
    all
}
