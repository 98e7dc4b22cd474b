//! The short answers: `delete`, `-info` and `-v`.

use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use std::{fs, thread};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::state::Resource;
use nix::mount::{MntFlags, umount2};

use crate::bundle::Record;
use crate::events::timestamp;
use crate::flags::Flags;
use crate::{RUNTIME, address, bundle};

/// What containerd (2.2 and later) may leave to the runtime instead of mounting it itself.
const ALLOWED_MOUNTS: &str = "mkdir/*,format/*,erofs";
/// What a task ends with that its shim did not see end: killed.
const KILLED: u32 = 137;
/// How long a daemon that still answers gets to end by itself: it may have been asked to just now.
const ENDING: Duration = Duration::from_secs(2);
/// Longest wait for a killed process to be gone.
const DYING: Duration = Duration::from_secs(5);

/// Removes what is left of a task; nothing that is missing is an error.
///
/// containerd comes here when a daemon is gone, or when it cannot reach it, and at the end of every task. A daemon
/// that ends as it should gives up its socket; one that does not would stay for ever. One that was told to delete the
/// task and has others to serve has taken its record from this bundle.
pub(crate) fn delete(flags: &Flags) -> Result<Vec<u8>, Failure> {
    let bundle = if flags.bundle.is_empty() { PathBuf::from(".") } else { PathBuf::from(&flags.bundle) };
    if let Some(record) = Record::read(&bundle) {
        let is_ending = wait_until(ENDING, || UnixStream::connect(&record.socket).is_err());
        // The daemon first: it would report the machine's loss.
        let ended = [(!is_ending).then_some(record.daemon), record.machine];
        ended.into_iter().flatten().for_each(|process| {
            process.end(DYING);
        });
        if record.directory.starts_with(bundle::MACHINES) && is_plain(&record.directory) {
            remove_directory(&record.directory);
        }
        // A process may count as dead while its last threads hold on to what it had.
        wait_until(DYING, || UnixStream::connect(&record.socket).is_err());
        address::remove_stale(&record.socket);
    }
    // Only a fallback mounts a container's root here; then it must not outlive the container.
    let _ = umount2(&bundle.join("rootfs"), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    response.write_to_bytes().context(|| "cannot encode the answer".to_owned())
}

/// Waits for what is no child of this process, and tells whether it came: nothing but looking tells.
fn wait_until(time: Duration, holds: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + time;
    loop {
        match holds() {
            false if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
            held => return held,
        }
    }
}

/// Whether a path means what it begins with.
fn is_plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// Removes a machine's directory, and before it what its ledger names.
fn remove_directory(directory: &Path) {
    if let Err(failure) = (Resource::Directory { path: directory.to_path_buf() }).undo() {
        log::warn!("{}", failure.report());
    }
    // That of the name space goes with its last machine.
    let _ = directory.parent().map(fs::remove_dir);
}

/// What the runtime can do, as containerd asks before it uses it.
pub(crate) fn info() -> Result<Vec<u8>, Failure> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    let mut info =
        RuntimeInfo { name: RUNTIME.to_owned(), version: MessageField::some(version), ..Default::default() };
    info.annotations.insert("containerd.io/runtime-allow-mounts".to_owned(), ALLOWED_MOUNTS.to_owned());
    info.write_to_bytes().context(|| "cannot encode the answer".to_owned())
}

/// The version, for people.
pub(crate) fn version() -> String {
    format!("containerd-shim-mvm-v2:\n  Version: {}\n  Runtime: {RUNTIME}\n", env!("CARGO_PKG_VERSION"))
}
