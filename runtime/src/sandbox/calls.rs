//! What an engine asks of a sandbox, passed on to the machine and its agent.

use mvm_protocol::{ExitStatus, FailureKind, Get, Got, Place, Put, RootStats, SignalTarget, WindowSize};
use oci_spec::runtime::{LinuxResources, Process as OciProcess};

use super::machine::MachineSandbox;
use super::{ContainerRequest, Sandbox, member};
use crate::agent::{Error as AgentError, Process, ProcessSpec, StdioSpec};
use crate::container::{Timeline, start_failure};
use crate::failure::{Context, Failure};
use crate::spec;

impl MachineSandbox {
    /// The name of a container in the guest.
    fn root_of(&self, container: &str) -> Result<String, Failure> {
        let members = self.members();
        let member = members.get(container);
        member.map(|member| member.root.clone()).ok_or_else(|| no_container(container))
    }

    /// A place that is a container is called by its name in the guest from here on.
    fn name_in_guest(&self, place: &mut Place) -> Result<(), Failure> {
        if let Place::Root(container) = place {
            *container = self.root_of(container)?;
        }
        Ok(())
    }

    fn freeze(&self, container: &str, frozen: bool) -> Result<(), Failure> {
        let root = self.root_of(container)?;
        let what = if frozen { "pause" } else { "resume" };
        self.stages
            .running()?
            .agent
            .freeze(&root, frozen)
            .context(|| format!("cannot {what} container {container}"))
    }
}

fn no_container(id: &str) -> Failure {
    Failure::new(format!("there is no container {id} in the sandbox"))
}

impl Sandbox for MachineSandbox {
    fn pid(&self) -> u32 {
        self.stages.live().map_or(0, |live| live.pid)
    }

    fn create(&self, container: &ContainerRequest) -> Result<(), Failure> {
        member::make(self, container)
    }

    fn start(&self, container: &str, process: &OciProcess, stdio: StdioSpec) -> Result<Process, Failure> {
        let live = self.stages.running()?;
        let spec = {
            let members = self.members();
            let member = members.get(container).ok_or_else(|| no_container(container))?;
            let part = spec::process(process, &member.profile)?;
            ProcessSpec {
                root: Some(member.root.clone()),
                args: part.args,
                env: part.env,
                cwd: part.cwd,
                user: part.user,
                stdio,
                pid_namespace: member.pid_namespace(),
                oom_score_adj: part.oom_score_adj,
                confinement: part.confinement,
            }
        };
        let program = spec.args.first().cloned().unwrap_or_default();
        let process = live.agent.start(spec).map_err(|error| start_failure(&program, error))?;
        if let Some(member) = self.members().get_mut(container) {
            member.started(process.id);
        }
        self.reach("process runs");
        Ok(process)
    }

    fn wait(&self, process: u64) -> Result<ExitStatus, Failure> {
        let live = match self.stages.live_or_last() {
            Some(live) => live,
            None => self.stages.running()?,
        };
        live.agent.wait(process, None).context(|| format!("cannot wait for process {process}"))
    }

    fn signal(&self, process: u64, signal: i32, target: SignalTarget) -> Result<(), Failure> {
        match self.stages.running()?.agent.signal(process, signal, target) {
            Err(AgentError::Refused { kind: FailureKind::NotFound, .. }) => Ok(()),
            other => other.context(|| format!("cannot send signal {signal} to process {process}")),
        }
    }

    fn resize(&self, process: u64, size: WindowSize) -> Result<(), Failure> {
        let live = self.stages.running()?;
        live.agent
            .resize(process, size)
            .context(|| format!("cannot resize the terminal of process {process}"))
    }

    fn close_stdin(&self, process: u64) -> Result<(), Failure> {
        let live = self.stages.running()?;
        live.agent.close_stdin(process).context(|| format!("cannot close the input of process {process}"))
    }

    fn pause(&self, container: &str) -> Result<(), Failure> {
        self.freeze(container, true)
    }

    fn resume(&self, container: &str) -> Result<(), Failure> {
        self.freeze(container, false)
    }

    fn stats(&self, container: &str) -> Result<RootStats, Failure> {
        let root = self.root_of(container)?;
        let live = self.stages.running()?;
        live.agent.root_stats(&root).context(|| format!("cannot read the use of container {container}"))
    }

    fn update(&self, container: &str, resources: &LinuxResources) -> Result<(), Failure> {
        let root = self.root_of(container)?;
        let limits = spec::limits(resources, self.size.cpus.get())?;
        let live = self.stages.running()?;
        live.agent
            .update(&root, limits)
            .context(|| format!("cannot change the limits of container {container}"))
    }

    fn put(&self, mut put: Put) -> Result<(), Failure> {
        self.name_in_guest(&mut put.place)?;
        self.stages.running()?.agent.put(put).context(|| "cannot put files into the guest".to_owned())
    }

    fn get(&self, mut get: Get) -> Result<Got, Failure> {
        self.name_in_guest(&mut get.place)?;
        let what = format!("cannot read /{} of the container", get.path);
        self.stages.running()?.agent.get(get).context(|| what)
    }

    fn memory_kills(&self, container: &str) -> u64 {
        let Ok(root) = self.root_of(container) else { return 0 };
        self.stages.live_or_last().map_or(0, |live| live.agent.memory_kills(&root))
    }

    fn remove(&self, container: &str) -> Result<(), Failure> {
        member::remove(self, container)
    }

    fn timeline(&self) -> Option<Timeline> {
        self.timeline().clone()
    }

    fn wait_machine(&self) -> String {
        self.stages.wait()
    }

    fn end(&self) -> Result<(), Failure> {
        let ended = self.end_machine();
        let cleaned = self.clean_up();
        ended.and(cleaned)
    }
}
