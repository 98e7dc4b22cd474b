//! Owning a container: from its machine's start to its end, and again if its restart policy says so.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use mvm_protocol::{SignalTarget, WindowSize};
use mvm_runtime::agent::Process;
use mvm_runtime::container::{Cost, state_dir};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Job, Outputs, Owner, Refused, Run, exit_code};
use mvm_runtime::rootfs::upper_disk;
use mvm_runtime::sandbox::{ContainerRequest, Launcher, RootfsMount, Sandbox, SandboxRequest};
use mvm_runtime::snapshot::{Going, Memory, Snapshots};
use mvm_runtime::state::{Home, Resource, Wish};
use mvm_runtime::timeline::{Stage, Timeline, Track};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

use crate::say;
use crate::stdio::{self, Streams, Target};

/// The container's id in its sandbox.
const CONTAINER: &str = "main";
/// The directory beside which the disk of its writes lies.
const WRITES: &str = "writes";
/// The sandbox's directory in the container's.
const SANDBOX: &str = "sandbox";

/// What the process left behind is told to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) job: Job,
    /// The snapshot its machine goes on from, by its name and the name of the host in it if that is another.
    pub(crate) from: Option<From>,
    /// Where the stages of its start are written down.
    #[serde(skip)]
    pub(crate) timeline: Timeline,
}

/// A snapshot, and who goes on from it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct From {
    pub(crate) snapshot: String,
    pub(crate) hostname: Option<String>,
    /// How its memory comes.
    pub(crate) memory: Memory,
}

/// Where a container's streams go.
pub(super) enum Audience {
    /// This process's own streams and signals.
    Terminal(SigSet),
    /// The container's log.
    Log,
}

/// Runs a container to its end; its exit code. `ready` is called once, when its process runs.
pub(super) fn own(
    order: &Order,
    home: &Home,
    launcher: &dyn Launcher,
    audience: Audience,
    ready: impl FnOnce(),
) -> Result<u8, Failure> {
    let Order { job, from, timeline } = order;
    let stage = timeline.begin(Track::Host, "take container on");
    let record = job.record();
    let owned = home.admit(&record)?;
    let directory = owned.path().to_owned();
    let owner = Owner::new(home, owned, record)?;
    owner.note(&Resource::Directory { path: directory.join(SANDBOX) })?;
    drop(stage);
    let mut runs = Runs {
        job: Arc::new(job.clone()),
        owner: &owner,
        directory: &directory,
        audience,
        ready: Some(ready),
        from: from.as_ref(),
        timeline,
    };
    loop {
        let result = runs.once(launcher);
        let _stage = timeline.begin(Track::Host, "keep record");
        let code = match &result {
            Ok(code) => *code,
            Err(failure) => exit_code(failure),
        };
        owner.exited(code)?;
        if runs.ready.is_some() {
            // It never ran: there is nothing to look at, and trying again would not help.
            owner.abandon()?;
            return result;
        }
        if owner.again(code)? {
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
    job: Arc<Job>,
    owner: &'a Owner,
    directory: &'a Path,
    audience: Audience,
    /// To be called when its process runs for the first time.
    ready: Option<R>,
    /// What the first of them goes on from.
    from: Option<&'a From>,
    timeline: &'a Timeline,
}

impl<R: FnOnce()> Runs<'_, R> {
    fn once(&mut self, launcher: &dyn Launcher) -> Result<u8, Failure> {
        let job = Arc::clone(&self.job);
        let stage = self.timeline.begin(Track::Host, "plan machine");
        let request = SandboxRequest {
            id: job.name.parse().context(|| format!("{:?} is no name", job.name))?,
            directory: self.directory.join(SANDBOX),
            spec: job.spec.clone(),
            pod: false,
            net: Some(job.net.request()?),
            wish: self.wish()?,
        };
        let (sandbox, process) = match self.from.take() {
            Some(from) => {
                let (sandbox, process) = self.go_on(launcher, &request, from)?;
                (sandbox, Some(process))
            }
            None => (launcher.boot(&request)?, None),
        };
        drop(stage);
        let ended = self.inside(&sandbox, process);
        let stage = self.timeline.begin(Track::Host, "tear down");
        let removed = sandbox.end();
        drop(stage);
        let code = ended?;
        removed.map(|()| code)
    }

    /// It is wanted until somebody stops the container, or asks this process to end.
    fn wish(&self) -> Result<Wish, Failure> {
        let owner = self.owner.clone();
        Ok(match self.audience {
            Audience::Log => Wish::new(move || !owner.is_stopped()),
            Audience::Terminal(_) => {
                let ends = stdio::Ends::new()?;
                Wish::new(move || !owner.is_stopped() && !ends.are_asked_for())
            }
        })
    }

    /// The machine goes on from a snapshot, with the container in it.
    fn go_on(
        &self,
        launcher: &dyn Launcher,
        request: &SandboxRequest,
        from: &From,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let container = self.container()?;
        let entry = Snapshots::of(&state_dir()).get(&from.snapshot)?;
        // Where it is found when the container is started again.
        let writes = upper_disk(&self.directory.join(WRITES))?;
        let going = entry.going(&writes, self.job.stdio(crate::terminal::size), &from.memory)?;
        launcher.restore(request, &container, &Going { hostname: from.hostname.clone(), ..going })
    }

    fn container(&self) -> Result<ContainerRequest, Failure> {
        Ok(ContainerRequest {
            id: CONTAINER.to_owned(),
            bundle: self.directory.to_owned(),
            spec: self.job.spec.clone(),
            rootfs: root(&self.job, self.directory)?,
        })
    }

    /// Has the container's process run, unless it does already, to its end.
    fn inside(&mut self, sandbox: &Arc<dyn Sandbox>, process: Option<Process>) -> Result<u8, Failure> {
        let job = Arc::clone(&self.job);
        let spec = job.spec.process().clone().unwrap_or_default();
        let process = match process {
            Some(process) => process,
            None => {
                let stage = self.timeline.begin(Track::Host, "create container");
                sandbox.create(&self.container()?)?;
                drop(stage);
                let _stage = self.timeline.begin(Track::Host, "start its process");
                sandbox.start(CONTAINER, &spec, job.stdio(crate::terminal::size))?
            }
        };
        let (id, machine) = (process.id, Arc::clone(sandbox));
        let container = CONTAINER.to_owned();
        self.owner.started(Run { sandbox: machine, container, process: id, spec, job: Arc::clone(&job) })?;
        if let Some(ready) = self.ready.take() {
            ready();
        }
        let _stage = self.timeline.begin(Track::Host, "run its process");
        let wait = || {
            let status = sandbox.wait(id);
            self.owner.process_ended();
            let status = status?;
            self.timeline.moment(Track::Host, "its process has ended");
            if job.stats {
                report(&job, self.timeline, sandbox.pid());
            }
            Ok(status.shell_code())
        };
        match &self.audience {
            Audience::Terminal(signals) => {
                let target = Guest { sandbox: Arc::clone(sandbox), process: id };
                stdio::serve(streams(process, self.timeline), *signals, target, wait)
            }
            Audience::Log => log(self.owner, process, wait),
        }
    }
}

/// The image, and what is written over it: on a disk beside `writes`, or in the guest's memory.
fn root(job: &Job, directory: &Path) -> Result<Vec<RootfsMount>, Failure> {
    let writes = directory.join(WRITES);
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

fn streams(process: Process, timeline: &Timeline) -> Streams {
    Streams {
        terminal: process.terminal,
        stdin: process.stdin,
        stdout: process.stdout,
        stderr: process.stderr,
        timeline: timeline.clone(),
    }
}

/// Keeps what the process writes in the container's log.
fn log(owner: &Owner, process: Process, wait: impl FnOnce() -> Result<u8, Failure>) -> Result<u8, Failure> {
    // Nobody writes to it: that it stays open is what `-i` asks for.
    let _stdin = process.stdin;
    let outputs = Outputs::new().context(|| "cannot follow the container's output".to_owned())?;
    std::thread::scope(|scope| {
        let streams = [(process.terminal, "stdout"), (process.stdout, "stdout"), (process.stderr, "stderr")];
        for (stream, name) in streams {
            if let Some(output) = stream.map(|stream| outputs.take(stream)) {
                scope.spawn(move || owner.log().copy(name, output));
            }
        }
        let code = wait();
        outputs.process_ended();
        code
    })
}

fn report(job: &Job, timeline: &Timeline, pid: u32) {
    say(timeline.to_string().trim_end());
    match Cost::of(i32::try_from(pid).unwrap_or(0), job.memory_mib << 20) {
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
pub(crate) fn leave_behind(order: &Order) -> Result<(), Failure> {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    let failed = || "cannot start the process that owns the container".to_owned();
    let program = std::env::current_exe().context(failed)?;
    let (mut report, writer) = std::io::pipe().context(failed)?;
    let mut command = Command::new(program);
    command.arg("own").stdin(Stdio::piped()).stdout(writer).stderr(Stdio::null());
    let mut child = command.spawn().context(failed)?;
    drop(command); // and with it our copy of the report's other end
    let text = serde_json::to_vec(order).context(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(&text).context(failed)?;
    }
    let mut said = String::new();
    report.read_to_string(&mut said).context(failed)?;
    match serde_json::from_str::<Said>(&said) {
        Ok(Said::Runs { stages }) => {
            order.timeline.extend(stages);
            Ok(())
        }
        Ok(Said::Failed { report, exit_code, stages }) => {
            order.timeline.extend(stages);
            Err(Failure::because("cannot run the container", Refused::new(report, exit_code)))
        }
        Err(_) => Err(Failure::new("the process that owns the container ended without a word")),
    }
}

/// What the process left behind tells, once.
#[derive(Serialize, Deserialize)]
enum Said {
    Runs { stages: Vec<Stage> },
    Failed { report: String, exit_code: u8, stages: Vec<Stage> },
}

/// The process left behind: reads its job from standard input.
pub(crate) fn left_behind() -> Result<u8, Failure> {
    nix::unistd::setsid().context(|| "cannot leave the session".to_owned())?;
    let order: Order =
        serde_json::from_reader(std::io::stdin()).context(|| "cannot understand the job".to_owned())?;
    let launcher = super::launcher(&order.timeline);
    let stages = || order.timeline.stages();
    let ready = || tell(&Said::Runs { stages: stages() });
    let result = own(&order, &Home::default_place(), &launcher, Audience::Log, ready);
    if let Err(failure) = &result {
        let exit_code = exit_code(failure);
        tell(&Said::Failed { report: failure.report(), exit_code, stages: stages() });
        return Ok(exit_code);
    }
    result
}

/// Says it on standard output and gives that up: whoever reads waits for its end. The second time nobody does.
fn tell(said: &Said) {
    use std::io::Write;
    if let Ok(text) = serde_json::to_vec(said) {
        let mut stdout = std::io::stdout();
        // What stays in its buffer would go where it leads next.
        let _ = stdout.write_all(&text).and_then(|()| stdout.flush());
    }
    if let Ok(nothing) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(nothing.as_fd());
    }
}

#[cfg(test)]
mod tests;
