//! Pods, through the container runtime interface.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use mvm_integration::containerd::cri::messages::{
    ContainerConfig, ContainerMetadata, ContainerSecurity, CreateContainer, DnsConfig, ExecSync,
    ExecSyncAnswer, Id, ImageSpec, LinuxContainer, LinuxPod, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PortMapping, Resources, RunPodSandbox, SandboxSecurity, StopContainer,
    UpdateContainer,
};
use mvm_integration::containerd::daemon::GATEWAY;
use mvm_integration::containerd::{BUSYBOX, Cri};

use crate::context::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    ("three_containers_of_a_pod_share_network_ipc_memory_and_name", shared),
    ("a_pod_has_an_address_names_and_hosts", identity),
    ("limits_hold_are_changed_and_use_is_told", limits),
    ("logs_exit_codes_and_stops_are_told", ends),
    ("ports_are_forwarded_and_published", ports),
];

/// What `cri-api` calls the states of a container.
const EXITED: i32 = 2;
/// A namespace of the container's own, and one of the pod's.
const CONTAINER: i32 = 1;
const MIB: i64 = 1 << 20;
/// Bound of what follows an event.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between looks: nothing tells.
const INTERVAL: Duration = Duration::from_millis(50);

/// A pod that goes away with this.
struct Pod<'a> {
    context: &'a Context,
    cri: Cri,
    id: String,
    config: PodSandboxConfig,
    logs: tempfile::TempDir,
}

fn namespaces() -> NamespaceOption {
    NamespaceOption { pid: CONTAINER, ..Default::default() }
}

impl<'a> Pod<'a> {
    fn run(context: &'a Context, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        let cri = Cri::new(&context.daemon.socket());
        let name = context.id();
        let logs = tempfile::tempdir().expect("a directory");
        let security = SandboxSecurity { namespace_options: Some(namespaces()) };
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "test".into(),
            }),
            hostname: name,
            log_directory: logs.path().display().to_string(),
            linux: Some(LinuxPod { security_context: Some(security), ..Default::default() }),
            ..Default::default()
        };
        change(&mut config);
        let request =
            RunPodSandbox { config: Some(config.clone()), runtime_handler: context.runtime.name().into() };
        let id = cri.run_pod(&request).expect("a pod").id;
        Self { context, cri, id, config, logs }
    }

    /// Starts a container of this shell script; returns its id.
    fn start(&self, name: &str, script: &str, resources: Option<Resources>) -> String {
        let security = ContainerSecurity { namespace_options: Some(namespaces()), ..Default::default() };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into() }),
            image: Some(ImageSpec { image: BUSYBOX.into() }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainer { resources, security_context: Some(security) }),
            ..Default::default()
        };
        let request = CreateContainer {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self.cri.create(&request).expect("a container");
        self.cri.start(&id).expect("it starts");
        id.id
    }

    fn exec(&self, container: &str, script: &str) -> ExecSyncAnswer {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        self.cri.exec(&ExecSync { container_id: container.into(), cmd, timeout: 0 }).expect("an end")
    }

    /// What a shell in a container prints; it must succeed.
    fn sh(&self, container: &str, script: &str) -> String {
        let answer = self.exec(container, script);
        let (stdout, stderr) =
            (String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
        assert_eq!(answer.exit_code, 0, "{script:?}: {stdout}{stderr}");
        stdout.into_owned()
    }

    /// Waits for a container's end; returns its exit code.
    fn ended(&self, container: &str) -> i32 {
        self.context.daemon.events().expect(container, "/tasks/exit");
        // What the runtime interface tells follows the event.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.cri.status(container).expect("a state");
            if status.state == EXITED {
                return status.exit_code;
            }
            assert!(Instant::now() < deadline, "{container} is in state {}", status.state);
            thread::sleep(INTERVAL);
        }
    }

    /// Waits until a container's log has all of this: who writes it may be later than who tells of the end.
    fn logged(&self, name: &str, wanted: &[&str]) {
        let path = self.logs.path().join(format!("{name}.log"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = fs::read_to_string(&path).unwrap_or_default();
            if wanted.iter().all(|part| log.contains(part)) {
                return;
            }
            assert!(Instant::now() < deadline, "not all of {wanted:?} is in {log:?}");
            thread::sleep(INTERVAL);
        }
    }

    fn address(&self) -> String {
        let status = self.cri.pod_status(&self.id).expect("a state");
        status.network.expect("a network").ip
    }

    /// Ends and removes it.
    fn end(self) {
        let id = Id { id: self.id.clone() };
        self.cri.stop_pod(&id).expect("it stops");
        self.cri.remove_pod(&id).expect("it goes");
    }
}

fn shared(context: &Context) {
    let pod = Pod::run(context, |_| {});
    let a = pod.start("a", "exec nc -ll -p 9000 -e echo over the loopback", None);
    let b = pod.start("b", "exec sleep 1000", None);
    let c = pod.start("c", "exec sleep 1000", None);
    assert_eq!(pod.sh(&b, "until nc 127.0.0.1 9000 </dev/null; do sleep 0.1; done"), "over the loopback\n");
    pod.sh(&b, "echo shared > /dev/shm/note");
    assert_eq!(pod.sh(&c, "cat /dev/shm/note"), "shared\n");
    let spaces = |container: &str, name: &str| pod.sh(container, &format!("readlink /proc/self/ns/{name}"));
    for name in ["net", "ipc", "uts"] {
        assert_eq!(spaces(&a, name), spaces(&b, name), "{name}");
        assert_eq!(spaces(&a, name), spaces(&c, name), "{name}");
    }
    for name in ["pid", "mnt"] {
        assert_ne!(spaces(&a, name), spaces(&b, name), "{name}");
    }
    assert_eq!(pod.sh(&c, "hostname").trim(), pod.config.hostname);
    assert_eq!(pod.sh(&c, "test -e /proc/1/exe && cat /proc/1/cmdline | tr '\\0' ' '"), "sleep 1000 ");
    pod.end();
}

fn identity(context: &Context) {
    let servers = vec!["192.0.2.53".to_owned()];
    let pod = Pod::run(context, |config| {
        config.dns_config = Some(DnsConfig { servers, searches: vec!["cluster.test".to_owned()] });
    });
    let container = pod.start("a", "exec sleep 1000", None);
    let address = pod.address();
    let shown = pod
        .sh(&container, "ip -4 -o addr show eth0; ip route; cat /etc/resolv.conf /etc/hosts /etc/hostname");
    for part in [
        &address,
        &format!("default via {GATEWAY}"),
        "nameserver 192.0.2.53",
        "cluster.test",
        &pod.config.hostname,
    ] {
        assert!(shown.contains(part), "no {part}: {shown}");
    }
    pod.sh(&container, &format!("ping -c 1 -W 60 {GATEWAY}"));
    let answered = Command::new("/bin/busybox")
        .args(["ping", "-c", "1", "-W", "60", &address])
        .output()
        .expect("busybox");
    assert!(answered.status.success(), "{}", String::from_utf8_lossy(&answered.stdout));
    pod.end();
}

fn limits(context: &Context) {
    let resources = Resources { memory_limit_in_bytes: 64 * MIB, cpu_shares: 512, ..Default::default() };
    let pod = Pod::run(context, |config| {
        config.linux.as_mut().expect("set").resources = Some(resources.clone());
    });
    let container = pod.start("a", "while :; do :; done", Some(resources));
    let limit = || pod.sh(&container, "cat /sys/fs/cgroup/memory.max");
    assert_eq!(limit(), format!("{}\n", 64 * MIB));
    let stats = pod.cri.stats(&container).expect("figures");
    let used = stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |number| number.value);
    assert!((4096..64 << 20).contains(&used), "{used} bytes");
    let time = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |number| number.value);
    assert!(time > 0);
    let changed = Resources { memory_limit_in_bytes: 48 * MIB, ..Default::default() };
    pod.cri
        .update(&UpdateContainer { container_id: container.clone(), linux: Some(changed) })
        .expect("a change");
    assert_eq!(limit(), format!("{}\n", 48 * MIB));
    pod.end();
}

fn ends(context: &Context) {
    let pod = Pod::run(context, |_| {});
    let short = pod.start("short", "echo out; echo err >&2; exit 3", None);
    assert_eq!(pod.ended(&short), 3);
    pod.logged("short", &[" stdout F out\n", " stderr F err\n"]);
    pod.cri.remove(&Id { id: short }).expect("it goes");

    let polite = pod.start("polite", "trap 'exit 4' TERM; echo > /ready; while :; do sleep 0.1; done", None);
    let answer =
        pod.exec(&polite, "while ! test -e /ready; do sleep 0.1; done; echo out; echo err >&2; exit 5");
    assert_eq!((&answer.stdout[..], &answer.stderr[..], answer.exit_code), (&b"out\n"[..], &b"err\n"[..], 5));
    pod.cri.stop(&StopContainer { container_id: polite.clone(), timeout: 60 }).expect("it stops");
    assert_eq!(pod.ended(&polite), 4);

    let deaf = pod.start("deaf", "trap '' TERM; while :; do sleep 1; done", None);
    pod.cri.stop(&StopContainer { container_id: deaf.clone(), timeout: 1 }).expect("it stops");
    assert_eq!(pod.ended(&deaf), 137);
    assert_eq!(pod.cri.pod_status(&pod.id).expect("a state").state, 0, "the pod outlives its containers");
    pod.end();
}

fn ports(context: &Context) {
    let pod = Pod::run(context, |config| {
        config.port_mappings = vec![PortMapping { protocol: 0, container_port: 8080, host_port: 18080 }];
    });
    let container = pod.start("a", "exec nc -ll -p 8080 -e echo served", None);
    let dial = |space: &str, address: &str, port: &str| {
        let script = format!("until busybox nc -w 5 {address} {port} </dev/null; do sleep 0.1; done");
        let words = ["-s", "KILL", "60", "nsenter", &format!("--net={space}"), "sh", "-c", &script];
        let output = Command::new("timeout").args(words).output().expect("util-linux");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(pod.sh(&container, "until nc 127.0.0.1 8080 </dev/null; do sleep 0.1; done"), "served\n");
    let space = network_namespace();
    assert_eq!(dial(&space.display().to_string(), "127.0.0.1", "8080"), "served\n", "to the pod's localhost");
    assert_eq!(dial("/proc/self/ns/net", &pod.address(), "8080"), "served\n", "to the pod's address");
    assert_eq!(dial("/proc/self/ns/net", GATEWAY, "18080"), "served\n", "to the published port");
    pod.end();
}

/// The one network namespace that CNI has made for a pod.
fn network_namespace() -> PathBuf {
    let mut entries = fs::read_dir(Path::new("/run/netns")).expect("a directory").flatten();
    entries.find(|entry| entry.file_name().to_string_lossy().starts_with("cni-")).expect("a pod's").path()
}

/// Removes every pod, whatever its state; returns what there were.
pub(crate) fn sweep(context: &Context) -> Vec<String> {
    let cri = Cri::new(&context.daemon.socket());
    let pods = cri.list_pods(&Default::default()).map(|pods| pods.items).unwrap_or_default();
    for pod in &pods {
        // What cannot be removed is found as a leak of the next test.
        let _ = cri.stop_pod(pod);
        let _ = cri.remove_pod(pod);
    }
    pods.into_iter().map(|pod| pod.id).collect()
}
