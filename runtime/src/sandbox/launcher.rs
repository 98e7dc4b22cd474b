//! Makes sandboxes of machines on this host.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::machine::MachineSandbox;
use super::restore::Then;
use super::{ContainerRequest, Launcher, RestoreRequest, Sandbox, SandboxRequest, checkpoint, restore};
use crate::agent::Process;
use crate::container::state_dir;
use crate::failure::{Context, Failure};
use crate::rootfs::Prepared;
use crate::snapshot::Going;
use crate::spec;
use crate::template;
use crate::timeline::Timeline;

/// How often a machine's directory is tried to be made while others remove the one above.
const MAKINGS: usize = 100;

/// Makes sandboxes that are machines of this host: they boot, or go on from templates.
#[derive(Clone, Debug)]
pub struct MachineLauncher {
    /// Where images and guests are cached, see [`state_dir`].
    pub state: PathBuf,
    /// The annotations of a specification that are heeded; one of mvm's that is not among them is refused.
    pub allowed_annotations: Vec<String>,
    /// What the host has to give.
    pub host: spec::Host,
    /// Whether machines are made of templates, unless a specification says otherwise.
    pub template: template::Choice,
    /// Who makes a template that is missing.
    pub maker: template::Maker,
    /// Where a sandbox's stages are written down; without it each has a timeline of its own.
    pub timeline: Option<Timeline>,
}

impl Default for MachineLauncher {
    /// For this host, with all annotations that are known; templates are used as the environment says.
    fn default() -> Self {
        Self {
            state: state_dir(),
            allowed_annotations: spec::ALLOWED.map(str::to_owned).to_vec(),
            host: spec::Host::this(),
            template: template::Choice::of_environment(),
            maker: template::Maker::default(),
            timeline: None,
        }
    }
}

impl Launcher for MachineLauncher {
    /// For a pod the machine is booted now. For a container alone that is left to [`Sandbox::create`], so that the
    /// container's disks are there from the start; until then [`Sandbox::pid`] is 0.
    fn boot(&self, request: &SandboxRequest) -> Result<Arc<dyn Sandbox>, Failure> {
        if mvm_vmm::kvm::probe::is_pvm() {
            // It would take half a minute of interpretation to find out.
            let why = Failure::new(mvm_vmm::kvm::probe::PVM);
            return Err(Failure::because(format!("cannot boot machine {}", request.id), why)
                .help("make lab CMD='mvm run …'"));
        }
        let sandbox = self.plan(request)?;
        if request.pod
            && let Err(failure) = sandbox.start_machine(Vec::new())
        {
            let _ = sandbox.end();
            return Err(failure);
        }
        Ok(Arc::new(sandbox))
    }

    fn restore(
        &self,
        request: &SandboxRequest,
        container: &ContainerRequest,
        going: &Going,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let mut sandbox = self.plan(request)?;
        let rootfs = Prepared::of(going.disks.clone());
        let process = restore::restore(&mut sandbox, container, going, (rootfs, Then::GoOn));
        going_on(sandbox, process)
    }

    fn restore_checkpoint(
        &self,
        request: &SandboxRequest,
        container: &ContainerRequest,
        from: &RestoreRequest,
    ) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
        let mut sandbox = self.plan(request)?;
        let process = checkpoint::restore(&mut sandbox, container, from);
        going_on(sandbox, process)
    }
}

/// The sandbox, unless nothing runs in it.
fn going_on(
    sandbox: MachineSandbox,
    process: Result<Process, Failure>,
) -> Result<(Arc<dyn Sandbox>, Process), Failure> {
    match process {
        Ok(process) => Ok((Arc::new(sandbox), process)),
        Err(failure) => {
            let _ = sandbox.end();
            Err(Failure::because(format!("machine {} does not go on", sandbox.id), failure))
        }
    }
}

impl MachineLauncher {
    /// A sandbox with its directory, and nothing in it.
    fn plan(&self, request: &SandboxRequest) -> Result<MachineSandbox, Failure> {
        let sandbox = MachineSandbox::new(self, request)?;
        make(&request.directory).context(|| format!("cannot make {}", request.directory.display()))?;
        Ok(sandbox)
    }
}

/// Makes a directory and those above it. Whoever ends the last machine in one of those removes it, and that may be
/// between the two.
fn make(directory: &Path) -> io::Result<()> {
    let make = || DirBuilder::new().recursive(true).mode(0o700).create(directory);
    for _ in 1..MAKINGS {
        match make() {
            // The second: another has made the one above, and it was removed before that was seen.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
            made => return made,
        }
    }
    make()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_directory_is_made_though_the_one_above_is_removed_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("namespace");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Fewer than it is tried, so that it comes to be however the two meet.
                let mut left = MAKINGS - 1;
                while left > 0 && !done.load(Ordering::Relaxed) {
                    left -= usize::from(fs::remove_dir(&above).is_ok());
                }
            });
            let made: Vec<_> = (0..100).map(|number| make(&above.join(number.to_string()))).collect();
            done.store(true, Ordering::Relaxed);
            assert!(made.iter().all(Result::is_ok), "{made:?}");
        });
        assert_eq!(fs::read_dir(&above).unwrap().count(), 100);
    }
}
