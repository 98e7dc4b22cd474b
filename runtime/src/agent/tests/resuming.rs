//! An agent whose machine is saved and goes on with another host; and what its containers learn of that.

use std::{io::Read, process::Child};

use mvm_protocol::{FailureKind, Identity, Lower, Surroundings};
use tempfile::TempDir;

use super::{
    containers::{inside, root},
    guest::{Guest, MACHINE_ID, SOON, identity, shell, start_agent},
};
use crate::agent::{AgentClient, AgentListener, Error};

/// An agent that outlives its hosts.
pub(super) struct Survivor {
    pub(super) dir: TempDir,
    agent: Child,
}

impl Survivor {
    /// The agent and its first host.
    pub(super) fn new() -> (Self, AgentListener, AgentClient) {
        let dir = tempfile::tempdir().unwrap();
        let listener = AgentListener::bind(&dir.path().join("vsock")).unwrap();
        let agent = start_agent(dir.path());
        let client = listener.accept(identity(), SOON).unwrap();
        (Self { dir, agent }, listener, client)
    }

    /// Another host, at which the agent arrives by itself.
    pub(super) fn greet(&self, hostname: &str) -> (AgentListener, AgentClient) {
        let listener = AgentListener::bind(&self.dir.path().join("vsock")).unwrap();
        let identity = Identity { hostname: hostname.to_owned(), ..identity() };
        let client = listener.accept(identity, SOON).unwrap();
        (listener, client)
    }
}

impl Drop for Survivor {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn output(client: &AgentClient, script: &str) -> String {
    let mut process = client.start(shell(script)).unwrap();
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    client.wait(process.id, Some(SOON)).unwrap();
    text
}

#[test]
fn an_agent_whose_machine_was_saved_awaits_its_next_host_and_is_then_who_that_says() {
    let (agent, listener, client) = Survivor::new();
    client.prepare().unwrap();
    // Nobody is there for a while: it does not give up, as it would with a host that just went away.
    drop((listener, client));
    let (_listener, client) = agent.greet("clone");
    assert!(client.hello().connection > 0, "it was not booted anew");
    assert_eq!(output(&client, "hostname"), "clone\n");
}

#[test]
fn a_machine_that_is_saved_again_awaits_again() {
    let (agent, mut listener, mut client) = Survivor::new();
    for name in ["one", "two"] {
        client.prepare().unwrap();
        drop((listener, client));
        (listener, client) = agent.greet(name);
        assert_eq!(output(&client, "hostname"), format!("{name}\n"));
    }
}

#[test]
fn a_prepared_agent_only_says_that_it_is_there() {
    let (_agent, _listener, client) = Survivor::new();
    client.prepare().unwrap();
    client.ping().unwrap();
    for refused in [client.sync(), client.prepare(), client.start(shell("true")).map(drop)] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Refused { kind: FailureKind::Busy, .. }), "{error}");
    }
}

#[test]
fn a_machine_with_a_process_or_a_container_is_no_template() {
    let guest = Guest::new();
    let busy = || {
        let error = guest.client.prepare().unwrap_err();
        matches!(error, Error::Refused { kind: FailureKind::Busy, .. })
    };
    let process = guest.sh("exec sleep 1000");
    assert!(busy());
    guest.client.signal(process.id, libc::SIGKILL, mvm_protocol::SignalTarget::Process).unwrap();
    guest.client.wait(process.id, Some(SOON)).unwrap();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    assert!(busy());
    guest.client.remove_root("c1").unwrap();
    guest.client.prepare().unwrap();
}

#[test]
fn a_container_learns_the_id_of_its_machine_unless_its_image_has_one() {
    let guest = Guest::new();
    let plain = root(&guest, "plain", Surroundings::default());
    let mut named = root(&guest, "named", Surroundings::default());
    let own = guest.dir.path().join("own");
    std::fs::create_dir_all(own.join("etc")).unwrap();
    std::fs::write(own.join("etc/machine-id"), "its own\n").unwrap();
    named.lower.insert(0, Lower::Directory(own.to_str().unwrap().to_owned()));
    let texts = [plain, named].map(|request| {
        let id = request.id.clone();
        guest.client.set_up_root(request).unwrap();
        let mut process = guest.client.start(inside(&id, "read id < /etc/machine-id; echo $id")).unwrap();
        let mut text = String::new();
        process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(texts, [format!("{MACHINE_ID:032x}\n"), "its own\n".to_owned()]);
}

#[test]
fn a_clock_that_is_right_is_found_right_and_a_trial_runs_clock_is_never_set() {
    let guest = Guest::new();
    guest.client.correct_clock().unwrap();
    let error = guest.client.done(mvm_protocol::Request::AdjustClock { by_ns: 1 }, SOON).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::Invalid, .. }), "{error}");
}
