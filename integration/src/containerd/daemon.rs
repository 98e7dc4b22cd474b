//! containerd itself: started with a directory of its own, stopped with what it made.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::config::{self, Settings};
use super::image::{self, Archive, Layer};
use super::{AS_USER, BUSYBOX, Ctr, Events, Installation, LAYERED, LAYERS, PAUSE};

/// Bound of the daemon's start; an emulated host needs two seconds.
const START: Duration = Duration::from_secs(60);
/// Bound of its end: it has been seen to hang.
const END: Duration = Duration::from_secs(120);
/// Between looks at whether it has ended.
const INTERVAL: Duration = Duration::from_millis(20);
/// The bridge of the network that `--cni` and pods get.
pub const BRIDGE: &str = "mvmtest0";
/// Its addresses; the host has the first.
pub const SUBNET: &str = "10.88.0.0/16";
/// The host's address on the bridge.
pub const GATEWAY: &str = "10.88.0.1";

/// A running containerd.
#[derive(Debug)]
pub struct Daemon {
    /// What it was started from.
    pub installation: Installation,
    /// Everything it keeps.
    pub dir: PathBuf,
    child: Mutex<Child>,
    events: Mutex<Option<Events>>,
}

impl Daemon {
    /// Starts it in `dir`, with the suites' images imported; `path` is searched for shims before anything else.
    ///
    /// # Panics
    /// It does not come up.
    #[must_use]
    pub fn start(installation: &Installation, dir: &Path, path: &[PathBuf]) -> Self {
        fs::create_dir_all(dir.join("net.d")).expect("a directory");
        let settings = Settings { dir, plugins: &installation.plugins, pause: PAUSE };
        let version =
            if installation.generation.starts_with("1.") { config::version_2 } else { config::version_3 };
        fs::write(dir.join("config.toml"), version(&settings)).expect("a file");
        let network = config::network(BRIDGE, SUBNET, dir);
        fs::write(dir.join("net.d/10-mvm-test.conflist"), network).expect("a file");
        let mut search = path.to_vec();
        search.extend([installation.programs.clone(), installation.runc.clone()]);
        search.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        fs::write(dir.join("path"), std::env::join_paths(search).expect("a path").as_encoded_bytes())
            .expect("a file");
        let child = Mutex::new(spawn(installation, dir));
        let this =
            Self { installation: installation.clone(), dir: dir.to_owned(), child, events: Mutex::new(None) };
        this.import();
        this.follow();
        this
    }

    /// `ctr` in a namespace of containerd's.
    #[must_use]
    pub fn ctr(&self, namespace: &str) -> Ctr {
        Ctr::new(&self.installation.programs.join("ctr"), &self.socket(), namespace)
    }

    /// Where its services are.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.lock().expect("no panic").id()
    }

    /// Ends it by `signal` and starts it again on what it left.
    ///
    /// # Panics
    /// It had to be killed; another one runs then all the same.
    pub fn restart(&self, signal: Signal) {
        *self.events.lock().expect("no panic") = None;
        let mut child = self.child.lock().expect("no panic");
        let went = end(&mut child, signal);
        *child = spawn(&self.installation, &self.dir);
        drop(child);
        self.follow();
        assert!(went, "containerd hung: it did not end by {signal}");
    }

    /// Ends it.
    ///
    /// # Panics
    /// It had to be killed, or another thread panicked.
    pub fn stop(&self) {
        *self.events.lock().expect("no panic") = None;
        let went = end(&mut self.child.lock().expect("no panic"), Signal::SIGTERM);
        assert!(went || thread::panicking(), "containerd hung: it did not end by SIGTERM");
    }

    /// What it has published since its start.
    ///
    /// # Panics
    /// Nothing follows the events.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.lock().expect("no panic").clone().expect("followed since the start")
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("log")).unwrap_or_default()).into_owned()
    }

    fn follow(&self) {
        *self.events.lock().expect("no panic") = Some(Events::follow(&self.ctr("default")));
    }

    fn import(&self) {
        let archive = self.dir.join("images.tar");
        images(&archive).expect("images");
        for namespace in ["default", "k8s.io"] {
            let path = archive.to_str().expect("text");
            self.ctr(namespace).must(&["image", "import", path]);
        }
        fs::remove_file(archive).expect("it was written");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts the program and waits until it says that it is ready.
fn spawn(installation: &Installation, dir: &Path) -> Child {
    let ready = dir.join("ready");
    let _ = fs::remove_file(&ready);
    let socket = UnixDatagram::bind(&ready).expect("a socket");
    socket.set_read_timeout(Some(START)).expect("a bound");
    let log = File::options().create(true).append(true).open(dir.join("log")).expect("a file");
    let path = fs::read_to_string(dir.join("path")).expect("a file");
    let mut command = Command::new(installation.programs.join("containerd"));
    command.arg("--config").arg(dir.join("config.toml")).env("NOTIFY_SOCKET", &ready).env("PATH", path);
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a copy")).stderr(log);
    let child = command.spawn().expect("containerd starts");
    let mut message = [0; 256];
    let length = socket.recv(&mut message).unwrap_or(0);
    let log = || String::from_utf8_lossy(&fs::read(dir.join("log")).unwrap_or_default()).into_owned();
    assert!(message[..length].starts_with(b"READY=1"), "containerd does not start:\n{}", log());
    fs::remove_file(ready).expect("it was bound");
    child
}

/// Ends the program, by force if it does not go; whether it went when it was asked to.
fn end(child: &mut Child, signal: Signal) -> bool {
    let pid = Pid::from_raw(child.id().try_into().expect("a process id"));
    let deadline = Instant::now() + END;
    let mut asked = false;
    // It may have ended by itself, or before.
    while matches!(child.try_wait(), Ok(None)) {
        if !asked {
            let _ = kill(pid, signal);
            asked = true;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return false;
        }
        thread::sleep(INTERVAL);
    }
    true
}

/// The suites' images, as one archive.
fn images(path: &Path) -> std::io::Result<()> {
    let busybox = image::busybox()?.finish()?;
    let env = ["PATH=/bin:/sbin"];
    let mut archive = Archive::default();
    archive.image(BUSYBOX, &[&busybox], &json!({"Env": env, "Cmd": ["sh"]}))?;
    archive.image(AS_USER, &[&busybox], &json!({"Env": env, "User": "app", "WorkingDir": "/home/app"}))?;
    archive.image(PAUSE, &[&busybox], &json!({"Env": env, "Entrypoint": ["sleep", "2147483647"]}))?;
    let mut layers = vec![busybox];
    for number in 1..LAYERS {
        let mut layer = Layer::default();
        layer.directory("layers", 0o755)?;
        layer.file(&format!("layers/{number}"), 0o644, number.to_string().as_bytes())?;
        layer.file("layers/top", 0o644, number.to_string().as_bytes())?;
        layers.push(layer.finish()?);
    }
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    archive.image(LAYERED, &layers, &json!({"Env": env}))?;
    archive.write(path)
}
