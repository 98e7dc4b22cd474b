//! A sandbox that is a machine: planned, booted, given containers, ended.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_protocol::{Configure, Identity, ShutdownMode};
use mvm_vmm::config::MachineId;
use oci_spec::runtime::Spec;

use super::SandboxRequest;
use super::launcher::MachineLauncher;
use super::member::Member;
use super::shares::Shares;
use super::stage::{Live, Stages};
use super::updates::Updates;
use super::wiring::Wiring;
use crate::container::{CMDLINE, Timeline};
use crate::failure::{Context, Failure};
use crate::guest::GuestFiles;
use crate::machine::{Disk, Plan, prepare};
use crate::net::{NetRequest, Netns};
use crate::rootfs::{UPPER_BYTES, Upper};
use crate::spec::{Settings, Size, size};

/// Time from the machine's start to the agent's hello. Generous: an emulated host is thirty times slower.
const AGENT_TIME: Duration = Duration::from_secs(60);
/// Time processes get between being asked to end and being killed.
const GRACE: Duration = Duration::from_secs(10);
/// Time a guest gets after that to write its disks back and power off.
const END_TIME: Duration = Duration::from_secs(60);
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
    settings: Settings,
    allowed_annotations: Vec<String>,
    pub(super) size: Size,
    place: Place,
    /// Its cards, while it runs.
    wiring: Mutex<Option<Wiring>>,
    pod: bool,
    hostname: Option<String>,
    pub(super) stages: Arc<Stages>,
    timeline: Mutex<Option<Timeline>>,
    /// Held while a container is made or removed: its disks and shares are one change.
    changing: Arc<Mutex<Shares>>,
    /// Watches what was copied, from the first copy on.
    updates: Mutex<Option<Updates>>,
    members: Mutex<BTreeMap<String, Member>>,
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
            settings,
            allowed_annotations,
            size: size(&request.spec, &settings, launcher.host),
            place: match &request.net {
                Some(net) => Place::Made(net.clone()),
                None => Place::Given(Netns::of(&request.spec)?),
            },
            wiring: Mutex::default(),
            timeline: Mutex::default(),
            pod: request.pod,
            hostname: request.spec.hostname().clone(),
            stages: Stages::new(),
            changing: Arc::default(),
            updates: Mutex::default(),
            members: Mutex::default(),
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
        let guest = GuestFiles::find()?;
        let initrd = guest.initrd(&self.state.join("guest"))?;
        let mut wiring = match &self.place {
            Place::Given(netns) => Wiring::prepare(netns, self.id.as_str())?,
            Place::Made(net) => Wiring::make(net, self.id.as_str())?,
        };
        let plan = Plan {
            id: self.id.clone(),
            cpus: self.size.cpus,
            memory: self.size.memory,
            kernel: guest.kernel,
            initrd: Some(initrd),
            cmdline: CMDLINE.to_owned(),
            disks,
            nets: wiring.nets(),
            // Whoever looks for the container's network looks where its process is.
            netns: match &self.place {
                Place::Given(netns) => Some(netns.clone()),
                Place::Made(_) => None,
            },
            console: None,
            vsock: true,
            devices: Vec::new(),
            sockets: None,
        };
        let prepared = prepare(&plan)?;
        let log = self.log()?;
        let mut machine = prepared.start(Some(log))?;
        let mut timeline = Timeline::begin(machine.spawned_ns());
        let agent = machine.agent(self.identity(), AGENT_TIME)?;
        timeline.machine(&mut machine)?;
        timeline.reach("agent says hello");
        let place = Configure { hostname: Some(self.hostname()), ..wiring.configure(&self.hostname()) };
        agent.configure(place).context(|| "cannot configure the guest".to_owned())?;
        timeline.reach("guest is configured");
        *self.timeline() = Some(timeline);
        let live = self.stages.start(machine, agent)?;
        wiring.follow(&self.stages, self.pod)?;
        *self.wiring() = Some(wiring);
        Ok(live)
    }

    /// The stages of the start so far.
    pub(super) fn timeline(&self) -> MutexGuard<'_, Option<Timeline>> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stage of the start is reached.
    pub(super) fn reach(&self, stage: &'static str) {
        if let Some(timeline) = &mut *self.timeline() {
            timeline.reach(stage);
        }
    }

    fn wiring(&self) -> MutexGuard<'_, Option<Wiring>> {
        self.wiring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> Result<OwnedFd, Failure> {
        let path = self.directory.join(LOG);
        let file = File::options().create(true).append(true).open(&path);
        Ok(file.context(|| format!("cannot write {}", path.display()))?.into())
    }

    fn hostname(&self) -> String {
        self.hostname.clone().unwrap_or_else(|| self.id.to_string())
    }

    fn identity(&self) -> Identity {
        let mut entropy = [0; 32];
        // Without it the guest still has its CPU's and its kernel's own randomness.
        let _ = mvm_devices::sys::random(&mut entropy);
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let wall_clock_ns = u64::try_from(wall.as_nanos()).unwrap_or(0);
        Identity { hostname: self.hostname(), wall_clock_ns, entropy }
    }

    /// Ends the machine, in order if it has disks whose content is kept.
    pub(super) fn end_machine(&self) -> Result<(), Failure> {
        self.stages.abandon("it was never started");
        let Some(live) = self.stages.live() else { return Ok(()) };
        let keeps = self.members().values().any(Member::keeps_writes);
        let in_order = keeps
            && live.agent.shut_down(ShutdownMode::PowerOff, GRACE).is_ok()
            && self.stages.wait_at_most(GRACE + END_TIME);
        if !in_order {
            self.stages.kill(&live)?;
        }
        self.stages.wait();
        Ok(())
    }

    /// Removes what the sandbox has on the host.
    pub(super) fn clean_up(&self) -> Result<(), Failure> {
        drop(self.wiring().take());
        drop(self.updates.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.changing().clear();
        self.members().clear();
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::because(format!("cannot remove {}", self.directory.display()), error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::sandbox::{ContainerRequest, Sandbox};

    fn planned(directory: &Path, spec: serde_json::Value) -> Result<MachineSandbox, Failure> {
        let launcher = MachineLauncher { state: directory.join("state"), ..Default::default() };
        let directory = directory.join("sandbox");
        fs::create_dir_all(&directory).unwrap();
        let spec = serde_json::from_value(spec).unwrap();
        let request = SandboxRequest { id: "m".parse().unwrap(), directory, spec, pod: false, net: None };
        MachineSandbox::new(&launcher, &request)
    }

    fn alone() -> serde_json::Value {
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
