//! How a sandbox's machine comes to run: it boots with everything it needs, or goes on from a template into which
//! that is plugged.

use std::sync::Arc;
use std::time::Duration;

use super::machine::{Layout, MachineSandbox};
use super::wiring::{Laid, Wiring};
use crate::agent::{AgentClient, Error};
use crate::container::AGENT_TIME;
use crate::failure::{Context, Failure};
use crate::machine::{Disk, Machine, Plan};
use crate::net::{Net, OpenTap, TapNet, mac_of, open_tap};
use crate::snapshot::SavedSlot;
use crate::state::Ledger;
use crate::template::{self, Choice, Recipe, Source, Template, Ways as _};
use crate::timeline::{CLOCK, Open, PLUG, Track};

/// Time from the start of a machine that goes on to the agent's hello. It has nothing to do but to call: if it does
/// not, booting another still helps.
const RESUME_TIME: Duration = Duration::from_secs(15);

/// A machine that is wanted.
struct Wanted<'a> {
    /// Whose it is.
    sandbox: &'a MachineSandbox,
    /// Where its process is noted.
    ledger: &'a Ledger,
    recipe: Recipe,
    disks: Vec<Disk>,
    /// Its network, which may still be in the making: a machine that goes on needs it last.
    wiring: Laid<'a>,
}

/// A machine whose agent has called and was greeted.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) machine: Machine,
    pub(super) agent: AgentClient,
    /// How its bus is laid out.
    pub(super) layout: Layout,
    /// Disks that are still to be plugged in, and the cards.
    missing: Option<Vec<Disk>>,
}

/// The machine of a sandbox, with these disks, and its network, which is made meanwhile.
pub(super) fn begin(
    sandbox: &MachineSandbox,
    ledger: &Ledger,
    recipe: Recipe,
    disks: Vec<Disk>,
) -> Result<(Begun, Wiring), Failure> {
    std::thread::scope(|scope| {
        let wiring = Laid::by(scope.spawn(|| {
            let _stage = sandbox.timeline.begin(Track::Beside, "set network up");
            sandbox.wire(ledger)
        }));
        let wanted = Wanted { sandbox, ledger, recipe, disks, wiring };
        let begun = wanted.begin(&sandbox.source)?;
        Ok((begun, wanted.wiring.wait()?))
    })
}

impl Wanted<'_> {
    fn begin(&self, source: &Source) -> Result<Begun, Failure> {
        let choosing = self.sandbox.timeline.begin(Track::Host, "choose template");
        let mut ways = Ways { wanted: self, source, choosing: Some(choosing) };
        let mut begun = match (source.choice, self.recipe.key()) {
            (Choice::Never, _) => ways.boot()?,
            (_, Ok(key)) => source.begin(&key, &mut ways)?,
            (Choice::Always, Err(failure)) => return Err(failure),
            (Choice::Auto, Err(failure)) => {
                log::warn!("no template is used: {}", failure.report());
                ways.boot()?
            }
        };
        if let Some(disks) = begun.missing.take() {
            let _stage = self.sandbox.timeline.begin(Track::Host, PLUG);
            // The agent is asked for its clock meanwhile; it has nothing else to do until there is something to find.
            let cards = std::thread::scope(|scope| {
                let clock = scope.spawn(|| {
                    let stage = self.sandbox.timeline.begin(Track::Agent, CLOCK);
                    let doubt = begun.agent.correct_clock()?;
                    stage.detail(format!("±{:.3} ms", doubt.as_secs_f64() * 1e3));
                    Ok::<_, Error>(())
                });
                let cards = self.plug(&begun, &disks);
                match clock.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        log::warn!("the clock of machine {} may be wrong: {error}", self.sandbox.id)
                    }
                    Err(panic) => std::panic::resume_unwind(panic),
                }
                cards
            })?;
            if cards {
                // For a disk the agent looks by itself, when it is asked for it.
                let _stage = self.sandbox.timeline.begin(Track::Agent, "look for cards");
                let found = begun.agent.rescan();
                let found = found.context(|| "cannot have the guest look for its cards".to_owned());
                found.map_err(|failure| begun.machine.explain(failure))?;
            }
        }
        Ok(begun)
    }

    fn boot(&self) -> Result<Begun, Failure> {
        let (disks, nets) = (self.disks.clone(), self.wiring.nets()?);
        let _stage = self.sandbox.timeline.begin(Track::Host, "boot machine");
        self.run(Plan { disks, nets, ..self.recipe.plan(self.sandbox.id.clone()) }, AGENT_TIME)
    }

    fn go_on(&self, template: &Template) -> Result<Begun, Failure> {
        let stage = self.sandbox.timeline.begin(Track::Host, "go on from template");
        stage.detail(template.manifest.key.short());
        let (plan, others) =
            self.recipe.plan_clone(self.sandbox.id.clone(), template.snapshot(), &self.disks);
        let begun = self.run(plan, RESUME_TIME)?;
        if begun.agent.hello().connection == 0 {
            return Err(Failure::new("it did not go on but booted"));
        }
        Ok(Begun { layout: Layout { plugged: true, ..begun.layout }, missing: Some(others), ..begun })
    }

    fn run(&self, plan: Plan, patience: Duration) -> Result<Begun, Failure> {
        let pluggable_mib = self.sandbox.pluggable_mib();
        let limits = Some(self.sandbox.settings.limits.clone());
        let plan = Plan { netns: self.sandbox.netns(), pluggable_mib, limits, ..plan };
        let (machine, agent) = self.sandbox.run(&plan, self.ledger, patience)?;
        let slots = plan.slots.iter().map(SavedSlot::of).collect();
        let layout = Layout { plugged: false, slots, devices: plan.devices };
        Ok(Begun { machine, agent, layout, missing: None })
    }

    /// Plugs these disks and the cards in; whether there are cards.
    fn plug(&self, begun: &Begun, disks: &[Disk]) -> Result<bool, Failure> {
        let control = begun.machine.control();
        let mut cards = false;
        for net in self.wiring.nets()? {
            match &net {
                Net::None => continue,
                Net::Open(tap) => control.attach_net(tap)?,
                Net::Tap(tap) => control.attach_net(&self.open(tap)?)?,
            };
            cards = true;
        }
        for disk in disks {
            control.attach_disk(disk)?;
        }
        Ok(cards)
    }

    /// A tap of this process's name space, with the card that a machine is booted with.
    fn open(&self, tap: &TapNet) -> Result<OpenTap, Failure> {
        let file = match self.sandbox.netns() {
            Some(netns) => netns.run(|| open_tap(&tap.name))?,
            None => open_tap(&tap.name),
        };
        let mac = tap.mac.unwrap_or_else(|| mac_of(&format!("{}/{}", self.sandbox.id, tap.name)));
        Ok(OpenTap { file: Arc::new(file?), mac, mtu: None, only_own_mac: false })
    }
}

/// The ways to a machine that is wanted.
struct Ways<'a, 'scope> {
    wanted: &'a Wanted<'scope>,
    source: &'a Source,
    /// Ends with the choice.
    choosing: Option<Open>,
}

impl Ways<'_, '_> {
    fn chosen(&mut self, what: &str) {
        if let Some(stage) = self.choosing.take() {
            stage.detail(format!("{}: {what}", self.source.choice));
        }
    }
}

impl template::Ways for Ways<'_, '_> {
    type Machine = Begun;

    fn boot(&mut self) -> Result<Begun, Failure> {
        self.chosen("it boots");
        self.wanted.boot()
    }

    fn go_on(&mut self, template: &Template) -> Result<Begun, Failure> {
        self.chosen("it goes on from a template");
        self.wanted.go_on(template)
    }

    fn make(&mut self) -> Result<Template, Failure> {
        self.chosen("a template is made first");
        let _stage = self.wanted.sandbox.timeline.begin(Track::Host, "make template");
        template::make(&self.source.templates, &self.wanted.recipe, false, &mut |_| ())
    }

    fn make_later(&mut self) {
        self.source.make_later(&self.wanted.recipe);
    }
}
