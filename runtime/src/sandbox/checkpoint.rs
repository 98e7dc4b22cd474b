//! A container's machine is saved for its engine to keep, and goes on from what an engine kept.
//!
//! The layers of the root file system are the engine's as well: it gives them again where the container goes on, and they
//! must be the same to the byte, because the guest has parts of them in its memory. So must be the machine's size and
//! that of the disk of writes: a checkpoint may come from anywhere, and takes no more of the host than its container's
//! specification gives it.

use std::fs;
use std::path::{Path, PathBuf};

use mvm_vmm::layout::plugged_in;

use super::limits::Sizes;
use super::machine::MachineSandbox;
use super::member::root_name;
use super::restore::{self, Then};
use super::save::{Saving, save};
use super::{CheckpointRequest, ContainerRequest, RestoreRequest};
use crate::agent::{Process, StdioSpec};
use crate::catalog::create;
use crate::digest::sha256;
use crate::failure::{Context, Failure};
use crate::machine::{Disk, Snapshot};
use crate::rootfs::{self, LAYER_DISKS, Prepared};
use crate::snapshot::{
    Checkpoint, Going, Opened, Piece, SavedDisk, SavedGrowth, Snapshots, memory_file, state_file,
};
use crate::whole_file::write_whole;

/// Saves the machine of `sandbox` with its only container into a directory of its engine's.
pub(super) fn write(
    sandbox: &MachineSandbox,
    container: &str,
    request: &CheckpointRequest,
) -> Result<(), Failure> {
    let failed = || format!("cannot checkpoint container {container}");
    let live = sandbox.stages.running()?;
    // What stands still is not kept waiting for an engine's directory, which may be anywhere.
    let scratch = Snapshots::of(&sandbox.state).begin()?;
    let saving = Saving { directory: scratch.path(), with_layers: false, paused: request.paused, base: None };
    let machine = save(sandbox, container, &saving).context(failed)?;
    let (disks, process) = {
        let members = sandbox.members();
        let member = members.get(container);
        let disks = member.map(|member| member.rootfs().to_vec()).unwrap_or_default();
        (disks, member.and_then(|member| member.init()))
    };
    let process = process.ok_or_else(|| Failure::new("it was removed meanwhile")).context(failed)?;
    let layers = disks.iter().filter(|disk| disk.read_only).map(|disk| digest(&disk.path));
    let layers = layers.collect::<Result<Vec<_>, _>>().context(failed)?;
    // While it runs: the program may be replaced on disk, and is another there.
    let program = PathBuf::from(format!("/proc/{}/exe", live.pid));
    let checkpoint =
        Checkpoint::of(machine, (process, request.terminal), layers, &program).context(failed)?;
    checkpoint.write(scratch.path(), &request.directory).context(failed)
}

/// Has a new sandbox's machine go on from a checkpoint; the container's first process, which stands still.
pub(super) fn restore(
    sandbox: &mut MachineSandbox,
    container: &ContainerRequest,
    from: &RestoreRequest,
) -> Result<Process, Failure> {
    let opened = Opened::open(&from.checkpoint)?;
    let checkpoint = &opened.checkpoint;
    opened.check_host()?;
    let sizes = Sizes::of(container.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()));
    check_fit(sandbox, &sizes, checkpoint, from.stdio).map_err(Failure::refused)?;
    let directory = sandbox.directory.join(root_name(&container.id));
    fs::create_dir_all(&directory).context(|| format!("cannot make {}", directory.display()))?;
    let mut rootfs = prepare(sandbox, container, &directory)?;
    let disks = same_disks(&rootfs.disks, checkpoint)?;

    // A file of memory that is mapped may go once it is.
    let scratch = Snapshots::of(&sandbox.state).begin()?;
    let snapshot = Snapshot {
        source: None,
        base: None,
        working_set: None,
        state: state_file(scratch.path()),
        memory: memory_file(scratch.path()),
        contents: checkpoint.machine.contents.clone(),
    };
    for (piece, path) in [(Piece::State, &snapshot.state), (Piece::Memory, &snapshot.memory)] {
        let file = create(path)?;
        opened.unpack(piece, &file)?;
    }
    if let Some(disk) = disks.iter().find(|disk| !disk.read_only) {
        write_whole(&disk.path, |file| opened.unpack(Piece::Writes, file))?;
    }
    let going = Going {
        machine: checkpoint.machine.clone(),
        snapshot,
        disks: disks.clone(),
        process: checkpoint.process,
        stdio: from.stdio,
        hostname: container.spec.hostname().clone(),
        record: None,
    };
    rootfs.disks = disks;
    restore::restore(sandbox, container, &going, (rootfs, Then::Wait))
}

/// The root file system that the engine gives the container.
fn prepare(
    sandbox: &MachineSandbox,
    container: &ContainerRequest,
    directory: &Path,
) -> Result<Prepared, Failure> {
    let root = container.spec.root().as_ref().map(|root| container.bundle.join(root.path()));
    let request = rootfs::Request {
        container: &container.id,
        mounts: &container.rootfs,
        root: root.as_deref(),
        upper: sandbox.upper(&container.spec)?,
        directory,
        layer_disks: LAYER_DISKS,
    };
    rootfs::prepare(&request, &sandbox.state, &mut ())
        .context(|| format!("cannot make the root file system of {}", container.id))
}

/// Whether the machine of the checkpoint is the one that the container is to have.
fn check_fit(
    sandbox: &MachineSandbox,
    sizes: &Sizes,
    checkpoint: &Checkpoint,
    stdio: StdioSpec,
) -> Result<(), Failure> {
    let (machine, size) = (&checkpoint.machine, &sandbox.size);
    // What it was given counts as what it began with, in the blocks that it comes in.
    let (memory, wanted, fits) = match machine.growth {
        None => (machine.memory_mib.mib(), size.memory, machine.memory_mib == size.memory),
        Some(SavedGrowth { usable_mib, .. }) => {
            let (ram, wanted) = (machine.memory_mib, sandbox.memory_of(sizes));
            let rest = wanted.bytes().checked_sub(ram.bytes());
            let fits = rest.is_some_and(|rest| usable_mib << 20 <= plugged_in(ram.bytes(), rest));
            (ram.mib().saturating_add(usable_mib), wanted, fits)
        }
    };
    if machine.cpus != size.cpus || !fits {
        let describe = |cpus: u8, mib: u64| format!("{cpus} CPUs and {mib} MiB");
        let saved = describe(machine.cpus.get(), memory);
        let wanted = describe(size.cpus.get(), wanted.mib());
        return Err(Failure::new(format!(
            "the checkpoint is of a machine with {saved}, and the container is to have one with {wanted}"
        ))
        .help("restore it with the limits and annotations that it had"));
    }
    if checkpoint.terminal != matches!(stdio, StdioSpec::Terminal(_)) {
        let has = if checkpoint.terminal { "has a" } else { "has no" };
        return Err(Failure::new(format!("the process in the checkpoint {has} terminal")));
    }
    Ok(())
}

/// The disks that the engine gives the container by the names that the guest knows, if they are those it had.
fn same_disks(given: &[Disk], checkpoint: &Checkpoint) -> Result<Vec<Disk>, Failure> {
    let other = |why: String| {
        Failure::new(format!("the container has another root file system than the checkpoint's: {why}"))
            .help("restore it with the image and the snapshotter that it had")
            .refused()
    };
    let saved = &checkpoint.machine.disks;
    if given.len() != saved.len() {
        return Err(other(format!("{} disks instead of {}", given.len(), saved.len())));
    }
    let mut layers = checkpoint.layers.iter();
    let mut disks = Vec::with_capacity(given.len());
    for (disk, SavedDisk { serial, read_only, bytes }) in given.iter().zip(saved) {
        let path = disk.path.display();
        let facts = fs::metadata(&disk.path).context(|| format!("cannot look at {path}"))?;
        if !facts.is_file() || disk.read_only != *read_only {
            return Err(other(format!("{path} is of another kind")));
        }
        if facts.len() != *bytes {
            return Err(other(format!("{path} has {} bytes, and {bytes} were saved", facts.len())));
        }
        if *read_only && layers.next() != Some(&digest(&disk.path)?) {
            return Err(other(format!("the content of {path} is not what it was")));
        }
        disks.push(Disk { serial: serial.clone(), ..disk.clone() });
    }
    Ok(disks)
}

fn digest(path: &Path) -> Result<String, Failure> {
    sha256(path).context(|| format!("cannot digest {}", path.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox::machine::tests::{alone, planned};
    use crate::snapshot::checkpoint_of;

    fn given(directory: &Path) -> Vec<Disk> {
        let disk = |name: &str, text: &str, read_only| {
            let path = directory.join(name);
            fs::write(&path, text).unwrap();
            Disk { path, read_only, serial: format!("new-{name}"), throwaway: false }
        };
        vec![disk("layer", "data", true), disk("writes", "......", false)]
    }

    #[test]
    fn disks_are_the_engines_under_the_names_that_the_guest_knows_if_they_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let disks = given(dir.path());
        let checkpoint = checkpoint_of(vec![digest(&disks[0].path).unwrap()]);
        let same = same_disks(&disks, &checkpoint).unwrap();
        assert_eq!([&same[0].serial, &same[1].serial], ["a-1", "a-2"]);
        assert_eq!([&same[0].path, &same[1].path], [&disks[0].path, &disks[1].path]);
        let refused = |disks: &[Disk]| {
            let failure = same_disks(disks, &checkpoint).unwrap_err();
            assert!(failure.is_refusal(), "{}", failure.report());
            failure.report()
        };
        assert!(refused(&disks[..1]).contains("1 disks instead of 2"));
        let mut swapped = disks.clone();
        swapped.reverse();
        assert!(refused(&swapped).contains("another kind"));
        fs::write(&disks[0].path, "date").unwrap();
        assert!(refused(&disks).contains("is not what it was"));
        fs::write(&disks[0].path, "data").unwrap();
        fs::write(&disks[1].path, "grown....").unwrap();
        assert!(refused(&disks).contains("has 9 bytes, and 6 were saved"));
    }

    #[test]
    fn a_machine_of_another_size_or_a_process_with_other_streams_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pipes = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };
        let checkpoint = checkpoint_of(vec!["ab".to_owned()]);
        let sandbox = planned(dir.path(), alone()).unwrap();
        let none = Sizes::default();
        check_fit(&sandbox, &none, &checkpoint, pipes).unwrap();
        let terminal = check_fit(&sandbox, &none, &checkpoint, StdioSpec::Terminal(Default::default()));
        assert!(terminal.unwrap_err().report().contains("has no terminal"));
        let mut spec = alone();
        spec["annotations"] = json!({"io.mvm.memory": "64M"});
        let small = planned(&dir.path().join("small"), spec).unwrap();
        let report = check_fit(&small, &none, &checkpoint, pipes).unwrap_err().report();
        assert!(report.contains("the container is to have one with 1 CPUs and 64 MiB"), "{report}");
    }

    #[test]
    fn a_machine_that_was_given_memory_fits_a_container_that_may_have_as_much_in_all() {
        let dir = tempfile::tempdir().unwrap();
        let pipes = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };
        let fits = |limit_mib: u64, ram_mib: u64, usable_mib: u64| {
            let mut spec = alone();
            spec["linux"]["resources"] = json!({"memory": {"limit": limit_mib << 20}});
            let sizes = Sizes::of(Some(&serde_json::from_value(spec["linux"]["resources"].clone()).unwrap()));
            let mut sandbox = planned(&dir.path().join(format!("{limit_mib}")), spec).unwrap();
            sandbox.host.memory_mib = 4096;
            let mut checkpoint = checkpoint_of(vec!["ab".to_owned()]);
            checkpoint.machine.memory_mib = ram_mib.try_into().unwrap();
            checkpoint.machine.growth = Some(SavedGrowth { most_mib: 4096 << 10, usable_mib });
            check_fit(&sandbox, &sizes, &checkpoint, pipes).map_err(|failure| failure.report())
        };
        // 512 MiB take 576 in all, which are four blocks more than 128.
        assert_eq!([fits(512, 128, 512), fits(512, 128, 0), fits(512, 576, 0)], [const { Ok(()) }; 3]);
        for (ram, usable) in [(128, 640), (576, 128), (1024, 0), (128, u64::MAX >> 20)] {
            let report = fits(512, ram, usable).unwrap_err();
            assert!(report.contains("to have one with 1 CPUs and 576 MiB"), "{report}");
        }
        assert!(
            fits(64, 128, 128).unwrap_err().contains("1 CPUs and 256 MiB, and"),
            "as large as it was once"
        );
    }
}
