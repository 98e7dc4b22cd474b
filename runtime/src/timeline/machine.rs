//! The start of a machine until its agent was greeted, with what it and its guest tell of themselves.

use std::time::Duration;

use mvm_protocol::{Hello, Identity};
use mvm_vmm::status::{Stages, now};

use super::{GREET, GUEST, SPAWN, Timeline, Track};
use crate::agent::AgentClient;
use crate::failure::Failure;
use crate::machine::Machine;

/// Time for events that are on their way.
const EVENT_TIME: Duration = Duration::from_secs(1);

impl Timeline {
    /// A machine's process was started.
    pub(crate) fn spawned(&self, machine: &Machine) {
        drop(self.begin_at(Track::Host, SPAWN, machine.spawned_ns()));
    }

    /// The agent of a machine, as [`Machine::agent`] has it. What the machine has told is written down also if that
    /// fails.
    pub(crate) fn agent(
        &self,
        machine: &mut Machine,
        identity: Identity,
        deadline: Duration,
    ) -> Result<AgentClient, Failure> {
        let begun = now();
        let agent = machine.agent(identity, deadline);
        if agent.is_ok() {
            self.moment(Track::Agent, "identity is given");
        }
        let called = machine.called_ns();
        self.note(Track::Host, "wait for the agent's call", (begun, called.unwrap_or_else(now)));
        let _greet = called.map(|called| self.begin_at(Track::Host, GREET, called));
        let heard = self.machine(machine);
        let agent = agent?;
        heard?;
        self.guest(machine, &agent);
        Ok(agent)
    }

    /// Adds what a machine's process has told of its start, and has the guest's stage end with it.
    fn machine(&self, machine: &mut Machine) -> Result<(), Failure> {
        // Of a machine whose agent has called these events are on their way or here.
        let heard = machine.hear_of_start(EVENT_TIME);
        if let Some(stages) = machine.stages() {
            for (name, span) in process(machine.spawned_ns(), stages) {
                self.note(Track::Machine, name, span);
            }
        }
        if let Some(run_ns) = guest_since(machine) {
            machine.hold(self.begin_at(Track::Machine, GUEST, run_ns));
        }
        if let Some(first) = machine.first_exit() {
            self.note(Track::Machine, "first KVM_RUN", first);
        }
        heard
    }

    /// Adds what is known of the guest until it called: by its own clock, and as it was seen from here.
    fn guest(&self, machine: &Machine, agent: &AgentClient) {
        let (Some(run_ns), Some(called_ns)) = (guest_since(machine), machine.called_ns()) else { return };
        let booted = agent.hello().connection == 0;
        let seen = if booted { "boot until the agent calls" } else { "go on until the agent calls" };
        self.note(Track::Agent, seen, (run_ns, called_ns));
        if let Some(stages) = by_its_clock(agent.hello(), run_ns, (called_ns, agent.heard_ns())) {
            let doubt = agent.heard_ns().saturating_sub(called_ns).div_ceil(2) as f64 / 1e6;
            for (name, (begin, end)) in stages {
                let open = self.begin_at(Track::Guest, name, begin);
                open.detail(format!("by the guest's clock, ±{doubt:.2} ms"));
                open.end_at(end);
            }
        }
    }
}

/// When the guest ran first, as far as that is known: the process tells it when the guest has first returned.
fn guest_since(machine: &Machine) -> Option<u64> {
    let ready = || machine.stages().map(|stages| stages.vcpus_ns);
    machine.first_exit().map(|(run_ns, _)| run_ns).or_else(ready)
}

/// A machine's process until its CPUs are ready.
fn process(spawned_ns: u64, stages: &Stages) -> [(&'static str, (u64, u64)); 6] {
    let Stages { entered_ns, config_ns, loaded_ns, vm_ns, devices_ns, vcpus_ns } = *stages;
    [
        ("execute program", (spawned_ns, entered_ns)),
        ("read configuration", (entered_ns, config_ns)),
        ("map memory and what is loaded into it", (config_ns, loaded_ns)),
        ("give it to KVM", (loaded_ns, vm_ns)),
        ("make devices", (vm_ns, devices_ns)),
        ("make CPUs", (devices_ns, vcpus_ns)),
    ]
}

type Span = (&'static str, (u64, u64));

/// The agent's stamps on the host's clock. `None` if they are of another machine's boot, or not to be believed.
///
/// The agent has stamped its call between the moment the host saw it and that when the host had read its hello: the
/// middle of the two is taken for it.
fn by_its_clock(hello: &Hello, run_ns: u64, (called_ns, heard_ns): (u64, u64)) -> Option<[Span; 3]> {
    if hello.connection != 0 {
        return None;
    }
    let dialled = called_ns.checked_add(heard_ns.checked_sub(called_ns)? / 2)?;
    let at = |stamp: u64| dialled.checked_sub(hello.stages.dialled.monotonic_ns.checked_sub(stamp)?);
    // What the host knows for certain bounds what the guest says.
    let begun = at(hello.stages.agent_start.monotonic_ns)?.max(run_ns);
    let mounted = at(hello.stages.mounts_done.monotonic_ns)?.max(run_ns);
    let in_order = run_ns <= begun && begun <= mounted && mounted <= dialled;
    in_order.then_some([
        ("boot kernel", (run_ns, begun)),
        ("make the agent's mounts", (begun, mounted)),
        ("dial the host", (mounted, dialled)),
    ])
}

#[cfg(test)]
mod tests {
    use mvm_protocol::{MAGIC, StageTimes, Stamp, VERSION};

    use super::*;

    fn hello(connection: u32, [agent_start, mounts_done, dialled]: [u64; 3]) -> Hello {
        let stamp = |monotonic_ns| Stamp { monotonic_ns, boottime_ns: 0 };
        Hello {
            magic: MAGIC,
            version: VERSION,
            agent_version: String::new(),
            kernel_release: String::new(),
            connection,
            stages: StageTimes {
                agent_start: stamp(agent_start),
                mounts_done: stamp(mounts_done),
                dialled: stamp(dialled),
            },
        }
    }

    #[test]
    fn a_guests_stamps_are_put_where_its_call_was_seen() {
        let stages = by_its_clock(&hello(0, [30, 35, 40]), 1000, (1050, 1060)).unwrap();
        let spans = stages.map(|(_, span)| span);
        assert_eq!(spans, [(1000, 1045), (1045, 1050), (1050, 1055)]);
    }

    #[test]
    fn a_guest_did_nothing_before_it_ran() {
        let stages = by_its_clock(&hello(0, [10, 99, 100]), 1000, (1050, 1060)).unwrap();
        assert_eq!(stages.map(|(_, span)| span), [(1000, 1000), (1000, 1054), (1054, 1055)]);
    }

    #[test]
    fn a_clone_tells_of_its_templates_boot_and_a_liar_of_none() {
        assert!(by_its_clock(&hello(1, [30, 35, 40]), 1000, (1050, 1060)).is_none());
        for stamps in [[35, 30, 40], [50, 35, 40], [0, 0, u64::MAX], [u64::MAX, 0, 0]] {
            assert!(by_its_clock(&hello(0, stamps), 1000, (1050, 1060)).is_none(), "{stamps:?}");
        }
        assert!(by_its_clock(&hello(0, [30, 35, 40]), 1000, (1060, 1050)).is_none());
        assert!(by_its_clock(&hello(0, [30, 35, 40]), 2000, (1050, 1060)).is_none());
    }
}
