//! Making templates: an empty machine is booted, prepared, saved and ended.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use mvm_devices::sys::lowest_priority;
use mvm_vmm::config::MachineId;
use mvm_vmm::snapshot::Needed;

use super::manifest::{Manifest, VERSION};
use super::recipe::{Key, Parts, Recipe};
use super::store::{Keep, MEMORY, STATE, Template, Templates, saved_in};
use crate::agent::fresh_identity;
use crate::catalog::{create, write_back};
use crate::container::{AGENT_TIME, CMDLINE};
use crate::failure::{Context, Failure};
use crate::machine::{Saved, WORKING_SET, prepare};
use crate::state::now;

/// Most bytes of the host that templates take once another one was made.
const MOST_BYTES: u64 = 4 << 30;
/// What the machine is called as long as it is nobody's.
const HOSTNAME: &str = "template";

/// How far the making of a template is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Somebody else makes or removes one.
    Waiting,
    /// The machine boots.
    Booting,
    /// It is saved.
    Saving,
    /// What it was made of is digested.
    Digesting,
    /// A machine is made of it, to see what that needs.
    Trying,
}

/// The template of a recipe: the one that is there, or a new one, which it is in any case if it is to be made `again`.
///
/// # Errors
/// The machine does not boot, cannot be saved, or none goes on from what was saved; nothing is left then.
pub fn make(
    templates: &Templates,
    recipe: &Recipe,
    again: bool,
    progress: &mut dyn FnMut(Phase),
) -> Result<Template, Failure> {
    templates.make_root()?;
    let _lock = match templates.lock_now()? {
        Some(lock) => lock,
        None => {
            progress(Phase::Waiting);
            templates.lock()?
        }
    };
    make_locked(templates, recipe, again, progress)
}

/// Makes the template of a recipe on a thread of its own, as [`make_when_idle`] does. What goes wrong is logged.
pub fn make_in_background(templates: &Templates, recipe: &Recipe) {
    let (templates, recipe) = (templates.clone(), recipe.clone());
    let thread = std::thread::Builder::new().name("template".to_owned());
    let spawned = thread.spawn(move || {
        if let Err(failure) = make_when_idle(&templates, &recipe) {
            log::warn!("{}", failure.report());
        }
    });
    if let Err(error) = spawned {
        log::warn!("no template is made: {error}");
    }
}

/// Makes the template of a recipe when the host has nothing better to do, unless one is being made already. The
/// calling thread keeps the lowest priority.
///
/// # Errors
/// It cannot be made. That is noted, and it is not tried again for a while unless somebody asks for it by [`make`].
pub fn make_when_idle(templates: &Templates, recipe: &Recipe) -> Result<(), Failure> {
    // The machine's process takes after this thread.
    if let Err(error) = lowest_priority() {
        log::debug!("a template is made at an ordinary priority: {error}");
    }
    templates.make_root()?;
    let Some(_lock) = templates.lock_now()? else { return Ok(()) };
    let made = make_locked(templates, recipe, false, &mut |_| ());
    if let Err(failure) = &made {
        let _ = templates.set_aside(&recipe.key()?, &failure.report());
    }
    made.map(drop)
}

fn make_locked(
    templates: &Templates,
    recipe: &Recipe,
    again: bool,
    progress: &mut dyn FnMut(Phase),
) -> Result<Template, Failure> {
    let parts = recipe.parts()?;
    let key = recipe.key_of(&parts);
    if let Some(there) = templates.find(&key).filter(|_| !again) {
        return Ok(there);
    }
    let failed = || format!("cannot make a template of {} and {} CPUs", recipe.memory, recipe.cpus.get());
    let new = templates.begin()?;
    let manifest = save(recipe, parts, &key, new.path(), progress).context(failed)?;
    progress(Phase::Trying);
    record(recipe, &key, new.path()).context(failed)?;
    let made = templates.install(new, manifest)?;
    if let Err(failure) = templates.prune_locked(&Keep { bytes: Some(MOST_BYTES), ..Keep::default() }) {
        log::warn!("{}", failure.report());
    }
    Ok(made)
}

fn save(
    recipe: &Recipe,
    parts: Parts,
    key: &Key,
    directory: &Path,
    progress: &mut dyn FnMut(Phase),
) -> Result<Manifest, Failure> {
    let begun = Instant::now();
    if mvm_vmm::kvm::probe::is_pvm() {
        return Err(Failure::new(mvm_vmm::kvm::probe::PVM).help("make lab CMD='mvm template create …'"));
    }
    progress(Phase::Booting);
    let plan = recipe.plan_template(machine_id(key)?);
    let mut machine = prepare(&plan)?.start(None)?;
    let agent = machine.agent(fresh_identity(HOSTNAME.to_owned())?, AGENT_TIME)?;
    agent.prepare().context(|| "cannot have the agent get ready".to_owned())?;
    progress(Phase::Saving);
    let (state, memory) = (create(&directory.join(STATE))?, create(&directory.join(MEMORY))?);
    let saved: Saved = machine.control().snapshot(state.as_fd(), memory.as_fd(), key.as_str(), false)?;
    let hello = agent.hello();
    let (kernel_release, agent_version) = (hello.kernel_release.clone(), hello.agent_version.clone());
    // Held as it is, it would not hear of its host's going; it is not to go on in any case.
    machine.kill()?;
    drop((state, memory));
    write_back(directory)?;
    if let Err(failure) = gather(recipe, &directory.join(MEMORY)) {
        // On a host without huge pages for files a clone has more faults, that is all.
        log::debug!("{}", failure.report());
    }
    progress(Phase::Digesting);
    Ok(Manifest {
        version: VERSION,
        key: key.clone(),
        created: now(),
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        cpus: recipe.cpus.get(),
        memory_mib: recipe.memory.mib(),
        cmdline: CMDLINE.to_owned(),
        processor: parts.processor,
        kernel: parts.kernel.digest()?,
        agent: parts.agent.digest()?,
        vmm: parts.vmm.digest()?,
        kernel_release,
        agent_version,
        memory_bytes: saved.memory_bytes,
        state_bytes: saved.state_bytes,
    })
}

/// Gathers the guest's kernel in huge pages of the saved `memory`: every clone runs it, and none writes it. They last
/// as long as the host keeps them in its memory.
fn gather(recipe: &Recipe, memory: &Path) -> Result<(), Failure> {
    let failed = || "cannot have the guest's kernel in huge pages".to_owned();
    let kernel = File::open(recipe.kernel()).context(failed)?;
    // RAM begins at address 0 and at offset 0, and has no hole as low as a kernel is.
    match mvm_vmm::boot::read_only(&kernel).context(failed)? {
        Some(range) => {
            File::open(memory).and_then(|memory| mvm_vmm::snapshot::gather(&memory, range)).context(failed)
        }
        None => Ok(()),
    }
}

/// Records which memory a machine writes that goes on from what was saved in `directory`, until it has answered.
fn record(recipe: &Recipe, key: &Key, directory: &Path) -> Result<(), Failure> {
    let (plan, _) = recipe.plan_clone(machine_id(key)?, saved_in(directory, key), &[]);
    let mut machine = prepare(&plan)?.start(None)?;
    let agent = machine.agent(fresh_identity(HOSTNAME.to_owned())?, AGENT_TIME)?;
    agent.correct_clock().context(|| "cannot ask the guest for its clock".to_owned())?;
    let (pid, set) = (machine.pid(), directory.join(WORKING_SET));
    // Not everybody may look into its process, and it is there to be quicker.
    if let Err(failure) = machine.control().record_working_set(pid, Needed::Written, &set) {
        log::warn!("{}", failure.report());
    }
    machine.kill()?;
    write_back(directory)
}

/// The name of a machine that is for a template alone.
fn machine_id(key: &Key) -> Result<MachineId, Failure> {
    let id = format!("{HOSTNAME}-{}", key.short());
    id.parse().context(|| "cannot name the machine".to_owned())
}
