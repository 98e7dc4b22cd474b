//! A machine that is a process which sleeps, with a network of its own and one process that does as it is told.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};

use mvm_protocol::{ExitStatus, Get, Got, Put, RootStats, SignalTarget, WindowSize};
use mvm_runtime::agent::{Process, StdioSpec};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::net::Connection;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, MemoryKill, Sandbox, SandboxRequest};
use mvm_runtime::snapshot::{BaseMemory, SavedMachine};
use mvm_runtime::state::Ledger;
use nix::sys::signal::Signal;
use oci_spec::runtime::{LinuxResources, Process as OciProcess};

/// Name of a machine that cannot be saved.
pub(super) const UNSAVABLE: &str = "unsavable";

/// Where a machine is; told before the next step is done.
pub(super) enum Stage<'a> {
    /// Its directory is there.
    Directory,
    /// Its network is there.
    Network,
    /// Its process is there.
    Machine,
    /// The container is made.
    Container,
    /// The container's process is there.
    Runs(&'a Told),
    /// It is sent this signal.
    Signal(i32),
    /// It has ended, and the machine is about to.
    Ended,
    /// The machine is being ended.
    Ends,
    /// The process of this id was given up, and nobody waits for it any more.
    Abandoned(u64),
}

type Listener = dyn Fn(Stage<'_>) + Send + Sync;

pub(super) struct FakeLauncher(Arc<Listener>);

/// The container's process, or another one that is run in it.
#[derive(Clone)]
pub(super) struct Told {
    stdout: Arc<UnixStream>,
    end: Arc<(Mutex<Option<End>>, Condvar)>,
}

/// Why a process is no longer waited for.
#[derive(Clone, Copy)]
enum End {
    Exited(ExitStatus),
    Abandoned,
}

impl Told {
    pub(super) fn write(&self, text: &str) {
        (&*self.stdout).write_all(text.as_bytes()).unwrap();
    }

    pub(super) fn exit(&self, code: u8) {
        self.end(End::Exited(ExitStatus::Code(code)));
    }

    fn end(&self, end: End) {
        self.end.0.lock().unwrap().get_or_insert(end);
        self.end.1.notify_all();
        let _ = self.stdout.shutdown(std::net::Shutdown::Both);
    }
}

impl FakeLauncher {
    pub(super) fn new(listener: impl Fn(Stage<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }
}

impl Launcher for FakeLauncher {
    fn boot(&self, request: &SandboxRequest) -> Result<Arc<dyn Sandbox>, Failure> {
        std::fs::create_dir_all(&request.directory).unwrap();
        (self.0)(Stage::Directory);
        let ledger = Ledger::of(&request.directory)?;
        let connection = request.net.as_ref().unwrap().connect(request.id.as_str(), Some(&ledger))?;
        (self.0)(Stage::Network);
        let machine = Command::new("sleep").arg("infinity").spawn().context(|| "cannot sleep".to_owned())?;
        ledger.note_process(i32::try_from(machine.id()).unwrap())?;
        (self.0)(Stage::Machine);
        Ok(Arc::new(FakeSandbox {
            request: request.clone(),
            pid: machine.id(),
            listener: Arc::clone(&self.0),
            held: Mutex::new(Some((machine, connection))),
            told: Mutex::default(),
        }))
    }
}

struct FakeSandbox {
    request: SandboxRequest,
    pid: u32,
    listener: Arc<Listener>,
    held: Mutex<Option<(Child, Connection)>>,
    told: Mutex<Vec<Told>>,
}

impl FakeSandbox {
    /// The process of this id: they count from one.
    fn told(&self, id: u64) -> Told {
        let index = usize::try_from(id).unwrap().checked_sub(1).unwrap();
        self.told.lock().unwrap().get(index).cloned().expect("it was started")
    }
}

impl Sandbox for FakeSandbox {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn create(&self, _: &ContainerRequest) -> Result<(), Failure> {
        (self.listener)(Stage::Container);
        Ok(())
    }

    fn start(&self, _: &str, _: &OciProcess, _: StdioSpec) -> Result<Process, Failure> {
        let (near, far) = UnixStream::pair().unwrap();
        let told = Told { stdout: Arc::new(far), end: Arc::default() };
        let id = {
            let mut all = self.told.lock().unwrap();
            all.push(told.clone());
            all.len() as u64
        };
        (self.listener)(Stage::Runs(&told));
        Ok(Process { id, pid: 1, stdin: None, stdout: Some(near), stderr: None, terminal: None })
    }

    fn wait(&self, process: u64) -> Result<ExitStatus, Failure> {
        let told = self.told(process);
        let end = told.end.0.lock().unwrap();
        let end = *told.end.1.wait_while(end, |end| end.is_none()).unwrap();
        match end.expect("it was waited for") {
            End::Exited(status) => {
                (self.listener)(Stage::Ended);
                Ok(status)
            }
            End::Abandoned => {
                (self.listener)(Stage::Abandoned(process));
                Err(unable())
            }
        }
    }

    fn abandon(&self, process: u64) {
        self.told(process).end(End::Abandoned);
    }

    fn signal(&self, process: u64, signal: i32, _: SignalTarget) -> Result<(), Failure> {
        (self.listener)(Stage::Signal(signal));
        if signal == Signal::SIGTERM as i32 || signal == Signal::SIGKILL as i32 {
            self.told(process).end(End::Exited(ExitStatus::Signal(u8::try_from(signal).unwrap())));
        }
        Ok(())
    }

    fn wait_machine(&self) -> String {
        unreachable!("an owner waits for processes")
    }

    fn end(&self) -> Result<(), Failure> {
        (self.listener)(Stage::Ends);
        if let Some((mut machine, connection)) = self.held.lock().unwrap().take() {
            machine.kill().and_then(|()| machine.wait()).unwrap();
            drop(connection);
            std::fs::remove_dir_all(&self.request.directory).unwrap();
        }
        Ok(())
    }

    fn resize(&self, _: u64, _: WindowSize) -> Result<(), Failure> {
        Ok(())
    }

    fn close_stdin(&self, _: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn pause(&self, _: &str) -> Result<(), Failure> {
        Ok(())
    }

    fn resume(&self, _: &str) -> Result<(), Failure> {
        Ok(())
    }

    fn stats(&self, _: &str) -> Result<RootStats, Failure> {
        Err(unable())
    }

    fn update(&self, _: &str, _: &LinuxResources) -> Result<(), Failure> {
        Err(unable())
    }

    fn put(&self, _: Put) -> Result<(), Failure> {
        Err(unable())
    }

    fn get(&self, _: Get) -> Result<Got, Failure> {
        Err(unable())
    }

    fn save(&self, _: &str, directory: &Path, base: Option<&BaseMemory>) -> Result<SavedMachine, Failure> {
        std::fs::write(directory.join("state"), "state").unwrap();
        if self.request.id.as_str() == UNSAVABLE {
            return Err(unable());
        }
        std::fs::write(directory.join("memory"), "memory").unwrap();
        let saved = serde_json::json!({
            "cpus": 1, "memory_mib": 128, "contents": "", "plugged": false, "devices": [], "cards": [], "disks": [],
            "root": "main", "protocol": {"major": 3, "minor": 1}, "agent_version": "", "kernel_release": "",
            "memory_bytes": 6, "base": base.map(|it| &it.base), "state_bytes": 5, "held_ms": 0,
        });
        Ok(serde_json::from_value(saved).unwrap())
    }

    fn memory_kills(&self, _: &str) -> u64 {
        0
    }

    fn on_memory_kill(&self, _: MemoryKill) {}

    fn answers(&self) -> bool {
        true
    }

    fn kill_machine(&self) {
        if let Some((machine, _)) = &mut *self.held.lock().unwrap() {
            machine.kill().unwrap();
        }
    }

    fn remove(&self, _: &str) -> Result<(), Failure> {
        Ok(())
    }
}

fn unable() -> Failure {
    Failure::new("this machine cannot do that")
}
