//! What an engine asks of a sandbox, passed on to the machine and its agent.

use std::path::Path;
use std::sync::PoisonError;
use std::time::Instant;

use mvm_devices::throttle::Limit;
use mvm_protocol::{ExitStatus, FailureKind, Get, Got, Place, Put, RootStats, SignalTarget, WindowSize};
use oci_spec::runtime::{LinuxResources, Process as OciProcess};

use super::ending::ASKING_TIME;
use super::limits::Sizes;
use super::machine::MachineSandbox;
use super::member::Member;
use super::save::Saving;
use super::{CheckpointRequest, ContainerRequest, MemoryKill, Sandbox, checkpoint, member, save};
use crate::agent::{Error as AgentError, Process, ProcessSpec, StdioSpec};
use crate::container::start_failure;
use crate::failure::{Context, Failure};
use crate::snapshot::{BaseMemory, SavedMachine};
use crate::spec;
use crate::timeline::{START, Timeline, Track};

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
        self.stages.live_or_last().map_or(0, |live| live.pid)
    }

    fn create(&self, container: &ContainerRequest) -> Result<(), Failure> {
        member::make(self, container).map_err(|failure| self.stages.explain(failure))
    }

    fn start(&self, container: &str, process: &OciProcess, stdio: StdioSpec) -> Result<Process, Failure> {
        let live = self.stages.running()?;
        let (spec, first) = {
            let members = self.members();
            let member = members.get(container).ok_or_else(|| no_container(container))?;
            let part = spec::process(process, &member.profile)?;
            let spec = ProcessSpec {
                root: Some(member.root.clone()),
                args: part.args,
                env: part.env,
                cwd: part.cwd,
                user: part.user,
                stdio,
                pid_namespace: member.pid_namespace(),
                oom_score_adj: part.oom_score_adj,
                confinement: part.confinement,
            };
            (spec, member.is_unstarted())
        };
        // Later ones are no part of the container's start.
        let _stage = first.then(|| self.timeline.begin(Track::Agent, START));
        let program = spec.args.first().cloned().unwrap_or_default();
        let started = live.agent.start(spec).map_err(|error| start_failure(&program, error));
        let process = started.map_err(|failure| self.stages.explain(failure))?;
        if let Some(member) = self.members().get_mut(container) {
            member.started(process.id);
        }
        Ok(process)
    }

    fn wait(&self, process: u64) -> Result<ExitStatus, Failure> {
        let live = match self.stages.live_or_last() {
            Some(live) => live,
            None => self.stages.running()?,
        };
        let waited = live.agent.wait(process, None);
        let waited = waited.context(|| format!("cannot wait for process {process}"));
        waited.map_err(|failure| self.stages.explain(failure))
    }

    fn abandon(&self, process: u64) {
        if let Some(live) = self.stages.live_or_last() {
            live.agent.abandon(process);
        }
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
        let failed = || format!("cannot change the limits of container {container}");
        let root = self.root_of(container)?;
        // Held to the end: what is there for one limit is not taken back for another.
        let mut growth = self.growth();
        let has = |member: &Member| (member.sizes, member.memory);
        let (made_with, before) = self.members().get(container).map(has).unwrap_or_default();
        let sizes = Sizes::of(Some(resources));
        sizes.fit(&self.most(), &made_with).context(failed)?;
        let limits = spec::limits(resources, self.size.cpus.get()).context(failed)?;
        let live = self.stages.running()?;
        if !Sizes::name_memory(resources) {
            return live.agent.update(&root, limits).context(failed);
        }
        // First there is memory, then it may be used. A limit that is lifted leaves the machine what it has.
        let limit = if sizes.memory == 0 { before } else { sizes.memory };
        if limit > before
            && let Err(failure) = self.grow(&mut growth, &live, self.memory_with(container, limit))
        {
            if sizes.memory > self.size.memory.bytes() {
                // A container that went meanwhile has left that to whoever changes limits.
                self.shrink(&mut growth, &live);
                return Err(Failure::because(failed(), failure));
            }
            // The machine has as much as this container may have; it is only less than all of them may together.
            log::warn!("{}", failure.report());
        }
        let updated = live.agent.update(&root, limits).context(failed);
        if let (Ok(()), Some(member)) = (&updated, self.members().get_mut(container)) {
            member.memory = limit;
        }
        self.shrink(&mut growth, &live);
        updated
    }

    fn limit(&self, limits: &[Limit]) -> Result<(), Failure> {
        let live = self.stages.running()?;
        limits.iter().try_for_each(|limit| live.control().limit(limit))
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

    fn on_memory_kill(&self, heard: MemoryKill) {
        if let Some(live) = self.stages.live_or_last() {
            live.agent.on_memory_kill(move |_, _| heard());
        }
    }

    fn answers(&self) -> bool {
        self.stages.live().is_some_and(|live| live.agent.answers())
    }

    fn remove(&self, container: &str) -> Result<(), Failure> {
        member::remove(self, container)
    }

    fn save(
        &self,
        container: &str,
        directory: &Path,
        base: Option<&BaseMemory>,
    ) -> Result<SavedMachine, Failure> {
        let saving = Saving { directory, with_layers: true, paused: false, base };
        save::save(self, container, &saving).map_err(|failure| self.stages.explain(failure))
    }

    fn checkpoint(&self, container: &str, request: &CheckpointRequest) -> Result<(), Failure> {
        checkpoint::write(self, container, request).map_err(|failure| self.stages.explain(failure))
    }

    fn timeline(&self) -> Option<Timeline> {
        Some(self.timeline.clone())
    }

    fn kill_machine(&self) {
        if let Some(live) = self.stages.live()
            && let Err(failure) = self.stages.kill(&live)
        {
            log::error!("{}", failure.report());
        }
    }

    fn wait_machine(&self) -> String {
        self.stages.wait()
    }

    fn end(&self) -> Result<(), Failure> {
        let _alone = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = self.end_machine(Instant::now() + ASKING_TIME);
        let cleaned = self.clean_up();
        ended.and(cleaned)
    }
}
