//! A sandbox that is a machine: planned, booted, given containers, ended.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mvm_devices::virtio::DeviceSpec;
use mvm_protocol::Configure;
use mvm_vmm::config::MachineId;
use oci_spec::runtime::Spec;

use super::beginning::{Begun, begin};
use super::growth::Growth;
use super::launcher::MachineLauncher;
use super::member::Member;
use super::shares::Shares;
use super::stage::{Live, Stages};
use super::updates::Updates;
use super::wiring::Wiring;
use super::{SandboxRequest, cgroup};
use crate::agent::{AgentClient, fresh_identity};
use crate::failure::{Context, Failure};
use crate::machine::{Disk, Machine, Plan, prepare};
use crate::net::{Choice, NetRequest, Netns};
use crate::rootfs::{UPPER_BYTES, Upper};
use crate::snapshot::SavedSlot;
use crate::spec::{Host, Settings, Size, size};
use crate::state::{Home, Ledger, Resource, Turn, Turns, Wish};
use crate::template::{Recipe, Source, Templates};
use crate::timeline::{Timeline, Track};

/// Memory for the mount points that are missing in a root that is read-only, in bytes.
const MOUNT_POINTS: u64 = 4 << 20;
/// Log of the machine's process, in its sandbox's directory.
const LOG: &str = "machine.log";

/// A sandbox that is a machine.
#[derive(Debug)]
pub(super) struct MachineSandbox {
    pub(super) id: MachineId,
    pub(super) state: PathBuf,
    pub(super) directory: PathBuf,
    pub(super) settings: Settings,
    allowed_annotations: Vec<String>,
    pub(super) size: Size,
    /// What the host can give it.
    pub(super) host: Host,
    /// MiB that its device can plug, if it goes on with one.
    pub(super) plugs_mib: Option<u64>,
    /// The memory it was given beyond its size.
    pub(super) growth: Mutex<Growth>,
    place: Place,
    /// Its cards, while it runs.
    wiring: Mutex<Option<Wiring>>,
    /// Where its machine comes from.
    pub(super) source: Source,
    pod: bool,
    /// Whether it is still wanted.
    wish: Wish,
    hostname: Option<String>,
    /// Where its process is accounted.
    cgroup: Option<PathBuf>,
    pub(super) stages: Arc<Stages>,
    /// How its bus is laid out, once it is started.
    layout: OnceLock<Layout>,
    pub(super) timeline: Timeline,
    /// Held while a container is made or removed: its disks and shares are one change.
    pub(super) changing: Arc<Mutex<Shares>>,
    /// Watches what was copied, from the first copy on.
    updates: Mutex<Option<Updates>>,
    members: Mutex<BTreeMap<String, Member>>,
    /// Held while it is ended: whoever ends it a second time waits for the first.
    pub(super) ending: Mutex<()>,
}

/// What is where on a machine's bus.
#[derive(Debug)]
pub(super) struct Layout {
    /// Disks and cards come after all else.
    pub(super) plugged: bool,
    /// Its places for disks, with what was in them when it was started.
    pub(super) slots: Vec<SavedSlot>,
    /// What there is besides disks, cards and the vsock.
    pub(super) devices: Vec<DeviceSpec>,
}

/// Where a machine's network is.
#[derive(Debug)]
enum Place {
    /// In a name space that an engine has made, where its process lives too.
    Given(Netns),
    /// Wherever it is made.
    Made(NetRequest),
}

impl MachineSandbox {
    /// Plans a machine; nothing is made on the host but a network name space that ends with it.
    pub(super) fn new(launcher: &MachineLauncher, request: &SandboxRequest) -> Result<Self, Failure> {
        let allowed_annotations = launcher.allowed_annotations.clone();
        let settings = Settings::of(request.spec.annotations().as_ref(), &allowed_annotations)?;
        Ok(Self {
            id: request.id.clone(),
            state: launcher.state.clone(),
            directory: request.directory.clone(),
            size: size(&request.spec, &settings, launcher.host),
            host: launcher.host,
            plugs_mib: None,
            growth: Mutex::default(),
            place: match &request.net {
                Some(net) => Place::Made(net.clone()),
                None => Place::Given(Netns::of(&request.spec)?),
            },
            wiring: Mutex::default(),
            source: Source {
                choice: settings.template.unwrap_or(launcher.template),
                templates: Templates::of(&launcher.state),
                maker: launcher.maker.clone(),
            },
            layout: OnceLock::new(),
            timeline: launcher.timeline.clone().unwrap_or_default(),
            pod: request.pod,
            wish: request.wish.clone(),
            hostname: request.spec.hostname().clone(),
            cgroup: request.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone()),
            stages: Stages::new(),
            settings,
            allowed_annotations,
            changing: Arc::default(),
            updates: Mutex::default(),
            members: Mutex::default(),
            ending: Mutex::default(),
        })
    }

    /// Where a container's writes go: onto a disk, unless it may not write but for what its mounts need, or is said
    /// to want none.
    pub(super) fn upper(&self, spec: &Spec) -> Result<Upper, Failure> {
        let settings = Settings::of(spec.annotations().as_ref(), &self.allowed_annotations)?;
        if spec.root().as_ref().and_then(|root| root.readonly()) == Some(true) {
            return Ok(Upper::Memory { bytes: MOUNT_POINTS });
        }
        Ok(match settings.upper_bytes.or(self.settings.upper_bytes).unwrap_or(UPPER_BYTES) {
            0 => Upper::Memory { bytes: 0 },
            bytes => Upper::Disk { bytes },
        })
    }

    /// What containers share; locking it keeps others from making or removing any.
    pub(super) fn changing(&self) -> MutexGuard<'_, Shares> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches `source`, which is about to be copied. A sandbox that cannot watch is of use without.
    pub(super) fn watch(&self, source: &Path) {
        let mut updates = self.updates.lock().unwrap_or_else(PoisonError::into_inner);
        if updates.is_none() {
            match Updates::start(Arc::downgrade(&self.changing), Arc::clone(&self.stages)) {
                Ok(started) => *updates = Some(started),
                Err(failure) => log::warn!("{}", failure.report()),
            }
        }
        if let Some(updates) = &*updates {
            updates.watch(source);
        }
    }

    /// The containers; locked for look-ups only.
    pub(super) fn members(&self) -> MutexGuard<'_, BTreeMap<String, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the machine with these disks; returns when its agent is ready.
    pub(super) fn start_machine(&self, disks: Vec<Disk>) -> Result<Arc<Live>, Failure> {
        let _turn = self.wait_for_turn()?;
        let stage = self.timeline.begin(Track::Host, "find kernel and agent");
        let recipe = Recipe::new(&self.state, self.size.cpus, self.size.memory)?;
        drop(stage);
        let ledger = Ledger::of(&self.directory)?;
        let (begun, mut wiring) = begin(self, &ledger, recipe, disks)?;
        let Begun { mut machine, agent, layout, .. } = begun;
        self.set_layout(layout);
        let place = Configure { hostname: Some(self.hostname()), ..wiring.configure(&self.hostname()) };
        let stage = self.timeline.begin(Track::Agent, "configure guest");
        let configured = agent.configure(place).context(|| "cannot configure the guest".to_owned());
        drop(stage);
        configured.map_err(|failure| machine.explain(failure))?;
        let live = self.stages.start(machine, agent)?;
        wiring.follow(&self.stages, self.pod)?;
        self.keep_wiring(wiring);
        Ok(live)
    }

    /// Waits until it may start: times that its start has begin when this is over.
    ///
    /// # Errors
    /// It was ended, or is not wanted any more; how many may start at once is no number.
    pub(super) fn wait_for_turn(&self) -> Result<Turn, Failure> {
        let turns = Turns::of(&Home::default_place(), self.host.cpus)?;
        if let Some(turn) = turns.take() {
            return Ok(turn);
        }
        let _stage = self.timeline.begin(Track::Host, "wait for others to start");
        let long = || log::warn!("machine {} waits: {} others start already", self.id, turns.places());
        turns.wait(|| self.wish.stands() && self.stages.is_planned(), long)
    }

    /// Has a machine run that is its own: noted, accounted, and its agent greeted.
    pub(super) fn run(
        &self,
        plan: &Plan,
        ledger: &Ledger,
        patience: Duration,
    ) -> Result<(Machine, AgentClient), Failure> {
        let stage = self.timeline.begin(Track::Host, "open its files");
        let prepared = prepare(plan)?;
        drop(stage);
        let mut machine = prepared.start(Some(open_log(&self.directory.join(LOG))?))?;
        self.timeline.spawned(&machine);
        ledger.note_process(machine.pid())?;
        if let Some(cgroup) = &self.cgroup {
            cgroup::join(cgroup, ledger, machine.pid().unsigned_abs());
        }
        let agent = self.timeline.agent(&mut machine, fresh_identity(self.hostname())?, patience)?;
        Ok((machine, agent))
    }

    /// Where its process lives: whoever looks for the container's network looks there.
    pub(super) fn netns(&self) -> Option<Netns> {
        match &self.place {
            Place::Given(netns) => Some(netns.clone()),
            Place::Made(_) => None,
        }
    }

    /// Makes its cards.
    pub(super) fn wire(&self, ledger: &Ledger) -> Result<Wiring, Failure> {
        match &self.place {
            Place::Given(netns) => Wiring::prepare(netns, self.id.as_str(), ledger.try_clone()?),
            Place::Made(net) => Wiring::make(net, self.id.as_str(), ledger),
        }
    }

    /// Keeps them for as long as it runs.
    pub(super) fn keep_wiring(&self, wiring: Wiring) {
        *self.wiring() = Some(wiring);
    }

    /// Refuses to save a machine whose network another cannot go on with.
    pub(super) fn check_network(&self) -> Result<(), Failure> {
        let choice = match &self.place {
            Place::Made(net) if matches!(net.choice, Choice::None | Choice::Nat(_) | Choice::HostOnly(_)) => {
                return Ok(());
            }
            Place::Made(net) => format!("--net {}", net.choice),
            // Its cards are replaced where it goes on, as those of a network that was made.
            Place::Given(_) if !self.pod => return Ok(()),
            Place::Given(_) => "a pod's network".to_owned(),
        };
        Err(Failure::new(format!("a machine with {choice} cannot be saved"))
            .help("containers can be saved that run with --net none, nat or host-only"))
    }

    /// How its bus is laid out.
    ///
    /// # Errors
    /// It was not started.
    pub(super) fn layout(&self) -> Result<&Layout, Failure> {
        self.layout.get().ok_or_else(|| Failure::new("the machine has not been started"))
    }

    /// It is started so.
    pub(super) fn set_layout(&self, layout: Layout) {
        // A machine is started once.
        let _ = self.layout.set(layout);
    }

    /// Its cards.
    pub(super) fn wiring(&self) -> MutexGuard<'_, Option<Wiring>> {
        self.wiring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hostname(&self) -> String {
        self.hostname.clone().unwrap_or_else(|| self.id.to_string())
    }

    /// Removes what the sandbox has on the host.
    pub(super) fn clean_up(&self) -> Result<(), Failure> {
        let _stage = self.timeline.begin(Track::Host, "clean up");
        drop(self.wiring().take());
        drop(self.updates.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.changing().clear();
        self.members().clear();
        if self.directory.is_dir() {
            // All else of the ledger went with what was dropped.
            Ledger::of(&self.directory)?.undo(|resource| matches!(resource, Resource::Cgroup { .. }))?;
        }
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::because(format!("cannot remove {}", self.directory.display()), error))
            }
            _ => Ok(()),
        }
    }
}

/// Opens the log of a machine's process.
fn open_log(path: &Path) -> Result<OwnedFd, Failure> {
    let file = File::options().create(true).append(true).open(path);
    Ok(file.context(|| format!("cannot write {}", path.display()))?.into())
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::sandbox::{ContainerRequest, Sandbox};

    pub(in crate::sandbox) fn planned(
        directory: &Path,
        spec: serde_json::Value,
    ) -> Result<MachineSandbox, Failure> {
        let launcher = MachineLauncher { state: directory.join("state"), ..Default::default() };
        let directory = directory.join("sandbox");
        fs::create_dir_all(&directory).unwrap();
        let spec = serde_json::from_value(spec).unwrap();
        let request = SandboxRequest {
            id: "m".parse().unwrap(),
            directory,
            spec,
            pod: false,
            net: None,
            wish: Wish::default(),
        };
        MachineSandbox::new(&launcher, &request)
    }

    pub(in crate::sandbox) fn alone() -> serde_json::Value {
        json!({"linux": {"namespaces": [{"type": "network"}]}})
    }

    #[test]
    fn a_sandbox_that_was_only_planned_ends_with_nothing_left_and_may_be_ended_again() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = planned(dir.path(), alone()).unwrap();
        assert_eq!(sandbox.pid(), 0);
        sandbox.end().unwrap();
        sandbox.end().unwrap();
        assert_eq!(sandbox.wait_machine(), "it was never started");
        assert!(!dir.path().join("sandbox").exists());
        assert!(sandbox.stats("c").is_err());
        sandbox.remove("c").unwrap();
    }

    #[test]
    fn a_container_that_cannot_be_honoured_starts_no_machine_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = planned(dir.path(), alone()).unwrap();
        let mut spec = alone();
        spec["mounts"] = json!([{"destination": "/data", "type": "bind", "source": "/"}]);
        spec["root"] = json!({"path": dir.path()});
        let spec = serde_json::from_value(spec).unwrap();
        let bundle = dir.path().to_path_buf();
        let request = ContainerRequest { id: "c".to_owned(), bundle, spec, rootfs: Vec::new() };
        let report = sandbox.create(&request).unwrap_err().report();
        assert!(report.contains("/data"), "{report}");
        assert!(sandbox.stages.is_planned());
        assert_eq!(fs::read_dir(dir.path().join("sandbox")).unwrap().count(), 0);
    }

    #[test]
    fn the_hosts_network_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let failure = planned(dir.path(), json!({"linux": {"namespaces": []}})).unwrap_err();
        assert!(failure.report().contains("network"), "{}", failure.report());
    }

    #[test]
    fn writes_go_to_a_disk_of_the_size_that_was_asked_for_unless_there_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut pod = alone();
        pod["annotations"] = json!({"io.mvm.upper_size": "2G"});
        let sandbox = planned(dir.path(), pod).unwrap();
        let upper = |spec| sandbox.upper(&serde_json::from_value(spec).unwrap());
        assert_eq!(upper(json!({})).unwrap(), Upper::Disk { bytes: 2 << 30 });
        let own = json!({"annotations": {"io.mvm.upper_size": "512M"}});
        assert_eq!(upper(own).unwrap(), Upper::Disk { bytes: 512 << 20 });
        let read_only = json!({"root": {"path": "rootfs", "readonly": true}});
        assert_eq!(upper(read_only).unwrap(), Upper::Memory { bytes: MOUNT_POINTS });
        assert!(upper(json!({"annotations": {"io.mvm.unknown": "1"}})).is_err());
    }
}
