//! Templates, and the machines that are made of them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_integration::vm::{image, scratch, state};
use mvm_runtime::agent::Process;
use mvm_runtime::net::{Choice as NetChoice, NetRequest};
use mvm_runtime::sandbox::{ContainerRequest, Launcher, MachineLauncher, Sandbox, SandboxRequest};
use mvm_runtime::state::Wish;
use mvm_runtime::template::{Choice, Condition, Maker, Templates};
use mvm_runtime::timeline::{CLOCK, PLUG};
use oci_spec::runtime::Spec;
use serde_json::json;

use crate::Test;
use crate::sandbox::{PIPES, bundle, shell, unwrap};

pub(crate) const TESTS: &[Test] = &[
    ("clones_of_one_template_share_no_name_no_address_and_no_random_byte", identities),
    ("containers_of_a_pod_made_of_a_template_come_and_go", pod),
    ("a_template_that_was_cut_is_set_aside_and_the_machine_boots", cut),
    ("templates_are_made_listed_used_and_removed_by_name", commands),
];

/// Machines that must have nothing in common.
const CLONES: usize = 20;
/// How far a clone's wall clock may be from the host's, beyond the time it takes to ask for it. In an emulated host
/// that takes twenty to some hundred milliseconds, for mvm too: there it is as sure as it says, and this comes on top.
const NEAR: Duration = Duration::from_millis(10);
/// How often it is asked.
const ASKED: usize = 10;
/// What a container says of its machine, a line each, then its clock whenever it is asked.
const WHO: &str = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; \
     head -c 32 /dev/urandom | busybox od -An -tx1 -w32; cat /sys/class/net/eth0/address; \
     busybox ip -4 -o addr show dev eth0 | busybox awk '{print $4}'; exec /bin/guest_tool clock";

fn launcher(state: &Path) -> MachineLauncher {
    let (template, maker) = (Choice::Always, Maker::Thread);
    MachineLauncher { state: state.to_owned(), template, maker, ..Default::default() }
}

/// Containers keep what they write in memory: making disks is no part of this.
fn bare_bundle(name: &str) -> (PathBuf, Spec) {
    let (bundle, spec) = bundle(name, |spec| {
        spec["annotations"] = json!({"io.mvm.upper_size": "0"});
        spec["hostname"] = json!(null);
    });
    let tool = fs::read(env!("CARGO_BIN_EXE_guest_tool")).expect("it is built with this test");
    let path = bundle.join("rootfs/bin/guest_tool");
    fs::write(&path, tool).expect("a file");
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a mode");
    (bundle, spec)
}

fn boot(launcher: &MachineLauncher, name: &str, spec: &Spec, net: Option<NetRequest>) -> Arc<dyn Sandbox> {
    let pod = net.is_none();
    let id = name.parse().expect("a name");
    unwrap(launcher.boot(&SandboxRequest {
        id,
        directory: scratch().join(name),
        spec: spec.clone(),
        pod,
        net,
        wish: Wish::default(),
    }))
}

fn create(sandbox: &dyn Sandbox, id: &str, bundle: &Path, spec: &Spec) {
    let (bundle, spec) = (bundle.to_path_buf(), spec.clone());
    unwrap(sandbox.create(&ContainerRequest { id: id.to_owned(), bundle, spec, rootfs: Vec::new() }));
}

/// A clone, and what its container says of it.
struct Clone {
    sandbox: Arc<dyn Sandbox>,
    facts: Vec<String>,
    process: Process,
    says: BufReader<std::os::unix::net::UnixStream>,
}

impl Clone {
    fn make(launcher: &MachineLauncher, number: usize, bundle: &Path, spec: &Spec) -> Self {
        let net = NetRequest { choice: NetChoice::HostOnly(None), ..NetRequest::default() };
        let sandbox = boot(launcher, &format!("clone-{number}"), spec, Some(net));
        create(&*sandbox, "main", bundle, spec);
        let mut process = unwrap(sandbox.start("main", &shell(spec, WHO), PIPES));
        let says = BufReader::new(process.stdout.take().expect("asked for"));
        let mut clone = Self { sandbox, facts: Vec::new(), process, says };
        clone.facts = (0..6).map(|_| clone.line()).collect();
        clone
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("a line");
        line.trim().to_owned()
    }

    /// How far its wall clock is from this host's, at least: what it takes to ask is given to it, so it is asked
    /// some times, of which one at least goes quickly.
    fn clock_error(&mut self) -> Duration {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let errors = (0..ASKED).map(|_| {
            let asked = now();
            self.process.stdin.as_ref().expect("asked for").write_all(b"\n").expect("it reads");
            let clock = Duration::from_nanos(self.line().parse().expect("nanoseconds"));
            asked.saturating_sub(clock).max(clock.saturating_sub(now()))
        });
        errors.max().expect("it was asked")
    }

    /// By how much mvm says that its wall clock may be wrong.
    fn clock_doubt(&self) -> Duration {
        let stages = self.sandbox.timeline().expect("it was started").stages();
        let stage = stages.into_iter().find(|stage| stage.name == CLOCK).expect("its clock was put right");
        let detail = stage.detail.expect("how sure it is");
        let ms = detail.strip_prefix('±').and_then(|text| text.strip_suffix(" ms"));
        Duration::from_secs_f64(ms.and_then(|ms| ms.parse::<f64>().ok()).expect("milliseconds") / 1e3)
    }

    fn address(&self) -> &str {
        self.facts[5].split('/').next().expect("an address")
    }
}

/// KiB of files in memory that a process has mapped as huge pages.
fn in_huge_pages(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("root may look");
    let kib =
        |line: &str| line.strip_prefix("ShmemPmdMapped:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    maps.lines().filter_map(kib).sum()
}

fn identities() {
    let (bundle, spec) = bare_bundle("clones-bundle");
    let launcher = launcher(&scratch().join("clones-state"));
    let mut clones: Vec<_> = (0..CLONES).map(|it| Clone::make(&launcher, it, &bundle, &spec)).collect();
    for (index, what) in
        ["host name", "machine id", "boot id", "random bytes", "MAC address", "IP address"].iter().enumerate()
    {
        let different: BTreeSet<_> = clones.iter().map(|clone| clone.facts[index].clone()).collect();
        assert_eq!(different.len(), CLONES, "{what}: {different:?}");
        assert!(!different.contains(""), "{what}: {different:?}");
    }
    let timeline = clones[1].sandbox.timeline().expect("it was started").to_string();
    assert!(timeline.contains(PLUG), "it booted:\n{timeline}");
    let emulated = mvm_integration::lab::inside();
    if emulated {
        // Its file systems are in memory, and of the kernel each has run some.
        let huge: Vec<_> = clones.iter().map(|clone| in_huge_pages(clone.sandbox.pid())).collect();
        assert!(huge.iter().all(|kib| *kib >= 2048), "KiB in huge pages: {huge:?}");
    }
    let most = |clone: &Clone| NEAR + if emulated { clone.clock_doubt() } else { Duration::ZERO };
    let errors: Vec<_> = clones.iter_mut().map(|it| (it.clock_error(), most(it))).collect();
    assert!(errors.iter().all(|(error, most)| error <= most), "their clocks are off: {errors:?}");
    for (clone, next) in clones.iter().zip(clones.iter().cycle().skip(1)) {
        let script = format!("busybox ping -c 1 -W 60 {}", next.address());
        let ping = unwrap(clone.sandbox.start("main", &shell(&spec, &script), PIPES));
        let mut said = String::new();
        std::io::Read::read_to_string(&mut ping.stdout.as_ref().expect("asked for"), &mut said)
            .expect("text");
        assert!(said.contains("1 packets received"), "{} to {}: {said}", clone.facts[0], next.address());
    }
    clones.iter().for_each(|clone| unwrap(clone.sandbox.end()));
}

fn pod() {
    let (bundle, spec) = bare_bundle("pod-bundle");
    let sandbox = boot(&launcher(&scratch().join("pod-state")), "cloned-pod", &spec, None);
    for id in ["one", "two"] {
        create(&*sandbox, id, &bundle, &spec);
        let process = unwrap(sandbox.start(id, &shell(&spec, "hostname; cat /etc/machine-id"), PIPES));
        let lines: Vec<_> = BufReader::new(process.stdout.expect("asked for")).lines().collect();
        let lines: Vec<_> = lines.into_iter().map(|line| line.expect("text")).collect();
        assert!(lines[0] == "cloned-pod" && lines[1].len() == 32, "{lines:?}");
        unwrap(sandbox.wait(process.id));
        unwrap(sandbox.remove(id));
    }
    unwrap(sandbox.end());
}

fn cut() {
    let (bundle, spec) = bare_bundle("cut-bundle");
    let state = scratch().join("cut-state");
    let run = |choice, name: &str| {
        let launcher = MachineLauncher { template: choice, ..launcher(&state) };
        let net = NetRequest::default();
        let sandbox = boot(&launcher, name, &spec, Some(net));
        create(&*sandbox, "main", &bundle, &spec);
        let timeline = sandbox.timeline().expect("it was started").to_string();
        unwrap(sandbox.end());
        timeline.contains(PLUG)
    };
    assert!(run(Choice::Always, "whole"), "it is a clone");
    let templates = Templates::of(&state);
    let entry = unwrap(templates.list()).pop().expect("one was made");
    let saved = state.join("templates").join(entry.key.as_str()).join("state");
    let length = fs::metadata(&saved).expect("a file").len();
    File::options().write(true).open(&saved).expect("a file").set_len(length / 2).expect("it is cut");
    assert!(!run(Choice::Auto, "cut"), "it booted");
    let entry = unwrap(templates.get(entry.key.as_str()));
    assert!(matches!(entry.condition, Condition::Aside { .. }), "{entry:?}");
    assert!(!run(Choice::Auto, "after"), "it booted, and nothing was tried");
}

fn commands() {
    let mvm = |arguments: &[&str]| -> Output { crate::mvm().args(arguments).output().expect("it starts") };
    let text = |output: &Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout.clone()).expect("text").trim().to_owned()
    };
    let key = text(&mvm(&["template", "create", "--memory", "96M", "--quiet"]));
    assert_eq!(text(&mvm(&["template", "create", "--memory", "96M", "--quiet"])), key, "it is there");
    let set = state().join("templates").join(&key).join("working-set");
    assert!(set.metadata().expect("it is there").len() > 48, "a machine of it has written something");
    let list: serde_json::Value =
        serde_json::from_str(&text(&mvm(&["template", "ls", "--format", "json"]))).expect("JSON");
    let entry = list.as_array().and_then(|list| list.iter().find(|it| it["key"] == key.as_str()));
    let entry = entry.unwrap_or_else(|| panic!("{key} is not in {list}"));
    assert_eq!((&entry["condition"], &entry["manifest"]["memory_mib"]), (&json!("ready"), &json!(96)));
    let image = image().to_str().expect("text");
    let run = ["run", "--template", "always", "--memory", "96M", "--stats", image, "--", "echo", "hello"];
    let ran = mvm(&run);
    let stages = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert_eq!(text(&ran), "hello");
    assert!(stages.contains(PLUG), "{stages}");
    let removed = text(&mvm(&["template", "rm", &key[..12]]));
    assert!(removed.starts_with(&key[..12]), "{removed}");
    assert!(!mvm(&["template", "inspect", &key]).status.success());
    assert!(state().join("templates").exists());
}
