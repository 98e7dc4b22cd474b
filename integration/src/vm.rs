//! Machines for tests: `TestVm::new().cpus(3).boot()`, then `vm.sh("nproc")`.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use mvm_protocol::{ExitStatus, PidNamespace, ShutdownMode, User, WindowSize};
use mvm_runtime::agent::{Process, ProcessSpec, StdioSpec};
use mvm_runtime::container::{Container, ROOT, Request, Upper, root_file_system};
use mvm_runtime::guest::cpio::Archive;
use mvm_runtime::net::TcpProfile;
use mvm_vmm::exit::Exit;

/// Bound of anything a test waits for; an emulated host is thirty times slower than a real one.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Time a machine gets to end when its agent is silent.
const END_TIME: Duration = Duration::from_secs(10);
/// A shell and everything else, in one static file of Debian's `busybox-static`.
const BUSYBOX: &str = "/bin/busybox";

/// A machine to be booted, with a busybox root.
#[derive(Clone, Debug)]
pub struct TestVm {
    request: Request,
}

/// A booted machine.
#[derive(Debug)]
pub struct Vm {
    /// Machine and agent.
    pub container: Container,
}

/// How a command in a machine came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it complained.
    pub stderr: Vec<u8>,
}

impl Default for TestVm {
    fn default() -> Self {
        Self::new()
    }
}

impl TestVm {
    /// One CPU, 128 MiB, no network.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let request = Request {
            id: id.parse().expect("a valid name"),
            cpus: Default::default(),
            memory: Default::default(),
            net: Default::default(),
            read_only: false,
            upper: Upper::Memory,
            sockets: None,
        };
        Self { request }
    }

    /// This many virtual CPUs.
    #[must_use]
    pub fn cpus(mut self, count: u64) -> Self {
        self.request.cpus = count.try_into().expect("a number of CPUs");
        self
    }

    /// This much memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.request.memory = mib.try_into().expect("a memory size");
        self
    }

    /// Writes to the root go to the ext4 file system on this disk.
    #[must_use]
    pub fn upper_disk(mut self, path: &Path) -> Self {
        self.request.upper = Upper::Disk(path.to_path_buf());
        self
    }

    /// This network, as on the command line.
    #[must_use]
    pub fn net(mut self, text: &str) -> Self {
        self.request.net.choice = text.parse().expect("a network");
        self
    }

    /// A port of the host that leads to one of the guest, as on the command line.
    #[must_use]
    pub fn publish(mut self, text: &str) -> Self {
        self.request.net.publish.push(text.parse().expect("a port"));
        self
    }

    /// How the guest's TCP behaves.
    #[must_use]
    pub fn tcp(mut self, profile: TcpProfile) -> Self {
        self.request.net.tcp = profile;
        self
    }

    /// Sockets of the machine in this directory.
    #[must_use]
    pub fn sockets(mut self, dir: &Path) -> Self {
        self.request.sockets = Some(dir.to_path_buf());
        self
    }

    /// Boots it.
    pub fn boot(self) -> Vm {
        let image =
            root_file_system(&image().display().to_string(), &state(), &mut ()).unwrap_or_else(|failure| {
                panic!("{}", failure.report());
            });
        let container = Container::boot(&self.request, &image, &state())
            .unwrap_or_else(|failure| panic!("{}", failure.report()));
        Vm { container }
    }
}

impl Vm {
    /// What a shell command prints; it must succeed.
    pub fn sh(&mut self, script: &str) -> String {
        let output = self.output(script, b"");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status, ExitStatus::Code(0), "{script:?} failed: {stderr}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// How a shell command comes out, fed with `input`.
    pub fn output(&mut self, script: &str, input: &[u8]) -> Output {
        let stdio = StdioSpec::Pipes { stdin: true, stdout: true, stderr: true };
        let process = self.start(&["sh", "-c", script], stdio);
        let input = input.to_vec();
        let stdin = process.stdin.expect("asked for");
        let feeder = thread::spawn(move || {
            // The process may end without reading it all.
            let _ = (&stdin).write_all(&input);
            let _ = stdin.shutdown(Shutdown::Write);
        });
        let stdout = drain(process.stdout.expect("asked for"));
        let stderr = drain(process.stderr.expect("asked for"));
        let status = match self.container.agent.wait(process.id, Some(PATIENCE)) {
            Ok(status) => status,
            Err(error) => self.lost(script, &error),
        };
        feeder.join().expect("no panic");
        Output { status, stdout: stdout.join().expect("no panic"), stderr: stderr.join().expect("no panic") }
    }

    /// What became of the machine is worth more than that its agent is silent.
    fn lost(&mut self, script: &str, error: &dyn std::error::Error) -> ! {
        let end = self.container.machine.wait_at_most(END_TIME);
        let end = end.map_or_else(|failure| failure.report(), |exit| exit.to_string());
        panic!("{script:?} has no end: {error}; the machine: {end}")
    }

    /// Starts a process in the root.
    pub fn start(&mut self, args: &[&str], stdio: StdioSpec) -> Process {
        self.container.start(spec(args, stdio)).unwrap_or_else(|failure| panic!("{}", failure.report()))
    }

    /// Starts a process on a terminal of this size.
    pub fn start_on_terminal(&mut self, args: &[&str], rows: u16, columns: u16) -> Process {
        self.start(args, StdioSpec::Terminal(WindowSize { rows, columns }))
    }

    /// Has the guest power off, and waits for it.
    pub fn power_off(self) -> Exit {
        self.shut_down(ShutdownMode::PowerOff)
    }

    /// Has the guest shut down, and waits for it.
    pub fn shut_down(mut self, mode: ShutdownMode) -> Exit {
        self.container.agent.shut_down(mode, Duration::from_secs(2)).expect("the agent shuts down");
        self.container.machine.wait().unwrap_or_else(|failure| panic!("{}", failure.report()))
    }
}

/// A process in the container's root, as root.
pub fn spec(args: &[&str], stdio: StdioSpec) -> ProcessSpec {
    ProcessSpec {
        root: Some(ROOT.to_owned()),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["PATH=/bin".to_owned(), "HOME=/root".to_owned()],
        cwd: "/".to_owned(),
        user: User::Named(String::new()),
        stdio,
        pid_namespace: PidNamespace::New,
        oom_score_adj: 0,
        confinement: Default::default(),
    }
}

/// Reads a stream to its end on a thread.
pub fn drain(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A reset at the end is an end.
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

/// A directory of this run that goes away with it.
pub fn scratch() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| tempfile::tempdir().expect("a temporary directory")).path()
}

/// Where this run's images are kept.
pub fn state() -> PathBuf {
    scratch().join("state")
}

/// A root directory with busybox and its applets.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| busybox_root(&scratch().join("busybox")))
}

/// Makes a root directory with busybox at `root`.
pub fn busybox_root(root: &Path) -> PathBuf {
    for dir in ["bin", "dev", "etc", "home/app", "proc", "root", "sys", "tmp", "work"] {
        fs::create_dir_all(root.join(dir)).expect("a directory");
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("a mode");
    fs::copy(BUSYBOX, root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in applets().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        .expect("a file");
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n").expect("a file");
    root.to_path_buf()
}

fn applets() -> String {
    let output = Command::new(BUSYBOX).arg("--list").output().expect("busybox-static is installed");
    String::from_utf8(output.stdout).expect("text")
}

/// An initial RAM disk that runs `script` with busybox's shell as the first process; returns its path.
pub fn initrd(name: &str, script: &str) -> PathBuf {
    let mut archive = Archive::new();
    archive.directory("bin").program("bin/busybox", &fs::read(BUSYBOX).expect("busybox-static is installed"));
    for applet in applets().lines().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let setup = "mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys";
    archive.program("init", format!("#!/bin/sh\nexport PATH=/bin\n{setup}\n{script}\n").as_bytes());
    let path = scratch().join(format!("{name}.cpio"));
    fs::write(&path, archive.finish()).expect("a file");
    path
}
