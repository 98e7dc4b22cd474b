//! Makes sandboxes of machines on this host.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::machine::MachineSandbox;
use super::{Launcher, Sandbox, SandboxRequest};
use crate::container::state_dir;
use crate::failure::{Context, Failure};
use crate::spec;

/// Boots sandboxes as machines of this host.
#[derive(Clone, Debug)]
pub struct MachineLauncher {
    /// Where images and guests are cached, see [`state_dir`].
    pub state: PathBuf,
    /// The annotations of a specification that are heeded; one of mvm's that is not among them is refused.
    pub allowed_annotations: Vec<String>,
    /// What the host has to give.
    pub host: spec::Host,
}

impl Default for MachineLauncher {
    /// For this host, with the annotations about sizes.
    fn default() -> Self {
        Self {
            state: state_dir(),
            allowed_annotations: spec::ALLOWED.map(str::to_owned).to_vec(),
            host: spec::Host::this(),
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
        let sandbox = MachineSandbox::new(self, request)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&request.directory)
            .context(|| format!("cannot make {}", request.directory.display()))?;
        let sandbox = Arc::new(sandbox);
        if request.pod
            && let Err(failure) = sandbox.start_machine(Vec::new())
        {
            let _ = sandbox.end();
            return Err(failure);
        }
        Ok(sandbox)
    }
}
