//! Calls about a machine that is saved with containers in it, and that goes on from that.

use std::{sync::atomic::Ordering, time::Instant};

use mvm_protocol::{ProcessEntry, Request};

use super::{
    client::{AgentClient, CALL_TIME, LONG_CALL_TIME, within},
    error::{Error, Result},
    processes::{Process, StdioSpec, stdio},
};

/// Above all numbers of processes that a guest can have been given in its life: one that claims more lies.
const MOST_NUMBERS: u64 = 1 << 48;

impl AgentClient {
    /// Has everything in the guest stand still until [`AgentClient::release`]; all containers must be frozen. By then
    /// its disks hold what was written.
    pub fn hold(&self) -> Result<()> {
        self.done(Request::Hold, LONG_CALL_TIME)
    }

    /// Lets everything go on.
    pub fn release(&self) -> Result<()> {
        self.done(Request::Release, CALL_TIME)
    }

    /// The processes that another host has started, in a machine that goes on; no more than a guest may have.
    /// Processes started from here on get other numbers.
    pub fn take_over(&self) -> Result<Vec<ProcessEntry>> {
        let processes = self.list()?;
        let most = processes.iter().map(|entry| entry.process).max().unwrap_or(0);
        if most >= MOST_NUMBERS {
            return Err(Error::WrongReply);
        }
        self.next_id.fetch_max(most.saturating_add(1), Ordering::Relaxed);
        processes.iter().try_for_each(|entry| self.shared.begin_process(entry.process))?;
        Ok(processes)
    }

    /// Opens the streams of a process anew that another host has started. The machine must be held still.
    pub fn attach(&self, process: u64, spec: StdioSpec) -> Result<Process> {
        let (stdio, tokens) = stdio(spec)?;
        self.shared.expect_streams(&tokens);
        let request = Request::Attach { process, stdio: stdio.clone() };
        let result = self.started(request, process, &stdio, Instant::now() + LONG_CALL_TIME);
        if result.is_err() {
            self.shared.forget_streams(&tokens);
        }
        result
    }

    /// Tells a container that goes on the name of its host, if it has another, and the id of its machine.
    pub fn rename(&self, root: &str, hostname: Option<&str>) -> Result<()> {
        let (root, hostname) = (root.to_owned(), hostname.map(str::to_owned));
        self.done(Request::Rename { root, hostname }, CALL_TIME)
    }

    /// Has the guest let go of the network card of this hardware address before it is unplugged, by `end` at the
    /// latest.
    pub fn eject_card_by(&self, mac: [u8; 6], end: Instant) -> Result<()> {
        self.done(Request::EjectCard { mac }, within(CALL_TIME, end)?)
    }
}
