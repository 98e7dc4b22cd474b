//! A container as an engine starts it, in a machine that boots or goes on from a template.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use mvm_runtime::agent::StdioSpec;
use mvm_runtime::container::{Cost, Overrides, Wishes, spec};
use mvm_runtime::image::{ImageConfig, Rootfs};
use mvm_runtime::net::NetRequest;
use mvm_runtime::sandbox::{
    ContainerRequest, Launcher, MachineLauncher, RootfsMount, Sandbox, SandboxRequest,
};
use mvm_runtime::state::Wish;
use mvm_runtime::template::{Choice, Maker};
use oci_spec::runtime::{Process, Spec};

use super::boot::explain;
use crate::vm;

/// Name of the one container of a machine.
const CONTAINER: &str = "main";
/// Nothing of the process is connected.
const SILENT: StdioSpec = StdioSpec::Pipes { stdin: false, stdout: false, stderr: false };

/// A container whose process runs. Dropping it ends its machine.
pub(super) struct Started {
    pub sandbox: Arc<dyn Sandbox>,
    process: Process,
}

impl Started {
    /// Starts an idle container of this image in a machine of its own, of one CPU and 128 MiB without a network; what
    /// it writes stays in the guest's memory.
    pub(super) fn new(image: &Rootfs, name: &str, template: Choice) -> io::Result<Self> {
        let spec = idle()?;
        let launcher =
            MachineLauncher { state: vm::state(), template, maker: Maker::Thread, ..Default::default() };
        let directory = vm::scratch().join(name);
        let request = SandboxRequest {
            id: name.parse().map_err(io::Error::other)?,
            directory: directory.join("sandbox"),
            spec: spec.clone(),
            pod: false,
            net: Some(NetRequest::default()),
            wish: Wish::default(),
        };
        let sandbox = launcher.boot(&request).map_err(explain)?;
        let process = spec.process().clone().unwrap_or_default();
        let started = Self { sandbox, process };
        let request = ContainerRequest {
            id: CONTAINER.to_owned(),
            rootfs: root(image, &directory)?,
            bundle: directory,
            spec,
        };
        started.sandbox.create(&request).map_err(explain)?;
        started.sandbox.start(CONTAINER, &started.process, SILENT).map_err(explain)?;
        Ok(started)
    }

    /// Runs another process in it to its end.
    pub(super) fn execute(&self, args: &[&str]) -> io::Result<()> {
        let mut process = self.process.clone();
        process.set_args(Some(args.iter().map(|&arg| arg.to_owned()).collect()));
        let process = self.sandbox.start(CONTAINER, &process, SILENT).map_err(explain)?;
        self.sandbox.wait(process.id).map(drop).map_err(explain)
    }

    /// When each stage ended, in ms since the start of the machine's process.
    pub(super) fn stages(&self) -> Vec<(Cow<'static, str>, f64)> {
        let stages = self.sandbox.timeline().map(|timeline| timeline.since_spawn()).unwrap_or_default();
        stages.into_iter().map(|(stage, ns)| (stage, ns as f64 / 1e6)).collect()
    }

    /// What it costs its host.
    pub(super) fn cost(&self) -> io::Result<Cost> {
        Cost::of(i32::try_from(self.sandbox.pid()).map_err(io::Error::other)?, 128 << 20)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Err(failure) = self.sandbox.end() {
            super::say(&failure.report());
        }
    }
}

fn idle() -> io::Result<Spec> {
    let command = ["sleep", "1000000"].map(str::to_owned).to_vec();
    let overrides = Overrides { command, ..Overrides::default() };
    let wishes = Wishes { overrides, ..Wishes::default() };
    let mut spec = spec(&ImageConfig::default(), &wishes).map_err(explain)?;
    spec.set_annotations(Some([("io.mvm.upper_size".to_owned(), "0".to_owned())].into()));
    Ok(spec)
}

/// The image and a place for what is written over it, as `mvm run` has them.
fn root(image: &Rootfs, directory: &Path) -> io::Result<Vec<RootfsMount>> {
    let writes = directory.join("writes");
    fs::create_dir_all(&writes)?;
    let mount = |kind: &str, source: String, options: &[String]| RootfsMount {
        kind: kind.to_owned(),
        source,
        options: options.to_vec(),
        ..RootfsMount::default()
    };
    let upper = format!("upperdir={}", writes.display());
    Ok(vec![
        mount("erofs", image.path.display().to_string(), &["ro".to_owned()]),
        mount("overlay", "overlay".to_owned(), &["lowerdir={{ mount 0 }}".to_owned(), upper]),
    ])
}
