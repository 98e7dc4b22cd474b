//! Containers as an engine describes them, in sandboxes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mvm_integration::vm::{drain, scratch, state};
use mvm_protocol::{ExitStatus, SignalTarget};
use mvm_runtime::agent::{Process as Started, StdioSpec};
use mvm_runtime::container::NotRunnable;
use mvm_runtime::failure::Failure;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, MachineLauncher, Sandbox, SandboxRequest};
use mvm_runtime::snapshot::Going;
use mvm_runtime::state::Wish;
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_container_of_a_default_specification_runs_and_is_executed_in", default_specification),
    ("a_container_has_the_user_the_rights_and_the_limits_it_was_given", confined),
    ("containers_of_a_pod_come_and_go_and_share_what_they_should", pod),
    ("a_container_is_paused_limited_anew_and_killed_for_memory", limited),
    ("disks_of_the_host_are_disks_with_nodes_in_a_container", raw_disks),
    ("a_sandbox_without_a_container_and_one_that_dies_leave_nothing", ends),
];

pub(crate) const PIPES: StdioSpec = StdioSpec::Pipes { stdin: true, stdout: true, stderr: true };
/// What engines hand out for an image that says nothing.
const DEFAULT: &str = include_str!("sandbox_default.json");

/// A sandbox in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) sandbox: Arc<dyn Sandbox>,
    directory: PathBuf,
}

pub(crate) fn unwrap<T>(result: Result<T, Failure>) -> T {
    result.unwrap_or_else(|failure| panic!("{}", failure.report()))
}

/// A bundle with a busybox root file system and the default specification, changed by `change`.
pub(crate) fn bundle(name: &str, change: impl FnOnce(&mut Value)) -> (PathBuf, Spec) {
    let bundle = scratch().join(name);
    let root = bundle.join("rootfs");
    for directory in ["bin", "etc", "tmp", "root"] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("a mode");
    for applet in
        ["sh", "cat", "echo", "id", "sleep", "grep", "mount", "touch", "ls", "hostname", "kill", "wc", "head"]
    {
        let _ = symlink("busybox", root.join("bin").join(applet));
    }
    let mut spec: Value = serde_json::from_str(DEFAULT).expect("JSON");
    change(&mut spec);
    fs::write(bundle.join("config.json"), spec.to_string()).expect("a file");
    (bundle, serde_json::from_value(spec).expect("a specification"))
}

impl Fixture {
    pub(crate) fn boot(spec: &Spec, pod: bool) -> Self {
        Self::launch(&MachineLauncher { state: state(), ..Default::default() }, spec, pod)
    }

    pub(crate) fn launch(launcher: &MachineLauncher, spec: &Spec, pod: bool) -> Self {
        let request = Self::request(spec, pod);
        Self { sandbox: unwrap(launcher.boot(&request)), directory: request.directory }
    }

    /// The machine of a container that was saved goes on in a sandbox of its own; that, and the container's process.
    pub(crate) fn restore(
        launcher: &MachineLauncher,
        (id, bundle, spec): (&str, &Path, &Spec),
        going: &Going,
    ) -> (Self, Started) {
        let request = Self::request(spec, false);
        let (sandbox, process) = unwrap(launcher.restore(&request, &container(id, bundle, spec), going));
        (Self { sandbox, directory: request.directory }, process)
    }

    fn request(spec: &Spec, pod: bool) -> SandboxRequest {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("sandbox-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let (id, directory) = (name.parse().expect("a name"), scratch().join(&name));
        SandboxRequest { id, directory, spec: spec.clone(), pod, net: None, wish: Wish::default() }
    }

    pub(crate) fn create(&self, id: &str, bundle: &Path, spec: &Spec) {
        unwrap(self.try_create(id, bundle, spec));
    }

    fn try_create(&self, id: &str, bundle: &Path, spec: &Spec) -> Result<(), Failure> {
        self.sandbox.create(&container(id, bundle, spec))
    }

    /// Runs a process to its end.
    pub(crate) fn run(&self, container: &str, process: &Process) -> (ExitStatus, String) {
        let started = unwrap(self.sandbox.start(container, process, PIPES));
        drop(started.stdin);
        let stdout = drain(started.stdout.expect("asked for"));
        let stderr = drain(started.stderr.expect("asked for"));
        let status = unwrap(self.sandbox.wait(started.id));
        let mut text = stdout.join().expect("no panic");
        text.extend(stderr.join().expect("no panic"));
        (status, String::from_utf8_lossy(&text).into_owned())
    }

    /// Ends the sandbox and sees that nothing of it is left.
    pub(crate) fn end(self) {
        let pid = self.sandbox.pid();
        unwrap(self.sandbox.end());
        assert!(!self.directory.exists(), "{} is left", self.directory.display());
        assert!(pid == 0 || !Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
        unwrap(self.sandbox.end());
    }
}

fn container(id: &str, bundle: &Path, spec: &Spec) -> ContainerRequest {
    let (id, bundle) = (id.to_owned(), bundle.to_path_buf());
    ContainerRequest { id, bundle, spec: spec.clone(), rootfs: Vec::new() }
}

/// The container's process with another command.
pub(crate) fn shell(spec: &Spec, script: &str) -> Process {
    let mut process = spec.process().clone().expect("a process");
    process.set_args(Some(["sh", "-c", script].map(str::to_owned).to_vec()));
    process
}

fn default_specification() {
    let (bundle, spec) = bundle("default", |spec| spec["hostname"] = json!("otter"));
    let fixture = Fixture::boot(&spec, false);
    fixture.create("c1", &bundle, &spec);
    assert!(fixture.try_create("c1", &bundle, &spec).is_err(), "the name is taken");
    let init = unwrap(fixture.sandbox.start("c1", &shell(&spec, "hostname; read line; exit 7"), PIPES));
    let mut stdout = init.stdout.expect("asked for");
    let mut name = [0; 6];
    stdout.read_exact(&mut name).expect("its name");
    assert_eq!(&name, b"otter\n");

    let (status, text) = fixture.run("c1", &shell(&spec, "echo $$; cat /proc/1/comm; ls /dev; exit 3"));
    assert_eq!(status, ExitStatus::Code(3), "{text}");
    let lines: Vec<_> = text.lines().collect();
    assert_ne!(lines[0], "1", "{text}");
    assert_eq!(lines[1], "sh", "its PID 1 is the container's");
    for device in ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "shm", "mqueue", "fd"] {
        assert!(lines.contains(&device), "no {device} in {text}");
    }
    let missing = fixture.sandbox.start(
        "c1",
        &{
            let mut process = spec.process().clone().expect("a process");
            process.set_args(Some(vec!["/no/such".to_owned()]));
            process
        },
        PIPES,
    );
    let failure = missing.expect_err("there is no such program");
    let source = std::error::Error::source(&failure).and_then(|source| source.downcast_ref::<NotRunnable>());
    assert_eq!(source.map(|not| not.exit_code), Some(127));

    init.stdin.expect("asked for").write_all(b"go\n").expect("it reads");
    assert_eq!(unwrap(fixture.sandbox.wait(init.id)), ExitStatus::Code(7));
    unwrap(fixture.sandbox.signal(init.id, libc::SIGTERM, SignalTarget::Process));
    unwrap(fixture.sandbox.remove("c1"));
    unwrap(fixture.sandbox.remove("c1"));
    fixture.end();
}

fn confined() {
    let (bundle, spec) = bundle("confined", |spec| {
        spec["root"]["readonly"] = json!(true);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [7], "umask": 0o27});
        spec["linux"]["resources"]["memory"] = json!({"limit": 33554432});
        spec["linux"]["resources"]["pids"] = json!({"limit": 20});
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0"});
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]});
        spec["mounts"].as_array_mut().expect("a list").push(json!(
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1777"]}));
    });
    let fixture = Fixture::boot(&spec, false);
    fixture.create("c1", &bundle, &spec);
    let script = "id -u; id -g; id -G; touch /x 2>&1; busybox mkdir /tmp/d 2>&1; echo > /tmp/f; busybox stat -c %a /tmp/f; \
                  grep -E 'NoNewPrivs|CapBnd|Seccomp:' /proc/self/status; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  grep 'Max open files' /proc/self/limits; cat /proc/kcore | wc -c; echo 1 2>&1 > /proc/sys/vm/swappiness";
    let (status, text) = fixture.run("c1", &shell(&spec, script));
    for part in [
        "1000\n1001\n1001 7\n",
        "Read-only file system",
        "Operation not supported",
        "\n640\n",
        "NoNewPrivs:\t1",
        "CapBnd:\t00000000a80425fb",
        "Seccomp:\t2",
        "\n0\nMax open files            1024 ",
        "\n0\n",
    ] {
        assert!(text.contains(part), "no {part:?} in {text} ({status:?})");
    }
    let stats = unwrap(fixture.sandbox.stats("c1"));
    let find = |name: &str| {
        stats.files.iter().find(|(file, _)| file == name).map(|(_, text)| text.trim().to_owned())
    };
    assert!(find("memory.current").is_some(), "{:?}", stats.files);
    fixture.end();
}

/// A specification of a container in the pod of process `pid`, which also shows `volumes` of the host.
fn in_pod(name: &str, pid: u32, volumes: &[(&Path, &str, &str)]) -> (PathBuf, Spec) {
    bundle(name, |spec| {
        let shared = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")});
        spec["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "mount"}, shared("ipc", "ipc"), shared("uts", "uts"), shared("network", "net")]);
        let mounts = spec["mounts"].as_array_mut().expect("a list");
        mounts.retain(|mount| mount["destination"] != "/dev/shm");
        mounts.extend(volumes.iter().map(|(source, target, mode)| {
            json!({"destination": target, "type": "bind", "source": source, "options": ["rbind", "rprivate", mode]})
        }));
    })
}

/// What the host shows a pod's containers: directories, files, what is small and what is large.
fn pod_volumes() -> PathBuf {
    let host = scratch().join("pod-volumes");
    for directory in ["shm", "secret", "volumes/kubernetes.io~empty-dir/cache", "large"] {
        fs::create_dir_all(host.join(directory)).expect("a directory");
    }
    fs::write(host.join("secret/key"), "hidden").expect("a file");
    fs::write(host.join("large/blob"), vec![b'x'; 3 << 20]).expect("a file");
    fs::write(host.join("hosts"), "10.0.0.9 pod\n").expect("a file");
    fs::write(host.join("message"), "").expect("a file");
    host
}

fn pod() {
    let host = pod_volumes();
    let [message, shm, secret, empty, large, hosts] =
        ["message", "shm", "secret", "volumes/kubernetes.io~empty-dir/cache", "large", "hosts"]
            .map(|name| host.join(name));
    let (_, spec) = bundle("pod", |spec| {
        spec["hostname"] = json!("badger");
        spec["linux"]["cgroupsPath"] = json!("/mvm-e2e/pod");
    });
    let fixture = Fixture::boot(&spec, true);
    let pid = fixture.sandbox.pid();
    assert_ne!(pid, 0);
    let volumes: [(&Path, &str, &str); 6] = [
        (&message, "/message", "rw"),
        (&shm, "/dev/shm", "rw"),
        (&secret, "/secret", "ro"),
        (&empty, "/cache", "rw"),
        (&large, "/large", "ro"),
        (&hosts, "/etc/hosts", "rw"),
    ];
    let (first_bundle, first) = in_pod("pod-1", pid, &volumes);
    let (second_bundle, second) = in_pod("pod-2", pid, &volumes);
    fixture.create("first", &first_bundle, &first);
    let init = unwrap(fixture.sandbox.start("first", &shell(&first, "read line; exit 4"), PIPES));
    let script = "hostname; cat /secret/key /etc/hosts; head -c 3 /large/blob; echo one > /dev/shm/f; echo two > /cache/f; \
                  touch /secret/new 2>&1";
    let (_, text) = fixture.run("first", &shell(&first, script));
    assert!(text.starts_with("badger\nhidden10.0.0.9 pod\nxxx"), "{text}");
    assert!(text.contains("Read-only file system"), "{text}");
    fs::write(secret.join("key"), "changed").expect("a file");
    let (_, text) =
        fixture.run("first", &shell(&first, "until grep changed /secret/key; do sleep 0.2; done"));
    assert_eq!(text, "changed\n");
    fixture.run("first", &shell(&first, "echo the end > /message"));
    for round in 0..2 {
        fixture.create("second", &second_bundle, &second);
        let (_, text) = fixture.run(
            "second",
            &shell(
                &second,
                "cat /dev/shm/f /cache/f /etc/hosts; head -c 2 /large/blob; ls -d /proc/[0-9]*; hostname",
            ),
        );
        assert!(text.starts_with("one\ntwo\n10.0.0.9 pod\nxx/proc/1\n"), "{round}: {text}");
        assert_eq!(text.matches("/proc/").count(), 1, "it sees nobody but itself: {text}");
        unwrap(fixture.sandbox.remove("second"));
    }
    let link = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a process");
    let own = fs::read_link("/proc/self/ns/net").expect("a process");
    assert_ne!(link("net"), own, "the machine is in a name space of its own");
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("a process");
    assert!(groups.lines().any(|group| group.ends_with("/mvm-e2e/pod")), "{groups}");
    drop(init.stdin);
    assert_eq!(unwrap(fixture.sandbox.wait(init.id)), ExitStatus::Code(4));
    unwrap(fixture.sandbox.remove("first"));
    assert_eq!(fs::read_to_string(&message).expect("a file"), "the end\n");
    assert_eq!(fs::read_to_string(&hosts).expect("a file"), "10.0.0.9 pod\n");
    fixture.end();
}

fn limited() {
    let (bundle, spec) = bundle("limited", |spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20});
    });
    let fixture = Fixture::boot(&spec, false);
    fixture.create("c1", &bundle, &spec);
    let script = "while :; do echo x; read line; done";
    let mut init = unwrap(fixture.sandbox.start("c1", &shell(&spec, script), PIPES));
    let (mut stdin, mut stdout) =
        (init.stdin.take().expect("asked for"), init.stdout.take().expect("asked for"));
    let mut answer = [0; 2];
    stdout.read_exact(&mut answer).expect("it says something");
    unwrap(fixture.sandbox.pause("c1"));
    stdin.write_all(b"go\n").expect("room");
    stdout.set_read_timeout(Some(std::time::Duration::from_secs(2))).expect("a time");
    assert!(stdout.read_exact(&mut answer).is_err(), "it runs although it is paused");
    unwrap(fixture.sandbox.resume("c1"));
    stdout.set_read_timeout(None).expect("a time");
    stdout.read_exact(&mut answer).expect("it goes on");

    assert_eq!(fixture.sandbox.memory_kills("c1"), 0);
    let hog = "busybox dd if=/dev/zero of=/dev/null bs=24M count=1 2> /dev/null && echo whole";
    let (_, text) = fixture.run("c1", &shell(&spec, hog));
    assert_ne!(text.trim(), "whole", "the limit holds");
    assert!(fixture.sandbox.memory_kills("c1") > 0);
    let more = serde_json::from_value(json!({"memory": {"limit": 80 << 20}})).expect("resources");
    unwrap(fixture.sandbox.update("c1", &more));
    let (_, text) = fixture.run("c1", &shell(&spec, hog));
    assert_eq!(text.trim(), "whole");
    drop(stdin);
    unwrap(fixture.sandbox.signal(init.id, libc::SIGKILL, SignalTarget::Everyone));
    assert_eq!(unwrap(fixture.sandbox.wait(init.id)), ExitStatus::Signal(9));
    fixture.end();
}

fn ends() {
    let (bundle, spec) = bundle("ends", |_| {});
    Fixture::boot(&spec, false).end();
    let fixture = Fixture::boot(&spec, false);
    let (_, refused) =
        self::bundle("refused", |spec| spec["hooks"] = json!({"prestart": [{"path": "/bin/true"}]}));
    let failure = fixture.try_create("c1", &bundle, &refused).expect_err("hooks are refused");
    assert!(failure.report().contains("hooks.prestart"), "{}", failure.report());
    assert_eq!(fixture.sandbox.pid(), 0, "no machine was started for it");
    fixture.create("c1", &bundle, &spec);
    let init = unwrap(fixture.sandbox.start("c1", &shell(&spec, "read line"), PIPES));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(fixture.sandbox.pid()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is there");
    let how = fixture.sandbox.wait_machine();
    assert!(how.contains("signal"), "{how}");
    assert!(fixture.sandbox.wait(init.id).is_err(), "nobody can tell how it ended");
    fixture.end();
}

/// A disk of this host with an image below it: its node, its numbers, and the image.
fn loop_disk(name: &str) -> (String, (u32, u32), PathBuf) {
    let image = scratch().join(name);
    fs::write(&image, vec![b'0'; 1 << 20]).expect("a file");
    let attach = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().expect("losetup");
    let device = String::from_utf8(attach.stdout).expect("a path").trim().to_owned();
    let class = format!("/sys/class/block/{}/dev", device.trim_start_matches("/dev/"));
    let number = fs::read_to_string(class).expect("a loop device");
    let (major, minor) = number.trim().split_once(':').expect("two numbers");
    (device, (major.parse().expect("a number"), minor.parse().expect("a number")), image)
}

fn raw_disks() {
    let (bound, _, image) = loop_disk("bound");
    let (numbered, (major, minor), _) = loop_disk("numbered");
    let (bundle, spec) = bundle("raw-disks", |spec| {
        let mount =
            json!({"destination": "/dev/bound", "type": "bind", "source": bound, "options": ["rbind"]});
        spec["mounts"].as_array_mut().expect("mounts").push(mount);
        spec["linux"]["devices"] = json!([
            {"path": "/dev/numbered", "type": "b", "major": major, "minor": minor, "fileMode": 0o600},
        ]);
        spec["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": major, "minor": minor, "access": "rm"},
        ]);
    });
    let fixture = Fixture::boot(&spec, false);
    fixture.create("c1", &bundle, &spec);
    let script = "head -c 4 /dev/numbered; ls -l /dev/numbered; echo -n otter > /dev/bound && echo written
        (echo x > /dev/numbered) 2>/dev/null || echo read-only";
    let (status, text) = fixture.run("c1", &shell(&spec, script));
    assert_eq!(status, ExitStatus::Code(0), "{text}");
    assert!(text.starts_with("0000brw-------") && text.ends_with("written\nread-only\n"), "{text}");
    fixture.end();
    for device in [&bound, &numbered] {
        assert!(Command::new("losetup").args(["--detach", device]).status().expect("losetup").success());
    }
    assert!(fs::read(&image).expect("the image").starts_with(b"otter000"), "what was written is kept");
}
