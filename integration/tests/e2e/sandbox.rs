//! Containers as an engine describes them, in sandboxes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mvm_integration::vm::{drain, scratch, state};
use mvm_protocol::{ExitStatus, SignalTarget};
use mvm_runtime::agent::StdioSpec;
use mvm_runtime::container::NotRunnable;
use mvm_runtime::failure::Failure;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, MachineLauncher, Sandbox, SandboxRequest};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_container_of_a_default_specification_runs_and_is_executed_in", default_specification),
    ("a_container_has_the_user_the_rights_and_the_limits_it_was_given", confined),
];

const PIPES: StdioSpec = StdioSpec::Pipes { stdin: true, stdout: true, stderr: true };
/// What engines hand out for an image that says nothing.
const DEFAULT: &str = include_str!("sandbox_default.json");

/// A sandbox in a directory of its own.
struct Fixture {
    sandbox: Arc<dyn Sandbox>,
    directory: PathBuf,
}

fn unwrap<T>(result: Result<T, Failure>) -> T {
    result.unwrap_or_else(|failure| panic!("{}", failure.report()))
}

/// A bundle with a busybox root file system and the default specification, changed by `change`.
fn bundle(name: &str, change: impl FnOnce(&mut Value)) -> (PathBuf, Spec) {
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
    fn boot(spec: &Spec, pod: bool) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("sandbox-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let directory = scratch().join(&name);
        let launcher = MachineLauncher { state: state(), ..Default::default() };
        let id = name.parse().expect("a name");
        let request = SandboxRequest { id, directory: directory.clone(), spec: spec.clone(), pod };
        Self { sandbox: unwrap(launcher.boot(&request)), directory }
    }

    fn create(&self, id: &str, bundle: &Path, spec: &Spec) {
        unwrap(self.try_create(id, bundle, spec));
    }

    fn try_create(&self, id: &str, bundle: &Path, spec: &Spec) -> Result<(), Failure> {
        let request = ContainerRequest {
            id: id.to_owned(),
            bundle: bundle.to_path_buf(),
            spec: spec.clone(),
            rootfs: Vec::new(),
        };
        self.sandbox.create(&request)
    }

    /// Runs a process to its end.
    fn run(&self, container: &str, process: &Process) -> (ExitStatus, String) {
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
    fn end(self) {
        let pid = self.sandbox.pid();
        unwrap(self.sandbox.end());
        assert!(!self.directory.exists(), "{} is left", self.directory.display());
        assert!(pid == 0 || !Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
        unwrap(self.sandbox.end());
    }
}

/// The container's process with another command.
fn shell(spec: &Spec, script: &str) -> Process {
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
