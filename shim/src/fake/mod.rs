//! Machines that are none: a container's processes are plain processes of the host. For tests where no guest can run;
//! builds for use have no such thing.
//!
//! What a guest guarantees is kept: an init takes its container's other processes with it, the loss of the machine
//! all of them, and streams end when the last process that holds them does.

mod checkpoint;
mod faults;
mod process;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use mvm_protocol::{ExitStatus, Get, Got, GotContent, Put, RootStats, SignalTarget, WindowSize};
use mvm_runtime::agent::{Process, StdioSpec};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::sandbox::{
    CheckpointRequest, ContainerRequest, Launcher, MemoryKill, RestoreRequest, Sandbox, SandboxRequest,
};
use nix::libc::SIGKILL;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Process as OciProcess};

use faults::Faults;

/// Set, it has the shim make such machines.
const CHOICE: &str = "MVM_FAKE_MACHINES";

/// The launcher, if the environment asks for it.
pub(crate) fn chosen() -> Option<Arc<dyn Launcher>> {
    std::env::var_os(CHOICE).map(|_| Arc::new(FakeLauncher) as Arc<dyn Launcher>)
}

struct FakeLauncher;

impl Launcher for FakeLauncher {
    fn boot(&self, request: &SandboxRequest) -> Result<Arc<dyn Sandbox>, Failure> {
        self.machine(request).map(|sandbox| sandbox as Arc<dyn Sandbox>)
    }

    fn restore_checkpoint(
        &self,
        request: &SandboxRequest,
        container: &ContainerRequest,
        from: &RestoreRequest,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let process = checkpoint::process(container, from)?;
        let sandbox = self.machine(request)?;
        let restored = sandbox.create(container).and_then(|()| {
            let process = sandbox.start(&container.id, &process, from.stdio)?;
            checkpoint::await_stop(&process).map(|()| process)
        });
        let process = restored.inspect_err(|_| drop(sandbox.end()))?;
        Ok((sandbox, process))
    }
}

impl FakeLauncher {
    fn machine(&self, request: &SandboxRequest) -> Result<Arc<FakeSandbox>, Failure> {
        match annotation(request, "io.mvm.fake.boot").as_deref() {
            Some("fail") => return Err(Failure::new("cannot boot the machine")),
            // As if as many started at this moment as may.
            Some("wait") => return Err(wait_for_nobody(request)),
            _ => {}
        }
        fs::create_dir_all(&request.directory)
            .context(|| "cannot make the machine's directory".to_owned())?;
        let machine = Command::new("sleep").arg("infinity").stdin(Stdio::null()).spawn();
        let machine = machine.context(|| "cannot start the machine's process".to_owned())?;
        let pid = machine.id();
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        thread::spawn(move || watch_machine(machine, &watched));
        let directory = request.directory.clone();
        let faults = Faults { directory: directory.clone() };
        Ok(Arc::new(FakeSandbox { pid, directory, faults, shared, next: AtomicU64::new(1) }))
    }
}

/// Waits until the machine is not wanted any more; says that it does in its directory.
fn wait_for_nobody(request: &SandboxRequest) -> Failure {
    let begun = fs::create_dir_all(&request.directory)
        .and_then(|()| fs::write(request.directory.join("boot.waits"), ""));
    while begun.is_ok() && request.wish.stands() {
        thread::sleep(Duration::from_millis(1));
    }
    let _ = fs::remove_dir_all(&request.directory);
    Failure::new("it was given up")
}

fn annotation(request: &SandboxRequest, name: &str) -> Option<String> {
    request.spec.annotations().as_ref().and_then(|all| all.get(name).cloned())
}

fn watch_machine(mut machine: Child, shared: &Shared) {
    let _ = machine.wait();
    let mut state = shared.lock();
    state.is_down = true;
    for process in state.processes.values() {
        process.kill(SIGKILL);
    }
    shared.changed.notify_all();
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_down: bool,
    heard: Option<MemoryKill>,
    containers: BTreeMap<String, Vec<u64>>,
    processes: BTreeMap<u64, Running>,
}

struct Running {
    pid: Pid,
    exit: Option<ExitStatus>,
    /// Nobody is to be told how it ends.
    abandoned: bool,
    terminal: Option<OwnedFd>,
}

impl Running {
    /// The process and what it started, which may have outlived it: each is a session of its own.
    fn kill(&self, signal: i32) {
        if let Ok(signal) = Signal::try_from(signal) {
            let _ = killpg(self.pid, signal);
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the machine goes down within `time`.
    fn wait_down(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| !state.is_down);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_down
    }
}

struct FakeSandbox {
    pid: u32,
    directory: PathBuf,
    faults: Faults,
    shared: Arc<Shared>,
    next: AtomicU64,
}

impl FakeSandbox {
    fn fault(&self, call: &str) -> Result<bool, Failure> {
        self.faults.of(call, &self.shared)
    }

    fn each(&self, container: &str, signal: i32) {
        let state = self.shared.lock();
        for id in state.containers.get(container).into_iter().flatten() {
            if let Some(process) = state.processes.get(id) {
                process.kill(signal);
            }
        }
    }
}

impl Sandbox for FakeSandbox {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn create(&self, container: &ContainerRequest) -> Result<(), Failure> {
        self.fault("create")?;
        let mut state = self.shared.lock();
        if state.is_down {
            return Err(Failure::new("the machine is lost"));
        }
        state.containers.insert(container.id.clone(), Vec::new());
        Ok(())
    }

    fn start(&self, container: &str, process: &OciProcess, stdio: StdioSpec) -> Result<Process, Failure> {
        self.fault("start")?;
        let (command, ours) = process::prepare(process, stdio)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (pid, child) = process::spawn(command)?;
        let mut state = self.shared.lock();
        let members = state.containers.entry(container.to_owned()).or_default();
        let is_init = members.is_empty();
        members.push(id);
        state.processes.insert(id, Running { pid, exit: None, abandoned: false, terminal: ours.master });
        drop(state);
        let (shared, container) = (Arc::clone(&self.shared), container.to_owned());
        let _ = child
            .send(Box::new(move |child| watch_process(child, id, is_init.then_some(container), &shared)));
        Ok(Process {
            id,
            pid: pid.as_raw().unsigned_abs(),
            stdin: ours.stdin,
            stdout: ours.stdout,
            stderr: ours.stderr,
            terminal: ours.terminal,
        })
    }

    fn wait(&self, process: u64) -> Result<ExitStatus, Failure> {
        let mut state = self.shared.lock();
        loop {
            if state.is_down {
                return Err(Failure::new("the machine is lost"));
            }
            match state.processes.get(&process).map(|process| (process.exit, process.abandoned)) {
                None => return Err(Failure::new("no such process")),
                Some((_, true)) => return Err(Failure::new("the process was given up")),
                Some((Some(exit), false)) => return Ok(exit),
                Some((None, false)) => {}
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn abandon(&self, process: u64) {
        if let Some(process) = self.shared.lock().processes.get_mut(&process) {
            process.abandoned = true;
        }
        self.shared.changed.notify_all();
    }

    fn signal(&self, process: u64, signal: i32, target: SignalTarget) -> Result<(), Failure> {
        let heard = self.shared.lock().heard.clone();
        heard.inspect(|heard| heard());
        if self.fault("signal")? {
            return Ok(());
        }
        let state = self.shared.lock();
        let container = state.containers.iter().find(|(_, members)| members.contains(&process));
        let container = container.map(|(id, _)| id.clone());
        if target == SignalTarget::Everyone {
            drop(state);
            self.each(&container.unwrap_or_default(), signal);
        } else if let Some(process) = state.processes.get(&process)
            && process.exit.is_none()
            && let Ok(signal) = Signal::try_from(signal)
        {
            let _ = kill(process.pid, signal);
        }
        Ok(())
    }

    fn resize(&self, process: u64, size: WindowSize) -> Result<(), Failure> {
        let state = self.shared.lock();
        let terminal = state.processes.get(&process).and_then(|process| process.terminal.as_ref());
        let terminal = terminal.ok_or_else(|| Failure::new("the process has no terminal"))?;
        let status = Command::new("stty")
            .args(["rows", &size.rows.to_string(), "cols", &size.columns.to_string()])
            .stdin(terminal.try_clone().context(|| "cannot use the terminal".to_owned())?)
            .status()
            .context(|| "cannot run stty".to_owned())?;
        if status.success() { Ok(()) } else { Err(Failure::new("stty failed")) }
    }

    fn close_stdin(&self, _: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn pause(&self, container: &str) -> Result<(), Failure> {
        self.each(container, Signal::SIGSTOP as i32);
        Ok(())
    }

    fn resume(&self, container: &str) -> Result<(), Failure> {
        self.each(container, Signal::SIGCONT as i32);
        Ok(())
    }

    fn stats(&self, _: &str) -> Result<RootStats, Failure> {
        let files = [("pids.current", "1\n"), ("memory.current", "4096\n"), ("cpu.stat", "usage_usec 7\n")];
        let files = files.map(|(name, text)| (name.to_owned(), text.to_owned())).to_vec();
        Ok(RootStats { files, pids: Vec::new() })
    }

    fn update(&self, container: &str, resources: &LinuxResources) -> Result<(), Failure> {
        let text = serde_json::to_vec(resources).context(|| "cannot encode the limits".to_owned())?;
        fs::write(self.directory.join(format!("{container}.limits")), text)
            .context(|| "cannot note the limits".to_owned())
    }

    fn put(&self, _: Put) -> Result<(), Failure> {
        Err(Failure::new("this machine has no files of its own"))
    }

    /// Of the host, which is what the processes see.
    fn get(&self, get: Get) -> Result<Got, Failure> {
        let path = Path::new("/").join(get.path);
        let failed = || format!("cannot read {}", path.display());
        let metadata = fs::symlink_metadata(&path).context(failed)?;
        let content = match metadata.file_type() {
            kind if kind.is_file() => GotContent::File(Vec::new()),
            kind if kind.is_symlink() => {
                let target = fs::read_link(&path).context(failed)?;
                GotContent::Link(target.to_string_lossy().into_owned())
            }
            _ => GotContent::Other,
        };
        Ok(Got {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            size: metadata.len(),
            content,
        })
    }

    /// As many as the machine's directory says.
    fn memory_kills(&self, container: &str) -> u64 {
        let text = fs::read_to_string(self.directory.join(format!("{container}.kills")));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// It is heard of with the next signal.
    fn on_memory_kill(&self, heard: MemoryKill) {
        self.shared.lock().heard = Some(heard);
    }

    fn answers(&self) -> bool {
        self.fault("answer").is_ok()
    }

    fn kill_machine(&self) {
        let _ = kill(Pid::from_raw(i32::try_from(self.pid).unwrap_or(i32::MAX)), Signal::SIGKILL);
    }

    fn remove(&self, container: &str) -> Result<(), Failure> {
        if self.fault("remove")? {
            return Ok(());
        }
        self.each(container, SIGKILL);
        self.shared.lock().containers.remove(container);
        Ok(())
    }

    fn checkpoint(&self, container: &str, request: &CheckpointRequest) -> Result<(), Failure> {
        self.fault("checkpoint")?;
        checkpoint::write(container, request)
    }

    fn wait_machine(&self) -> String {
        let mut state = self.shared.lock();
        while !state.is_down {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        "its process has ended".to_owned()
    }

    fn end(&self) -> Result<(), Failure> {
        self.kill_machine();
        self.wait_machine();
        let _ = fs::remove_dir_all(&self.directory);
        let _ = self.directory.parent().map(fs::remove_dir);
        Ok(())
    }
}

fn watch_process(mut child: Child, id: u64, init_of: Option<String>, shared: &Shared) {
    let status = child.wait().map(|status| (status.code(), status.signal()));
    let exit = match status {
        Ok((Some(code), _)) => ExitStatus::Code(u8::try_from(code).unwrap_or(u8::MAX)),
        Ok((None, signal)) => ExitStatus::Signal(u8::try_from(signal.unwrap_or(0)).unwrap_or(0)),
        Err(_) => ExitStatus::Code(u8::MAX),
    };
    let mut state = shared.lock();
    let members = init_of.and_then(|container| state.containers.get(&container).cloned()).unwrap_or_default();
    if let Some(process) = state.processes.get_mut(&id) {
        process.exit = Some(exit);
        process.terminal = None;
    }
    for other in members {
        if let Some(process) = state.processes.get(&other) {
            process.kill(SIGKILL);
        }
    }
    shared.changed.notify_all();
}
