//! A guest without a machine: the agent's binary, dialling UNIX sockets in a temporary directory.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use mvm_protocol::Identity;
use tempfile::TempDir;

use crate::agent::{AgentClient, AgentListener, Process, ProcessSpec};

/// The id of the guest's machine.
pub(super) const MACHINE_ID: u128 = 0x0123_4567_89ab_4def_8000_0000_0000_0007;

pub(super) const SOON: Duration = Duration::from_secs(20);

/// An agent and the client that talks to it; both end with the value.
pub(super) struct Guest {
    pub(super) client: AgentClient,
    _listener: AgentListener,
    pub(super) dir: TempDir,
    agent: Child,
}

impl Guest {
    /// Starts an agent and greets it.
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = AgentListener::bind(&dir.path().join("vsock")).unwrap();
        let agent = start_agent(dir.path());
        let client = listener.accept(identity(), SOON).unwrap();
        Self { client, _listener: listener, dir, agent }
    }

    /// Runs a shell script with output streams only.
    pub(super) fn sh(&self, script: &str) -> Process {
        self.client.start(shell(script)).unwrap()
    }

    pub(super) fn agent_pid(&self) -> u32 {
        self.agent.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// A shell script as a process.
pub(super) fn shell(script: &str) -> ProcessSpec {
    let mut spec = ProcessSpec::new(["/bin/sh", "-c", script]);
    spec.env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    spec
}

/// Who the guest is told to be.
pub(super) fn identity() -> Identity {
    Identity { hostname: "otter".to_owned(), machine_id: MACHINE_ID, wall_clock_ns: 0, entropy: [0; 32] }
}

/// The agent as a child that dials `<dir>/vsock_<port>`, by somebody who ignores some signals.
pub(super) fn start_agent(dir: &Path) -> Child {
    Command::new("/bin/sh")
        .args(["-c", "trap '' HUP USR1 PIPE; exec \"$0\""])
        .arg(agent_binary())
        .env("MVM_AGENT_DIAL", format!("unix:{}", dir.join("vsock").display()))
        .env("MVM_AGENT_DIR", dir.join("mvm"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// The agent's binary, built by the cargo that runs this test, beside this test's own.
fn agent_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-agent/Cargo.toml");
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built =
            Command::new(cargo).arg("build").arg("--quiet").arg("--manifest-path").arg(manifest).status();
        assert!(built.unwrap().success(), "the agent must build");
        env::current_exe().unwrap().ancestors().nth(2).unwrap().join("mvm-agent")
    })
}
