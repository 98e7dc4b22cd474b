//! A machine's place in its network name space: cards for the links there are, one kept for a link that comes late.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;

use mvm_devices::virtio::net::MacAddress;
use mvm_protocol::Configure;

use super::stage::Stages;
use crate::failure::{Context, Failure};
use crate::machine::Control;
use crate::net::{
    Connection, Net, NetRequest, Netns, Network, PortForward, SpareTap, Twin, Watch, forward_localhost,
    mac_of, scan, twin, watch,
};
use crate::state::{Ledger, Resource};

/// A machine's network. Undone when dropped.
#[derive(Debug)]
pub(super) enum Wiring {
    /// One an engine has made, and may change.
    Followed(Followed),
    /// One that was made for it.
    Made(Connection),
}

impl Wiring {
    /// Makes taps for the links of `netns`, or one in reserve for machine `id` if there is no network yet.
    pub(super) fn prepare(netns: &Netns, id: &str, ledger: Ledger) -> Result<Self, Failure> {
        Followed::prepare(netns, id, ledger).map(Self::Followed)
    }

    /// Makes a network for machine `id`.
    pub(super) fn make(net: &NetRequest, id: &str, ledger: &Ledger) -> Result<Self, Failure> {
        net.connect(id, Some(ledger)).map(Self::Made)
    }

    /// The cards the machine is started with.
    pub(super) fn nets(&self) -> Vec<Net> {
        match self {
            Self::Followed(followed) => followed.nets(),
            Self::Made(connection) => connection.nets.clone(),
        }
    }

    /// No card comes or goes as long as this is there.
    pub(super) fn stand_still(&self) -> StandingCards<'_> {
        match self {
            Self::Followed(followed) => {
                let cards = followed.cards.lock().unwrap_or_else(PoisonError::into_inner);
                StandingCards { nets: cards.nets(), held: Some(cards) }
            }
            Self::Made(connection) => StandingCards { nets: connection.nets.clone(), held: None },
        }
    }

    /// What the guest is told at first.
    pub(super) fn configure(&self, hostname: &str) -> Configure {
        match self {
            Self::Followed(followed) => followed.configure(),
            Self::Made(connection) => {
                // An engine gives its containers a file; here nobody else does.
                let hosts = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost {hostname}\n");
                Configure { hosts: Some(hosts), ..connection.place.clone() }
            }
        }
    }

    /// From now on the guest follows what an engine changes; connections to localhost in its name space reach the
    /// guest if `forward`.
    pub(super) fn follow(&mut self, stages: &Arc<Stages>, forward: bool) -> Result<(), Failure> {
        match self {
            Self::Followed(followed) => followed.follow(stages, forward),
            Self::Made(_) => Ok(()),
        }
    }
}

/// A network that another thread makes.
#[derive(Debug)]
pub(super) struct Laid<'scope>(Mutex<Laying<'scope>>);

#[derive(Debug)]
enum Laying<'scope> {
    Goes(ScopedJoinHandle<'scope, Result<Wiring, Failure>>),
    Done(Box<Wiring>),
    /// Somebody was told why.
    Failed,
}

impl<'scope> Laid<'scope> {
    /// It is made by this thread.
    pub(super) fn by(thread: ScopedJoinHandle<'scope, Result<Wiring, Failure>>) -> Self {
        Self(Mutex::new(Laying::Goes(thread)))
    }

    /// The cards of the machine, once it is made.
    ///
    /// # Errors
    /// It could not be made.
    pub(super) fn nets(&self) -> Result<Vec<Net>, Failure> {
        let mut laying = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wiring = std::mem::replace(&mut *laying, Laying::Failed).wait()?;
        let nets = wiring.nets();
        *laying = Laying::Done(Box::new(wiring));
        Ok(nets)
    }

    /// The network itself, once it is made.
    ///
    /// # Errors
    /// It could not be made.
    pub(super) fn wait(self) -> Result<Wiring, Failure> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner).wait()
    }
}

impl Laying<'_> {
    fn wait(self) -> Result<Wiring, Failure> {
        match self {
            Self::Goes(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Self::Done(wiring) => Ok(*wiring),
            Self::Failed => Err(Failure::new("its network could not be made")),
        }
    }
}

/// The cards of a machine, none of which comes or goes.
#[derive(Debug, Default)]
pub(super) struct StandingCards<'a> {
    nets: Vec<Net>,
    /// What an engine changes waits for this.
    held: Option<MutexGuard<'a, Cards>>,
}

impl StandingCards<'_> {
    /// Their hardware addresses, in order.
    pub(super) fn addresses(&self) -> Vec<MacAddress> {
        let mac = |net: &Net| match net {
            Net::Open(tap) => Some(tap.mac),
            Net::Tap(tap) => tap.mac,
            Net::None => None,
        };
        self.nets.iter().filter_map(mac).collect()
    }

    /// Refuses a machine that has a card of a link that its engine has taken away: who goes on would have fewer.
    pub(super) fn check(&self, control: &Control) -> Result<(), Failure> {
        if self.held.is_none() || control.cards()?.len() == self.nets.len() {
            return Ok(());
        }
        Err(Failure::new("a machine that has lost a link of its network cannot be saved").refused())
    }
}

/// The cards for an engine's network and what keeps them up to date.
#[derive(Debug)]
pub(super) struct Followed {
    netns: Netns,
    /// What there was when the machine was started.
    known: Network,
    cards: Arc<Mutex<Cards>>,
    _watch: Option<Watch>,
    _forward: Option<PortForward>,
}

/// The taps of a machine's cards.
#[derive(Debug)]
pub(super) struct Cards {
    /// Where they are noted.
    ledger: Ledger,
    /// Those that stand for a link.
    twins: Vec<Twin>,
    /// One that waits for a link.
    spare: Option<SpareTap>,
}

impl Followed {
    fn prepare(netns: &Netns, id: &str, ledger: Ledger) -> Result<Self, Failure> {
        let known = scan(netns).context(|| format!("cannot read the network of {netns}"))?;
        let cards = if known.is_usable() {
            let twins = known.links.iter().map(|link| twin(netns, link, Some(&ledger)));
            Cards { twins: twins.collect::<Result<_, _>>()?, spare: None, ledger }
        } else {
            Cards { twins: Vec::new(), spare: Some(SpareTap::make(netns, mac_of(id))?), ledger }
        };
        let cards = Arc::new(Mutex::new(cards));
        Ok(Self { netns: netns.clone(), known, cards, _watch: None, _forward: None })
    }

    fn nets(&self) -> Vec<Net> {
        self.cards.lock().unwrap_or_else(PoisonError::into_inner).nets()
    }

    fn configure(&self) -> Configure {
        if self.known.is_usable() { self.known.configure() } else { Configure::default() }
    }

    fn follow(&mut self, stages: &Arc<Stages>, forward: bool) -> Result<(), Failure> {
        let (netns, cards, told) = (self.netns.clone(), Arc::clone(&self.cards), Arc::clone(stages));
        let report = move |network: Network| {
            let mut cards = cards.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(failure) = cards.follow(&netns, network, &told) {
                log::warn!("{}", failure.report());
            }
        };
        self._watch = Some(watch(&self.netns, self.known.clone(), report)?);
        if forward {
            if let Some(path) = self.netns.path() {
                let cards = self.cards.lock().unwrap_or_else(PoisonError::into_inner);
                cards.ledger.note(&Resource::Forward { netns: path.to_path_buf() })?;
            }
            let told = Arc::clone(stages);
            let connect = move |port| {
                let live = told.live().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
                live.agent.forward(port).map_err(io::Error::other)
            };
            match forward_localhost(&self.netns, connect) {
                Ok(forward) => self._forward = Some(forward),
                Err(failure) => log::warn!("no port is forwarded into {}: {}", self.netns, failure.report()),
            }
        }
        Ok(())
    }
}

impl Cards {
    fn nets(&self) -> Vec<Net> {
        self.twins.iter().map(Twin::net).chain(self.spare.iter().map(SpareTap::net)).collect()
    }

    /// Gives the guest a card for each link that is new, and tells it of everything.
    fn follow(&mut self, netns: &Netns, mut network: Network, stages: &Stages) -> Result<(), Failure> {
        let Some(live) = stages.live() else { return Ok(()) };
        if !network.is_usable() {
            return Ok(());
        }
        self.twins.retain(|twin| network.links.iter().any(|link| link.name == twin.link()));
        let control = live.control();
        let mut attached = false;
        for link in &mut network.links {
            if self.twins.iter().any(|twin| twin.link() == link.name) {
                continue;
            }
            let made = match self.spare.take() {
                Some(spare) => spare.connect(link, Some(&self.ledger))?,
                None => {
                    attached = true;
                    plug(&control, twin(netns, link, Some(&self.ledger))?)?
                }
            };
            link.mac = made.mac();
            self.twins.push(made);
        }
        if attached {
            live.agent.rescan().context(|| "cannot have the guest look for its new card".to_owned())?;
        }
        live.agent
            .configure(network.configure())
            .context(|| "cannot tell the guest of its network".to_owned())
    }
}

/// Gives a running machine the card of a twin.
fn plug(control: &Control, twin: Twin) -> Result<Twin, Failure> {
    if let Net::Open(tap) = twin.net() {
        control.attach_net(&tap)?;
    }
    Ok(twin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Choice, TapNet};

    #[test]
    fn what_another_thread_makes_is_waited_for_and_fails_with_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(dir.path()).unwrap();
        let tap = TapNet { name: "t0".into(), mac: None, address: None, gateway: None };
        let request = NetRequest { choice: Choice::Tap(tap), ..NetRequest::default() };
        std::thread::scope(|scope| {
            let laid = Laid::by(scope.spawn(|| Wiring::make(&request, "m", &ledger)));
            let nets = laid.nets().unwrap();
            assert!(matches!(&nets[..], [Net::Tap(tap)] if tap.name == "t0"), "{nets:?}");
            assert_eq!(laid.nets().unwrap().len(), 1);
            assert_eq!(laid.wait().unwrap().nets().len(), 1);

            let laid = Laid::by(scope.spawn(|| Err(Failure::new("no bridge"))));
            assert!(laid.nets().unwrap_err().report().contains("no bridge"));
            assert!(laid.wait().is_err());
        });
    }
}
