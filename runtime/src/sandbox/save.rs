//! A sandbox's machine is saved with the container in it, and goes on.
//!
//! First the container's processes are stopped, so that wherever the machine goes on they do so only once it is known
//! who it is. Then the agent freezes the file systems of disks and holds the streams, and the machine is held while
//! its disks are copied and its memory is written: all of it is of one moment. Whatever fails, everything goes on.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::machine::MachineSandbox;
use super::stage::Live;
use super::wiring::Wiring;
use crate::catalog::create;
use crate::failure::{Context, Failure};
use crate::hex::random;
use crate::machine::{Disk, Saved};
use crate::rootfs::copy_sparse;
use crate::snapshot::{BaseMemory, SavedDisk, SavedMachine, SavedSlot, disk_file, memory_file, state_file};

/// Bytes of what a state says is in it: nobody has another snapshot that says the same.
const CONTENTS: usize = 16;

/// How a machine is saved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saving<'a> {
    /// Where its files are made.
    pub(super) directory: &'a Path,
    /// The disks that are only read are kept there too.
    pub(super) with_layers: bool,
    /// The container is paused, and stays so.
    pub(super) paused: bool,
    /// Of the memory, what differs from this is kept.
    pub(super) base: Option<&'a BaseMemory>,
}

/// What is saved of a sandbox.
struct Subject {
    /// The container's name in the guest.
    root: String,
    disks: Vec<Disk>,
}

/// A machine that stands still. It goes on with the value.
struct Still<'a> {
    live: &'a Live,
    root: &'a str,
    /// What must be undone, the last first.
    steps: Vec<Step>,
}

#[derive(Clone, Copy)]
enum Step {
    Freeze,
    Hold,
    Pause,
}

impl<'a> Still<'a> {
    fn begin(live: &'a Live, root: &'a str, paused: bool) -> Result<Self, Failure> {
        let mut still = Self { live, root, steps: Vec::new() };
        let agent = &live.agent;
        // What can be written before is: less is left for when nothing moves.
        agent.sync().context(|| "cannot write the guest's disks back".to_owned())?;
        // Noted first: what did not happen in time may still do so.
        if !paused {
            still.steps.push(Step::Freeze);
        }
        agent.freeze(root, true).context(|| "cannot stop the container's processes".to_owned())?;
        still.steps.push(Step::Hold);
        agent.hold().context(|| "cannot hold the guest's disks and streams".to_owned())?;
        live.control().pause()?;
        still.steps.push(Step::Pause);
        Ok(still)
    }

    /// Everything goes on.
    fn go_on(mut self) -> Result<(), Failure> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), Failure> {
        let mut result = Ok(());
        while let Some(step) = self.steps.pop() {
            let agent = &self.live.agent;
            let undone = match step {
                Step::Pause => self.live.control().resume(),
                Step::Hold => agent.release().context(|| "cannot let the guest go on".to_owned()),
                Step::Freeze => {
                    let thawed = agent.freeze(self.root, false);
                    thawed.context(|| "cannot let the container's processes go on".to_owned())
                }
            };
            result = result.and(undone);
        }
        result
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        if let Err(failure) = self.undo() {
            log::error!("{}", failure.report());
        }
    }
}

/// Saves the machine of `sandbox` with its only container into files.
pub(super) fn save(
    sandbox: &MachineSandbox,
    container: &str,
    saving: &Saving<'_>,
) -> Result<SavedMachine, Failure> {
    // Nothing is plugged in or out meanwhile.
    let _changing = sandbox.changing();
    let live = sandbox.stages.running()?;
    // Nor is any memory.
    let given = sandbox.growth();
    let subject = subject(sandbox, container).map_err(Failure::refused)?;
    let wiring = sandbox.wiring();
    let cards = wiring.as_ref().map(Wiring::stand_still).unwrap_or_default();
    let control = live.control();
    cards.check(&control)?;
    let growth = given.saved(&control, sandbox.size.memory)?;
    let (layout, contents, directory) = (sandbox.layout()?, random::<CONTENTS>()?, saving.directory);
    let (state, memory) = (create(&state_file(directory))?, create(&memory_file(directory))?);
    let below =
        saving.base.map(|it| File::open(&it.file).context(|| format!("cannot open {}", it.file.display())));
    let below = below.transpose()?;

    let still = Still::begin(&live, &subject.root, saving.paused)?;
    let begun = Instant::now();
    let mut disks = Vec::with_capacity(subject.disks.len());
    for (number, disk) in subject.disks.iter().enumerate() {
        let to = disk_file(directory, number);
        disks.push(keep(disk, Some(to.as_path()).filter(|_| saving.with_layers || !disk.read_only))?);
    }
    let Saved { memory_bytes, state_bytes, .. } = match &below {
        None => control.snapshot(state.as_fd(), memory.as_fd(), &contents, false)?,
        Some(base) => {
            control.snapshot_above([state.as_fd(), memory.as_fd(), base.as_fd()], &contents, false)?
        }
    };
    let held_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    still.go_on()?;

    let hello = live.agent.hello();
    Ok(SavedMachine {
        cpus: sandbox.size.cpus,
        memory_mib: sandbox.size.memory,
        growth,
        contents,
        plugged: layout.plugged,
        slots: slots_with(&layout.slots, &disks),
        devices: layout.devices.clone(),
        cards: cards.addresses(),
        disks,
        root: subject.root,
        protocol: hello.version,
        agent_version: hello.agent_version.clone(),
        kernel_release: hello.kernel_release.clone(),
        memory_bytes,
        base: saving.base.map(|it| it.base.clone()),
        state_bytes,
        held_ms,
    })
}

/// The places for disks that are left: one goes with the disk that was in it.
fn slots_with(slots: &[SavedSlot], disks: &[SavedDisk]) -> Vec<SavedSlot> {
    let there = |serial: &String| disks.iter().any(|disk| disk.serial == *serial);
    slots.iter().filter(|slot| slot.serial.as_ref().is_none_or(there)).cloned().collect()
}

/// What is to be saved, if all of it can be.
fn subject(sandbox: &MachineSandbox, container: &str) -> Result<Subject, Failure> {
    let refuse = |why: &str| Err(Failure::new(format!("container {container} cannot be saved: {why}")));
    sandbox.check_network()?;
    let members = sandbox.members();
    let Some(member) = members.get(container).filter(|_| members.len() == 1) else {
        return refuse("its machine is not its alone");
    };
    if member.is_unstarted() {
        return refuse("it has not been started");
    }
    if let Some(target) = member.volumes.first_of_host() {
        return refuse(&format!("{target} is a volume, and what is on the host cannot be saved with it"));
    }
    let disks = member.rootfs().to_vec();
    if disks.iter().filter(|disk| !disk.read_only).count() > 1 {
        return refuse("it writes to several disks");
    }
    Ok(Subject { root: member.root.clone(), disks })
}

/// Keeps a disk as it is now, unless it is only told of: one that is only read by another name, the other as a copy.
fn keep(disk: &Disk, to: Option<&Path>) -> Result<SavedDisk, Failure> {
    let path = disk.path.display();
    let failed = || format!("cannot keep disk {path}");
    let from = File::open(&disk.path).context(failed).map_err(|failure| match failure.source_kind() {
        Some(ErrorKind::NotFound) => failure.help("its image was removed meanwhile: run the container anew"),
        _ => failure,
    })?;
    let facts = from.metadata().context(failed)?;
    if !facts.is_file() {
        let why = Failure::new("it is no file but a device of the host").refused();
        return Err(Failure::because(failed(), why));
    }
    if let Some(to) = to
        && (!disk.read_only || link(&disk.path, to).is_err())
    {
        copy_sparse(&from, &create(to)?, facts.len()).context(failed)?;
    }
    Ok(SavedDisk { serial: disk.serial.clone(), read_only: disk.read_only, bytes: facts.len() })
}

/// An image in the cache is never changed, only removed: by another name it stays.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    let from: PathBuf = fs::canonicalize(from)?;
    fs::hard_link(from, to)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_disk_that_is_only_read_is_kept_by_another_name_and_one_that_is_written_as_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, "image").unwrap();
        let disk = |read_only| Disk { path: path.clone(), read_only, serial: "s".into(), throwaway: false };
        let (linked, copied) = (dir.path().join("linked"), dir.path().join("copied"));
        let saved = keep(&disk(true), Some(&linked)).unwrap();
        assert_eq!(saved, SavedDisk { serial: "s".into(), read_only: true, bytes: 5 });
        keep(&disk(false), Some(&copied)).unwrap();
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        assert_eq!(inode(&path), inode(&linked));
        assert_ne!(inode(&path), inode(&copied));
        assert_eq!(fs::read(&copied).unwrap(), b"image");
        fs::remove_file(&path).unwrap();
        assert_eq!(fs::read(&linked).unwrap(), b"image");
        let gone = keep(&disk(true), Some(&dir.path().join("none"))).unwrap_err().report();
        assert!(gone.contains("run the container anew"), "{gone}");
    }

    #[test]
    fn a_place_is_gone_with_the_disk_that_was_in_it() {
        let slot = |serial: Option<&str>| SavedSlot { read_only: true, serial: serial.map(str::to_owned) };
        let disk = SavedDisk { serial: "b".into(), read_only: true, bytes: 1 };
        let slots = [slot(Some("a")), slot(None), slot(Some("b"))];
        assert_eq!(slots_with(&slots, &[disk]), slots[1..]);
    }

    #[test]
    fn a_device_of_the_host_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk { path: "/dev/null".into(), read_only: true, serial: "s".into(), throwaway: false };
        let report = keep(&disk, Some(&dir.path().join("d"))).unwrap_err().report();
        assert!(report.contains("a device of the host"), "{report}");
    }
}
