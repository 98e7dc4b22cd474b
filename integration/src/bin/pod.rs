//! `pod`: the least client of the container runtime interface, for machines without `crictl`.

use std::io::{Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mvm_integration::containerd::Cri;
use mvm_integration::containerd::cri::messages::{
    ContainerConfig, ContainerMetadata, CreateContainer, ExecSync, Id, ImageSpec, PodSandboxConfig,
    PodSandboxMetadata, RunPodSandbox,
};

/// Pods of a containerd, one call each.
#[derive(Debug, Parser)]
#[command(name = "pod", version)]
struct Arguments {
    /// containerd's socket
    #[arg(long, default_value = "/run/containerd/containerd.sock", value_name = "SOCKET")]
    address: PathBuf,
    #[command(subcommand)]
    call: Call,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// Make a pod; prints its id
    Run {
        /// The runtime's handler in containerd's configuration
        #[arg(long, default_value = "mvm")]
        handler: String,
        /// Its name
        name: String,
    },
    /// Start a container in a pod; prints its id
    Start {
        /// The pod's id
        pod: String,
        /// Its name
        name: String,
        /// A reference that containerd has
        image: String,
        /// The command
        #[arg(trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Run a command in a container to its end; its exit code is this program's
    Exec {
        /// The container's id
        container: String,
        /// The command
        #[arg(trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Print a pod's address
    Address {
        /// The pod's id
        pod: String,
    },
    /// End and remove a pod and its containers
    Remove {
        /// The pod's id
        pod: String,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match call(&Cri::new(&arguments.address), arguments.call) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            let _ = writeln!(stderr(), "pod: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

fn config(name: &str) -> PodSandboxConfig {
    let metadata = PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "default".into() };
    PodSandboxConfig { metadata: Some(metadata), hostname: name.into(), ..Default::default() }
}

fn call(cri: &Cri, call: Call) -> Result<u8, Box<dyn std::error::Error>> {
    match call {
        Call::Run { handler, name } => {
            let id = cri.run_pod(&RunPodSandbox { config: Some(config(&name)), runtime_handler: handler })?;
            writeln!(stdout(), "{}", id.id)?;
        }
        Call::Start { pod, name, image, command } => {
            let container = ContainerConfig {
                metadata: Some(ContainerMetadata { name: name.clone() }),
                image: Some(ImageSpec { image }),
                command,
                ..Default::default()
            };
            let id = cri.create(&CreateContainer {
                pod_sandbox_id: pod,
                config: Some(container),
                sandbox_config: Some(config(&name)),
            })?;
            cri.start(&id)?;
            writeln!(stdout(), "{}", id.id)?;
        }
        Call::Exec { container, command } => {
            let answer = cri.exec(&ExecSync { container_id: container, cmd: command, timeout: 0 })?;
            stdout().write_all(&answer.stdout)?;
            stderr().write_all(&answer.stderr)?;
            return Ok(u8::try_from(answer.exit_code).unwrap_or(u8::MAX));
        }
        Call::Address { pod } => {
            writeln!(stdout(), "{}", cri.pod_status(&pod)?.network.unwrap_or_default().ip)?;
        }
        Call::Remove { pod } => {
            let id = Id { id: pod };
            cri.stop_pod(&id)?;
            cri.remove_pod(&id)?;
        }
    }
    Ok(0)
}
