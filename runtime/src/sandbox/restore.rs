//! A sandbox of a machine that goes on from where another was saved, with the container in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mvm_protocol::Configure;
use mvm_vmm::snapshot::Needed;

use super::ContainerRequest;
use super::growth::Growth;
use super::machine::{Layout, MachineSandbox};
use super::member::Member;
use super::stage::Live;
use crate::agent::{AgentClient, Process};
use crate::container::AGENT_TIME;
use crate::failure::{Context, Failure};
use crate::machine::{DeviceName, Machine, Origin, Plan};
use crate::net::{Net, OpenTap};
use crate::rootfs::Prepared;
use crate::snapshot::{Going, SavedMachine};
use crate::spec::{MountPart, translate};
use crate::state::Ledger;

/// Largest packet in bytes of a card that nothing is ever sent through.
const ANY_MTU: u16 = 1500;
/// How long the guest may take for all of what it is asked once for each of many: a checkpoint says how many.
const TIME_FOR_ALL: Duration = Duration::from_secs(15);

/// What the container's processes do once the machine goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// They do too.
    GoOn,
    /// They stand still until the container is resumed.
    Wait,
}

/// Has the machine go on; the container's first process, with its streams opened anew. Its sandbox must be new. Nothing
/// runs if that fails, and what it has on the host is removed with it.
pub(super) fn restore(
    sandbox: &mut MachineSandbox,
    container: &ContainerRequest,
    going: &Going,
    (rootfs, then): (Prepared, Then),
) -> Result<Process, Failure> {
    sandbox.go_on_as(&going.machine);
    let translated = translate(&container.spec, &container.bundle, going.machine.cpus.get())?;
    if let Some(MountPart::Host(mount)) = translated.mounts.iter().find(|it| matches!(it, MountPart::Host(_)))
    {
        let why = format!("{} is a volume, and no snapshot has those", mount.target);
        return Err(Failure::new(why).refused());
    }
    let _turn = sandbox.wait_for_turn()?;
    let ledger = Ledger::of(&sandbox.directory)?;
    let mut wiring = sandbox.wire(&ledger)?;
    let (cards, saved) = (wiring.nets().len(), going.machine.cards.len());
    if cards != saved {
        let why = format!("it was saved with {saved} network cards, and is to have {cards}");
        return Err(Failure::new(why).refused());
    }
    let (slots, disks) = going.machine.lay(&going.disks);
    let plan = Plan {
        cpus: going.machine.cpus,
        memory: going.machine.memory_mib,
        pluggable_mib: sandbox.pluggable_mib(),
        plugs_mib: sandbox.plugs_mib,
        disks,
        slots,
        nets: wiring.nets().into_iter().map(most_able).collect(),
        netns: sandbox.netns(),
        devices: going.machine.devices.clone(),
        plugged: going.machine.plugged,
        limits: Some(sandbox.settings.limits.clone()),
        ..Plan::new(sandbox.id.clone(), Origin::Saved(going.snapshot.clone()))
    };
    let (mut machine, agent) = sandbox.run(&plan, &ledger, AGENT_TIME)?;
    if sandbox.plugs_mib.is_some() {
        let growth = Growth::going(machine.control(), sandbox.size.memory);
        *sandbox.growth() = growth.map_err(|failure| machine.explain(failure))?;
    }
    let (process, others) = take_over(&agent, going).map_err(|failure| machine.explain(failure))?;
    replace_cards(&agent, &machine, &wiring.nets(), going).map_err(|failure| machine.explain(failure))?;
    let place = Configure { hostname: Some(sandbox.hostname()), ..wiring.configure(&sandbox.hostname()) };
    settle(&agent, place, going).map_err(|failure| machine.explain(failure))?;
    let live = begin(sandbox, machine, agent, (&going.machine.root, &others, then))?;
    if let Some(path) = &going.record {
        let (control, pid) = (live.control(), live.machine().pid());
        // It is there to be quicker the next time, and this one runs.
        if let Err(failure) = control.record_working_set(pid, Needed::Touched, path) {
            log::warn!("{}", failure.report());
        }
    }
    wiring.follow(&sandbox.stages, false)?;
    sandbox.keep_wiring(wiring);
    let SavedMachine { plugged, slots, devices, .. } = going.machine.clone();
    sandbox.set_layout(Layout { plugged, slots, devices });
    let resources = container.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    sandbox.members().insert(container.id.clone(), Member::going(going, translated, (rootfs, resources)));
    Ok(process)
}

/// Takes the container's process over, and lets the guest's disks and streams go on; all processes are stopped still.
/// Those that somebody had run in it have nobody any more to read what they write: they are killed, and returned.
fn take_over(agent: &AgentClient, going: &Going) -> Result<(Process, Vec<u64>), Failure> {
    if agent.hello().connection == 0 {
        return Err(Failure::new("it did not go on but booted"));
    }
    let found = agent.take_over().context(|| "cannot ask the guest for its processes".to_owned())?;
    if !found.iter().any(|entry| entry.process == going.process) {
        return Err(Failure::new("the container's process had ended when it was saved"));
    }
    let opened = agent.attach(going.process, going.stdio);
    let process = opened.context(|| "cannot open the streams of the container's process".to_owned())?;
    agent.release().context(|| "cannot let the guest go on".to_owned())?;
    let others: Vec<_> = found.iter().filter(|entry| entry.process != going.process).collect();
    let running = others.iter().filter(|entry| entry.exited.is_none()).map(|entry| entry.process);
    let killed = agent.kill_by(running, Instant::now() + TIME_FOR_ALL);
    killed.context(|| "cannot end a process that was run in the container".to_owned())?;
    Ok((process, others.iter().map(|entry| entry.process).collect()))
}

/// A card that offers whatever the one that was saved may have been accepted with. It is replaced at once.
fn most_able(net: Net) -> Net {
    match net {
        Net::Open(tap) => Net::Open(OpenTap { mtu: tap.mtu.or(Some(ANY_MTU)), ..tap }),
        other => other,
    }
}

/// Puts a new card in the place of each that the guest has: with an address that is nobody else's, and without any
/// address or route of the machine that was saved.
fn replace_cards(agent: &AgentClient, machine: &Machine, nets: &[Net], going: &Going) -> Result<(), Failure> {
    if nets.is_empty() {
        return Ok(());
    }
    let control = machine.control();
    let end = Instant::now() + TIME_FOR_ALL;
    for card in &going.machine.cards {
        let ejected = agent.eject_card_by(card.bytes(), end);
        ejected.context(|| format!("cannot have the guest let go of its card {card}"))?;
    }
    for number in control.cards()? {
        control.detach(DeviceName::Number(number), false)?;
    }
    for net in nets {
        if let Net::Open(tap) = net {
            control.attach_net(tap)?;
        }
    }
    agent.rescan().context(|| "cannot have the guest look for its cards".to_owned())
}

/// Tells the guest where and who it is.
fn settle(agent: &AgentClient, place: Configure, going: &Going) -> Result<(), Failure> {
    if let Err(error) = agent.correct_clock() {
        log::warn!("the clock of the machine may be wrong: {error}");
    }
    agent.configure(place).context(|| "cannot configure the guest".to_owned())?;
    let named = agent.rename(&going.machine.root, going.hostname.as_deref());
    named.context(|| "cannot tell the container who it is".to_owned())
}

/// From here on the machine's end is waited for, and the container's processes run.
fn begin(
    sandbox: &MachineSandbox,
    machine: Machine,
    agent: AgentClient,
    (root, others, then): (&str, &[u64], Then),
) -> Result<Arc<Live>, Failure> {
    let live = sandbox.stages.start(machine, agent)?;
    if then == Then::GoOn {
        let thawed = live.agent.freeze(root, false);
        thawed.context(|| "cannot let the container's processes go on".to_owned())?;
    }
    // They were killed, and nobody is there who wants to know how they end.
    others.iter().for_each(|other| live.agent.abandon(*other));
    Ok(live)
}
