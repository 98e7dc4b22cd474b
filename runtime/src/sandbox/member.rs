//! A container in a machine: how it is made of its request, and what is kept of it.

use std::path::Path;

use mvm_protocol::{PidNamespace, SetupRoot, Writable};
use sha2::{Digest, Sha256};

use super::ContainerRequest;
use super::machine::MachineSandbox;
use super::shares::Shares;
use super::stage::Live;
use super::volumes::{Host, Volumes, bring};
use crate::failure::{Context, Failure};
use crate::machine::{DeviceName, Disk};
use crate::rootfs::{self, LAYER_DISKS, Prepared};
use crate::spec::{Profile, Translated, translate};

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
    /// Images in use.
    _rootfs: Prepared,
}

impl Member {
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
            shares.release(sandbox.stages.live().as_deref().map(|live| &live.agent), &volumes);
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
    let volumes = bring(&request.id, std::mem::take(&mut translated.mounts), sandbox, shares)?;
    translated.surroundings.mounts.clone_from(&volumes.mounts);
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
            attach(&live, &disks)?;
            live
        }
    };
    let member = Member {
        root: root_name(&request.id),
        profile: translated.profile,
        machines_processes: translated.spaces.machines_processes,
        init: None,
        disks: disks.iter().map(|disk| disk.serial.clone()).collect(),
        writes_are_kept: matches!(rootfs.writable, Writable::Disk { .. } | Writable::Whole { .. }),
        volumes,
        _rootfs: rootfs,
    };
    let root = SetupRoot {
        id: member.root.clone(),
        lower: member._rootfs.lower.clone(),
        writable: member._rootfs.writable.clone(),
        surroundings: translated.surroundings,
    };
    let made = shares.push(&live.agent).and_then(|()| {
        live.agent.set_up_root(root).context(|| format!("cannot set up container {}", request.id))?;
        sandbox.reach("container is set up");
        Ok(())
    });
    match made {
        Ok(()) => Ok(member),
        Err(failure) => {
            let _ = detach(&live, &member.disks);
            Err(failure)
        }
    }
}

/// Removes a container from the machine, as far as there is one.
pub(super) fn remove(sandbox: &MachineSandbox, id: &str) -> Result<(), Failure> {
    let mut shares = sandbox.changing();
    let Some(member) = sandbox.members().remove(id) else { return Ok(()) };
    let Some(live) = sandbox.stages.live() else { return Ok(()) };
    // Whatever the guest answers, what is the host's is taken back.
    let removed = live.agent.remove_root(&member.root).context(|| format!("cannot remove container {id}"));
    shares.release(Some(&live.agent), &member.volumes.shared);
    let detached = detach(&live, &member.disks);
    let _ = std::fs::remove_dir_all(sandbox.directory.join(&member.root));
    removed.and(detached)
}

/// Attaches disks to a running machine and has the guest find them; none is left if one cannot be.
fn attach(live: &Live, disks: &[Disk]) -> Result<(), Failure> {
    let control = live.machine().control().clone();
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
        let _ = detach(live, &attached);
    }
    made
}

/// Detaches disks that nothing is mounted from. One that the guest does not let go of is pulled out.
fn detach(live: &Live, serials: &[String]) -> Result<(), Failure> {
    let control = live.machine().control().clone();
    let mut result = Ok(());
    for serial in serials {
        let let_go = live.agent.eject(serial).is_ok();
        let detached = control.detach(DeviceName::Serial(serial.clone()), !let_go);
        result = result.and(detached);
    }
    result
}

/// A container's name in the guest: its id, or where the agent would not take that, one made of it.
fn root_name(id: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=MAX_ID).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(plain) {
        return id.to_owned();
    }
    Sha256::digest(id.as_bytes()).iter().take(20).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
