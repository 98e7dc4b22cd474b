//! A checkpoint of a machine that is none: a note of whom it is of. Whoever goes on from it begins anew, stopped, and
//! finds the note in its environment.

use std::fs;
use std::io;

use mvm_runtime::agent::Process;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::sandbox::{CheckpointRequest, ContainerRequest, RestoreRequest};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use oci_spec::runtime::Process as OciProcess;

/// The note.
const NOTE: &str = "note";

pub(super) fn write(container: &str, request: &CheckpointRequest) -> Result<(), Failure> {
    let path = request.directory.join(NOTE);
    let text = format!("{container} paused={} terminal={}", request.paused, request.terminal);
    fs::write(&path, text).context(|| format!("cannot write {}", path.display()))
}

/// The process of a container that goes on: it stops itself first.
pub(super) fn process(container: &ContainerRequest, from: &RestoreRequest) -> Result<OciProcess, Failure> {
    let path = from.checkpoint.join(NOTE);
    let note = fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))?;
    if note == "elsewhere" {
        return Err(Failure::new("it ran on another processor").refused());
    }
    let mut process = container.spec.process().clone().unwrap_or_default();
    let mut args = ["sh", "-c", "kill -STOP $$; exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    args.extend(process.args().clone().unwrap_or_default());
    let mut env = process.env().clone().unwrap_or_default();
    env.push(format!("RESTORED_FROM={note}"));
    process.set_args(Some(args)).set_env(Some(env));
    Ok(process)
}

/// Waits until it has: who resumed it before would be missed.
pub(super) fn await_stop(process: &Process) -> Result<(), Failure> {
    let pid = Pid::from_raw(i32::try_from(process.pid).unwrap_or(i32::MAX));
    let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(pid), flags).context(|| "cannot wait for the process".to_owned())? {
        WaitStatus::Stopped(..) => Ok(()),
        other => Err(Failure::because("the process did not stop", io::Error::other(format!("{other:?}")))),
    }
}
