//! A container in a machine: how it is made of its request, and what is kept of it.

use std::path::Path;
use std::time::Instant;

use mvm_protocol::{PidNamespace, SetupRoot, Writable};
use oci_spec::runtime::LinuxResources;
use sha2::{Digest, Sha256};

use super::ContainerRequest;
use super::ending::ASKING_TIME;
use super::limits::Sizes;
use super::machine::MachineSandbox;
use super::shares::Shares;
use super::stage::Live;
use super::volumes::{Host, Volumes, bring};
use crate::agent::{AgentClient, Error as AgentError};
use crate::failure::{Context, Failure};
use crate::hex::hex;
use crate::machine::{Control, DeviceName, Disk};
use crate::rootfs::{self, LAYER_DISKS, Prepared};
use crate::snapshot::Going;
use crate::spec::{Profile, Translated, translate};
use crate::timeline::{PLUG, Track};

/// Longest id the agent takes.
const MAX_ID: usize = mvm_protocol::limits::MAX_ID;

/// A container in a machine.
#[derive(Debug)]
pub(super) struct Member {
    /// Its name in the guest.
    pub(super) root: String,
    /// Its system call filter.
    pub(super) profile: Profile,
    /// Its processes are in the machine's own PID name space.
    machines_processes: bool,
    /// Its first process, once it was started.
    init: Option<u64>,
    /// Serials of the disks that are its alone.
    pub(super) disks: Vec<String>,
    /// What it brought into the guest.
    pub(super) volumes: Volumes,
    writes_are_kept: bool,
    /// The limits it was made with.
    pub(super) sizes: Sizes,
    /// Its limit of memory in bytes as it is now, or was before it was lifted; 0 without.
    pub(super) memory: u64,
    /// Images in use.
    _rootfs: Prepared,
}

impl Member {
    /// One that goes on in a machine that was saved with it.
    pub(super) fn going(
        going: &Going,
        translated: Translated,
        (rootfs, resources): (Prepared, Option<&LinuxResources>),
    ) -> Self {
        Self {
            root: going.machine.root.clone(),
            profile: translated.profile,
            machines_processes: translated.spaces.machines_processes,
            init: Some(going.process),
            disks: going.disks.iter().map(|disk| disk.serial.clone()).collect(),
            writes_are_kept: going.disks.iter().any(|disk| !disk.read_only),
            volumes: Volumes::default(),
            sizes: Sizes::of(resources),
            memory: Sizes::of(resources).memory,
            _rootfs: rootfs,
        }
    }

    /// The disks of its root file system.
    pub(super) fn rootfs(&self) -> &[Disk] {
        &self._rootfs.disks
    }

    /// Whether writes of it go to a disk that outlives the machine.
    pub(super) fn keeps_writes(&self) -> bool {
        self.writes_are_kept
    }

    /// The PID name space of its next process.
    pub(super) fn pid_namespace(&self) -> PidNamespace {
        match (self.machines_processes, self.init) {
            (true, _) => PidNamespace::Agent,
            (false, None) => PidNamespace::New,
            (false, Some(init)) => PidNamespace::Join(init),
        }
    }

    /// Whether it has yet to have a process.
    pub(super) fn is_unstarted(&self) -> bool {
        self.init.is_none()
    }

    /// Its first process.
    pub(super) fn init(&self) -> Option<u64> {
        self.init
    }

    /// A process of it was started.
    pub(super) fn started(&mut self, process: u64) {
        self.init.get_or_insert(process);
    }
}

/// A container whose parts are ready on the host.
struct Parts {
    translated: Translated,
    rootfs: Prepared,
    volumes: Volumes,
    disks: Vec<Disk>,
}

impl Host for MachineSandbox {
    fn state(&self) -> &Path {
        &self.state
    }

    fn watch(&self, source: &Path) {
        self.watch(source);
    }
}

/// Makes a container in a sandbox. Nothing of it is left if that fails.
pub(super) fn make(sandbox: &MachineSandbox, request: &ContainerRequest) -> Result<(), Failure> {
    let mut shares = sandbox.changing();
    if sandbox.members().contains_key(&request.id) {
        return Err(Failure::new(format!("there is a container {} already", request.id)));
    }
    let directory = sandbox.directory.join(root_name(&request.id));
    let mut volumes = Vec::new();
    let made = prepare(sandbox, request, &directory, &mut shares).and_then(|parts| {
        volumes.clone_from(&parts.volumes.shared);
        install(sandbox, request, parts, &mut shares)
    });
    match made {
        Ok(member) => {
            sandbox.members().insert(request.id.clone(), member);
            Ok(())
        }
        Err(failure) => {
            shares.release(
                sandbox.stages.live().as_deref().map(|live| &live.agent),
                &volumes,
                Instant::now() + ASKING_TIME,
            );
            let _ = std::fs::remove_dir_all(directory);
            Err(failure)
        }
    }
}

/// Everything that can be done before the machine is asked.
fn prepare(
    sandbox: &MachineSandbox,
    request: &ContainerRequest,
    directory: &Path,
    shares: &mut Shares,
) -> Result<Parts, Failure> {
    let mut translated = translate(&request.spec, &request.bundle, sandbox.size.cpus.get())?;
    std::fs::create_dir_all(directory).context(|| format!("cannot make {}", directory.display()))?;
    let root = request.spec.root().as_ref().map(|root| request.bundle.join(root.path()));
    let stage = sandbox.timeline.begin(Track::Host, "make disks");
    let rootfs = rootfs::prepare(
        &rootfs::Request {
            container: &request.id,
            mounts: &request.rootfs,
            root: root.as_deref(),
            upper: sandbox.upper(&request.spec)?,
            directory,
            layer_disks: LAYER_DISKS,
        },
        &sandbox.state,
        &mut (),
    )
    .context(|| format!("cannot make the root file system of {}", request.id))?;
    translated.surroundings.read_only_root |= rootfs.read_only;
    drop(stage);
    let _stage = sandbox.timeline.begin(Track::Host, "bring volumes");
    let mounts = std::mem::take(&mut translated.mounts);
    let volumes = bring(&request.id, mounts, &translated.disks, sandbox, shares)?;
    translated.surroundings.mounts.clone_from(&volumes.mounts);
    translated.surroundings.disks.clone_from(&volumes.nodes);
    let disks = rootfs.disks.iter().chain(&volumes.disks).cloned().collect();
    Ok(Parts { translated, rootfs, volumes, disks })
}

/// Has the machine make it; starts the machine if this is what it was planned for.
fn install(
    sandbox: &MachineSandbox,
    request: &ContainerRequest,
    parts: Parts,
    shares: &mut Shares,
) -> Result<Member, Failure> {
    let Parts { translated, rootfs, volumes, disks } = parts;
    let live = match sandbox.stages.is_planned() {
        true => sandbox.start_machine(disks.clone())?,
        false => {
            let live = sandbox.stages.running()?;
            let _stage = sandbox.timeline.begin(Track::Host, PLUG);
            attach(&live, &disks)?;
            live
        }
    };
    let sizes = Sizes::of(request.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()));
    let member = Member {
        root: root_name(&request.id),
        profile: translated.profile,
        machines_processes: translated.spaces.machines_processes,
        init: None,
        disks: disks.iter().map(|disk| disk.serial.clone()).collect(),
        writes_are_kept: matches!(rootfs.writable, Writable::Disk { .. } | Writable::Whole { .. })
            || volumes.disks.iter().any(|disk| !disk.read_only),
        volumes,
        sizes,
        memory: sizes.memory,
        _rootfs: rootfs,
    };
    let root = SetupRoot {
        id: member.root.clone(),
        lower: member._rootfs.lower.clone(),
        writable: member._rootfs.writable.clone(),
        surroundings: translated.surroundings,
    };
    let made = shares.push(&live.agent).and_then(|()| {
        let _stage = sandbox.timeline.begin(Track::Agent, "set up container");
        live.agent.set_up_root(root).context(|| format!("cannot set up container {}", request.id))
    });
    match made {
        Ok(()) => Ok(member),
        Err(failure) => {
            let _ = detach(&live.control(), Some(&live.agent), &member.disks, Instant::now() + ASKING_TIME);
            Err(failure)
        }
    }
}

/// Removes a container from the machine, as far as there is one.
pub(super) fn remove(sandbox: &MachineSandbox, id: &str) -> Result<(), Failure> {
    let mut shares = sandbox.changing();
    let Some(member) = sandbox.members().remove(id) else { return Ok(()) };
    let Some(live) = sandbox.stages.live() else { return Ok(()) };
    // Whoever changes limits at this moment does it when that is done.
    if let Ok(mut growth) = sandbox.growth.try_lock() {
        sandbox.shrink(&mut growth, &live);
    }
    // Whatever the guest answers, what is the host's is taken back. If it answers nothing it is asked nothing more.
    let removed = live.agent.remove_root(&member.root);
    let agent = removed.as_ref().err().is_none_or(AgentError::is_answer).then_some(&live.agent);
    let end = Instant::now() + ASKING_TIME;
    if let Some(agent) = agent {
        shares.write_back(agent, Some(&member.volumes.shared), end);
    }
    shares.release(agent, &member.volumes.shared, end);
    let detached = detach(&live.control(), agent, &member.disks, end);
    let _ = std::fs::remove_dir_all(sandbox.directory.join(root_name(id)));
    removed.context(|| format!("cannot remove container {id}")).and(detached)
}

/// Attaches disks to a running machine and has the guest find them; none is left if one cannot be.
fn attach(live: &Live, disks: &[Disk]) -> Result<(), Failure> {
    let control = live.control();
    let mut attached = Vec::new();
    let mut made = Ok(());
    for disk in disks {
        made = control.attach_disk(disk).map(drop);
        if made.is_err() {
            break;
        }
        attached.push(disk.serial.clone());
    }
    if made.is_ok() && !disks.is_empty() {
        made = live.agent.rescan().context(|| "cannot have the guest look for new disks".to_owned());
    }
    if made.is_err() {
        let _ = detach(&control, Some(&live.agent), &attached, Instant::now() + ASKING_TIME);
    }
    made
}

/// Detaches disks that nothing is mounted from. One that the guest does not let go of, or only says it has, is pulled
/// out, and all of them are if the guest has no agent that answers, or `end` has passed.
fn detach(
    control: &Control,
    mut agent: Option<&AgentClient>,
    serials: &[String],
    end: Instant,
) -> Result<(), Failure> {
    let mut result = Ok(());
    for serial in serials {
        let ejected = agent.map(|agent| agent.eject_by(serial, end));
        let let_go = matches!(ejected, Some(Ok(())));
        if let Some(Err(error)) = ejected
            && !error.is_answer()
        {
            agent = None;
        }
        result = result.and(take_back(control, serial, let_go));
    }
    result
}

/// Detaches one disk; the guest's word that it has let go of it is tried first, and not relied on.
fn take_back(control: &Control, serial: &str, let_go: bool) -> Result<(), Failure> {
    let detach = |force| control.detach(DeviceName::Serial(serial.to_owned()), force);
    if !let_go {
        return detach(true);
    }
    detach(false).or_else(|failure| {
        // Why the first fails is what there is to know if the second does too.
        detach(true).map_err(|_| failure)
    })
}

/// A container's name in the guest: its id, or where the agent would not take that, one made of it.
pub(super) fn root_name(id: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=MAX_ID).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(plain) {
        return id.to_owned();
    }
    hex(Sha256::digest(id.as_bytes()).iter().take(20))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mvm_protocol::{GuestMessage, Reply, encode};

    use super::*;
    use crate::agent::tests::hostile::{client, read_frames};
    use crate::machine::answering;

    #[test]
    fn a_disk_that_the_guest_says_it_has_let_go_of_and_has_not_is_pulled_out() {
        let (client, mut agent) = client();
        let liar = std::thread::spawn(move || {
            // The answer to its hello comes first.
            read_frames(&mut agent, 1);
            for id in 1..=2 {
                read_frames(&mut agent, 1);
                let answer = GuestMessage::Response { id, result: Ok(Reply::Done) };
                agent.write_all(&encode(&answer).unwrap()).unwrap();
            }
        });
        let (control, host) =
            answering(&[r#"{"error":"the guest uses it"}"#, r#"{"ok":{}}"#, r#"{"ok":{}}"#]);
        detach(
            &control,
            Some(&client),
            &["kept".to_owned(), "left".to_owned()],
            Instant::now() + ASKING_TIME,
        )
        .unwrap();
        liar.join().unwrap();
        let asked = [
            r#"{"command":"detach","device":"kept"}"#,
            r#"{"command":"detach","device":"kept","force":true}"#,
            r#"{"command":"detach","device":"left"}"#,
        ];
        assert_eq!(host.join().unwrap(), asked);
    }

    #[test]
    fn disks_are_pulled_out_of_a_guest_whose_time_is_up_without_asking_it() {
        let (client, mut agent) = client();
        let (control, host) = answering(&[r#"{"ok":{}}"#, r#"{"ok":{}}"#]);
        detach(&control, Some(&client), &["a".to_owned(), "b".to_owned()], Instant::now()).unwrap();
        let asked =
            ["a", "b"].map(|disk| format!(r#"{{"command":"detach","device":"{disk}","force":true}}"#));
        assert_eq!(host.join().unwrap(), asked);
        drop(client);
        // The answer to its hello, and nothing else.
        read_frames(&mut agent, 1);
        assert_eq!(std::io::Read::read(&mut agent, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_disk_that_cannot_be_pulled_out_either_is_told_with_the_first_reason() {
        let (control, host) = answering(&[r#"{"error":"its last request"}"#, r#"{"error":"no disk"}"#]);
        let report = take_back(&control, "d", true).unwrap_err().report();
        assert!(report.contains("its last request"), "{report}");
        host.join().unwrap();
    }

    #[test]
    fn a_name_the_agent_takes_is_kept_and_others_are_made_of_the_id() {
        assert_eq!(root_name("web-1_a.b"), "web-1_a.b");
        for odd in ["", ".hidden", "a/b", &"x".repeat(65)] {
            let name = root_name(odd);
            assert_eq!(name.len(), 40, "{odd}");
            assert_ne!(name, root_name("other/"));
        }
    }
}
