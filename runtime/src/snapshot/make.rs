//! Making a snapshot: the container's owner saves its machine, and what that made is kept under a name.

use std::fs;

use mvm_vmm::config::MachineId;

use super::manifest::{Manifest, Of, SavedRun, VERSION};
use super::store::{Entry, Snapshots};
use crate::catalog::write_back;
use crate::digest::of_program;
use crate::failure::{Context, Failure};
use crate::owner::{Client, Reply, Request};
use crate::state::{Seen, now};
use crate::template::processor;

/// Saves the machine of a running container under `name`; of its memory, only what differs from that of the snapshot
/// `base`, if one is named. The container goes on, whatever comes of it.
///
/// # Errors
/// There is a snapshot of this name, or none that can be the base, the container does not run or cannot be saved; nothing
/// is left then.
pub fn make(
    snapshots: &Snapshots,
    seen: &Seen,
    name: &MachineId,
    base: Option<&str>,
) -> Result<Entry, Failure> {
    snapshots.check_free(name)?;
    let base = base.map(|base| snapshots.hold_base(base)).transpose()?;
    let failed = || format!("cannot save container {}", seen.record.name);
    let client = Client::connect(seen)?;
    // While it runs: the program may be replaced on disk, and what is there then is another.
    let machine = seen.record.machine.ok_or_else(|| seen.record.not_running())?;
    let program = format!("/proc/{}/exe", machine.pid);
    let new = snapshots.begin()?;
    let vmm_sha256 = of_program(program.as_ref(), &snapshots.known_program());
    let vmm_sha256 = vmm_sha256.context(|| format!("cannot digest {program}")).context(failed)?;
    let processor = processor().context(|| "cannot tell the host's processor".to_owned()).context(failed)?;
    // Its owner may have been started elsewhere.
    let directory = fs::canonicalize(new.path()).context(failed)?;
    let memory = base.as_ref().map(|held| held.memory.clone());
    let request = match &memory {
        None => Request::Save { directory },
        Some(base) => Request::SaveAbove { directory, base: base.clone() },
    };
    let Reply::Saved(text) = client.ask(&request)? else {
        return Err(Failure::because(failed(), Failure::new("its owner does not say what was saved")));
    };
    let run: SavedRun = serde_json::from_str(&text).context(failed)?;
    if run.machine.base != memory.map(|it| it.base) {
        return Err(Failure::because(failed(), Failure::new("its owner saved it above another base")));
    }
    write_back(new.path())?;
    let manifest = Manifest {
        version: VERSION,
        name: name.clone(),
        created: now(),
        container: Of { id: seen.record.id.clone(), name: seen.record.name.clone() },
        processor,
        vmm_sha256,
        run,
    };
    snapshots.install(new, &manifest)?;
    snapshots.get(name.as_str())
}
