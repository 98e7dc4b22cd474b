//! Owning a container: from its machine's start to its end, and again if its restart policy says so.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_protocol::{SignalTarget, WindowSize};
use mvm_runtime::agent::{Process, StdioSpec};
use mvm_runtime::container::Cost;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::net::NetRequest;
use mvm_runtime::owner::{Owner, Run};
use mvm_runtime::sandbox::{
    ContainerRequest, Launcher, MachineLauncher, RootfsMount, Sandbox, SandboxRequest,
};
use mvm_runtime::state::{Condition, Home, ProcessId, Record, Restart};
use nix::sys::signal::{SigSet, Signal};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::say;
use crate::stdio::{self, Streams, Target};

/// The container's id in its sandbox.
const CONTAINER: &str = "main";

/// A container to be run, with everything that was found out about it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    /// The image as it was named.
    pub(super) image: String,
    /// Its root file system, an EROFS image.
    pub(super) rootfs: PathBuf,
    pub(super) spec: Spec,
    pub(super) restart: Restart,
    pub(super) remove: bool,
    pub(super) cpus: u8,
    pub(super) memory_mib: u64,
    pub(super) net: Network,
    /// Standard input is connected.
    pub(super) stdin: bool,
    /// Say at the end how long each stage took and what the machine cost.
    pub(super) stats: bool,
}

/// A container's network, as its user named it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Network {
    pub(super) choice: String,
    pub(super) publish: Vec<String>,
    pub(super) dns: Vec<IpAddr>,
    pub(super) mtu: Option<u16>,
}

impl Network {
    fn request(&self) -> Result<NetRequest, Failure> {
        let publish: Result<Vec<_>, _> = self.publish.iter().map(|text| text.parse()).collect();
        Ok(NetRequest {
            choice: self.choice.parse().context(|| "cannot understand the network".to_owned())?,
            publish: publish.context(|| "cannot understand a published port".to_owned())?,
            dns: self.dns.clone(),
            mtu: self.mtu,
            ..NetRequest::default()
        })
    }
}

/// Where a container's streams go.
pub(super) enum Audience {
    /// This process's own streams and signals.
    Terminal(SigSet),
    /// The container's log.
    Log,
}

impl Job {
    fn record(&self) -> Record {
        let process = self.spec.process().as_ref();
        Record {
            id: self.id.clone(),
            name: self.name.clone(),
            labels: self.labels.clone(),
            image: self.image.clone(),
            command: process.and_then(|it| it.args().clone()).unwrap_or_default(),
            created: now(),
            condition: Condition::Starting,
            owner: ProcessId::own(),
            remove: self.remove,
            restart: self.restart,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            ports: self.net.publish.clone(),
            ..Record::default()
        }
    }

    fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(|it| it.terminal()).unwrap_or(false)
    }

    fn stdio(&self) -> StdioSpec {
        if self.terminal() {
            StdioSpec::Terminal(crate::terminal::size())
        } else {
            StdioSpec::Pipes { stdin: self.stdin, stdout: true, stderr: true }
        }
    }
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// Runs a container to its end; its exit code. `ready` is called once, when its process runs.
pub(super) fn own(
    job: &Job,
    home: &Home,
    launcher: &dyn Launcher,
    audience: Audience,
    ready: impl FnOnce(),
) -> Result<u8, Failure> {
    let owned = home.create(&job.id)?;
    let directory = owned.path().to_owned();
    let owner = Owner::new(home, owned, job.record())?;
    let mut runs = Runs { job, owner: &owner, directory: &directory, audience, ready: Some(ready) };
    loop {
        let result = runs.once(launcher);
        let code = match &result {
            Ok(code) => *code,
            Err(failure) => crate::run::exit_code(failure).unwrap_or(crate::FAILED),
        };
        owner.exited(code)?;
        if runs.ready.is_some() {
            // It never ran: there is nothing to look at, and trying again would not help.
            owner.abandon()?;
            return result;
        }
        if owner.again(code)? && owner.pause_before_restart() {
            if let Err(failure) = result {
                crate::complain(&failure);
            }
            continue;
        }
        owner.finish()?;
        return result;
    }
}

/// One run of a container after the other.
struct Runs<'a, R> {
    job: &'a Job,
    owner: &'a Owner,
    directory: &'a Path,
    audience: Audience,
    /// To be called when its process runs for the first time.
    ready: Option<R>,
}

impl<R: FnOnce()> Runs<'_, R> {
    fn once(&mut self, launcher: &dyn Launcher) -> Result<u8, Failure> {
        let job = self.job;
        let request = SandboxRequest {
            id: job.name.parse().context(|| format!("{:?} is no name", job.name))?,
            directory: self.directory.join("sandbox"),
            spec: job.spec.clone(),
            pod: false,
            net: Some(job.net.request()?),
        };
        let sandbox = launcher.boot(&request)?;
        let ended = self.inside(&sandbox);
        let removed = sandbox.end();
        let code = ended?;
        removed.map(|()| code)
    }

    fn inside(&mut self, sandbox: &Arc<dyn Sandbox>) -> Result<u8, Failure> {
        let job = self.job;
        sandbox.create(&ContainerRequest {
            id: CONTAINER.to_owned(),
            bundle: self.directory.to_owned(),
            spec: job.spec.clone(),
            rootfs: root(job, self.directory)?,
        })?;
        let spec = job.spec.process().clone().unwrap_or_default();
        let process = sandbox.start(CONTAINER, &spec, job.stdio())?;
        let (id, machine) = (process.id, Arc::clone(sandbox));
        self.owner.started(Run { sandbox: machine, container: CONTAINER.to_owned(), process: id, spec })?;
        if let Some(ready) = self.ready.take() {
            ready();
        }
        let wait = || {
            let status = sandbox.wait(id)?;
            if job.stats {
                report(&**sandbox, job.memory_mib << 20);
            }
            Ok(status.shell_code())
        };
        match &self.audience {
            Audience::Terminal(signals) => {
                let target = Guest { sandbox: Arc::clone(sandbox), process: id };
                stdio::serve(streams(process), *signals, target, wait)
            }
            Audience::Log => log(self.owner, process, wait),
        }
    }
}

/// The image, and what is written over it: on a disk beside `writes`, or in the guest's memory.
fn root(job: &Job, directory: &Path) -> Result<Vec<RootfsMount>, Failure> {
    let writes = directory.join("writes");
    std::fs::create_dir_all(&writes).context(|| format!("cannot make {}", writes.display()))?;
    let mount = |kind: &str, source: &Path, options: &[&str]| RootfsMount {
        kind: kind.to_owned(),
        source: source.to_string_lossy().into_owned(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..RootfsMount::default()
    };
    let upper = format!("upperdir={}", writes.display());
    Ok(vec![
        mount("erofs", &job.rootfs, &["ro"]),
        mount("overlay", Path::new("overlay"), &["lowerdir={{ mount 0 }}", &upper]),
    ])
}

fn streams(process: Process) -> Streams {
    Streams {
        terminal: process.terminal,
        stdin: process.stdin,
        stdout: process.stdout,
        stderr: process.stderr,
    }
}

/// Keeps what the process writes in the container's log.
fn log(owner: &Owner, process: Process, wait: impl FnOnce() -> Result<u8, Failure>) -> Result<u8, Failure> {
    // Nobody writes to it: that it stays open is what `-i` asks for.
    let _stdin = process.stdin;
    std::thread::scope(|scope| {
        let outputs = [(process.terminal, "stdout"), (process.stdout, "stdout"), (process.stderr, "stderr")];
        for (stream, name) in outputs {
            if let Some(stream) = stream {
                scope.spawn(move || owner.log().copy(name, stream));
            }
        }
        wait()
    })
}

fn report(sandbox: &dyn Sandbox, memory: u64) {
    if let Some(mut timeline) = sandbox.timeline() {
        timeline.reach("process has ended");
        say(timeline.to_string().trim_end());
    }
    match Cost::of(i32::try_from(sandbox.pid()).unwrap_or(0), memory) {
        Ok(cost) => say(&format!(
            "memory: {} KiB = guest {} private + {} shared, VMM {}",
            cost.total_kib(),
            cost.guest_private_kib,
            cost.guest_shared_kib,
            cost.vmm_kib
        )),
        Err(error) => say(&format!("memory: unknown: {error}")),
    }
}

/// A container's first process.
struct Guest {
    sandbox: Arc<dyn Sandbox>,
    process: u64,
}

impl Target for Guest {
    fn resize(&self, size: WindowSize) {
        let _ = self.sandbox.resize(self.process, size);
    }

    fn signal(&self, signal: Signal) {
        let _ = self.sandbox.signal(self.process, signal as i32, SignalTarget::Process);
    }

    fn give_up(&self) {
        let _ = self.sandbox.end();
    }
}

/// Leaves a process behind that owns the container; returns once its process runs.
pub(super) fn leave_behind(job: &Job) -> Result<(), Failure> {
    use std::io::{Read, Write};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    let failed = || "cannot start the process that owns the container".to_owned();
    let program = std::env::current_exe().context(failed)?;
    let (mut report, writer) = std::io::pipe().context(failed)?;
    let mut command = Command::new(program);
    command.arg("own").stdin(Stdio::piped()).stdout(writer).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn().context(failed)?;
    drop(command); // and with it our copy of the report's other end
    let text = serde_json::to_vec(job).context(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(&text).context(failed)?;
    }
    let mut said = String::new();
    report.read_to_string(&mut said).context(failed)?;
    match serde_json::from_str::<Said>(&said) {
        Ok(Said::Runs) => Ok(()),
        Ok(Said::Failed { report, exit_code }) => Err(super::Reported::failure(report, exit_code)),
        Err(_) => Err(Failure::new("the process that owns the container ended without a word")),
    }
}

/// What the process left behind tells, once.
#[derive(Serialize, Deserialize)]
enum Said {
    Runs,
    Failed { report: String, exit_code: u8 },
}

/// The process left behind: reads its job from standard input.
pub(crate) fn left_behind() -> Result<u8, Failure> {
    nix::unistd::setsid().context(|| "cannot leave the session".to_owned())?;
    let job: Job =
        serde_json::from_reader(std::io::stdin()).context(|| "cannot understand the job".to_owned())?;
    let launcher = MachineLauncher::default();
    let result = own(&job, &Home::default_place(), &launcher, Audience::Log, || tell(&Said::Runs));
    if let Err(failure) = &result {
        let exit_code = crate::run::exit_code(failure).unwrap_or(crate::FAILED);
        tell(&Said::Failed { report: failure.report(), exit_code });
        return Ok(exit_code);
    }
    result
}

/// Says it on standard output and gives that up: whoever reads waits for its end. The second time nobody does.
fn tell(said: &Said) {
    use std::io::Write;
    if let Ok(text) = serde_json::to_vec(said) {
        let _ = std::io::stdout().write_all(&text);
    }
    if let Ok(nothing) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(nothing.as_fd());
    }
}
