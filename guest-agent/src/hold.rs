//! A machine that is saved with containers in it: everything stands still until it goes on, here or elsewhere.
//!
//! Where it goes on from what was saved, the connections to the host have ended. The agent dials anew, the new host
//! says who the machine is, has the streams of processes opened again, and releases it.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use mvm_protocol::{Reply, Request, Stdio};

use crate::{
    agent::Agent,
    error::{Context, Error, Result},
    kmsg,
    requests::dial_stream,
    streams::Kind,
    sys,
};

/// What stands still besides processes and streams.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Directories of file systems that are frozen.
    filesystems: Vec<OwnedFd>,
}

impl Held {
    fn freeze(&mut self, path: &str) -> Result<()> {
        let failed = || format!("cannot freeze the file system at {path}");
        let directory = OwnedFd::from(File::open(path).context(failed)?);
        sys::freeze_filesystem(directory.as_fd()).context(failed)?;
        self.filesystems.push(directory);
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for filesystem in &self.filesystems {
            if let Err(errno) = sys::thaw_filesystem(filesystem.as_fd()) {
                kmsg::say(&format!("cannot thaw a file system: {errno}"));
            }
        }
    }
}

impl Agent {
    /// Whether a request is served now: while the machine is saved almost none is.
    pub(crate) fn serves(&self, request: &Request) -> bool {
        match request {
            Request::Ping | Request::Shutdown { .. } => true,
            Request::List | Request::Attach { .. } | Request::Release => !self.awaiting,
            _ => !self.awaiting && self.held.is_none(),
        }
    }

    /// Nothing reaches disks or host from here on.
    pub(crate) fn hold(&mut self) -> Result<()> {
        let idle = self.syncs.is_empty()
            && self.pending.is_empty()
            && self.forwards.iter().all(Option::is_none)
            && self.shutdown.is_none();
        if !idle {
            return Err(Error::Busy("the guest has something under way"));
        }
        if !self.containers.are_frozen() {
            return Err(Error::Busy("a container is not frozen"));
        }
        let mut held = Held::default();
        self.containers.storage.writable().try_for_each(|path| held.freeze(path))?;
        self.streams.hold(&self.epoll);
        self.held = Some(held);
        Ok(())
    }

    /// Everything goes on, if it was held.
    pub(crate) fn release(&mut self) {
        if self.held.take().is_none() {
            return;
        }
        for process in self.streams.release(&self.epoll) {
            let event = self.table.output_ended(process);
            self.emit(event);
        }
    }

    /// Opens the streams of a process anew.
    pub(crate) fn attach(&mut self, process: u64, stdio: &Stdio) -> Result<Reply> {
        if self.held.is_none() {
            return Err(Error::Invalid("the machine is not held".into()));
        }
        let entry = self.table.entries().into_iter().find(|entry| entry.process == process);
        let entry = entry.ok_or_else(|| Error::NotFound(format!("no process {process} is on record")))?;
        let wanted = match stdio {
            Stdio::Pipes { stdin, stdout, stderr } => {
                vec![(Kind::Input, *stdin), (Kind::Output, *stdout), (Kind::ErrorOutput, *stderr)]
            }
            Stdio::Terminal { stream, .. } => vec![(Kind::Terminal, Some(*stream))],
        };
        for (kind, token) in wanted {
            if let Some(token) = token {
                self.streams.attach(process, kind, dial_stream(&*self.dialer, token)?);
            }
        }
        Ok(Reply::Started { pid: entry.pid })
    }

    /// Tells a container that goes on who it is now.
    pub(crate) fn rename(&mut self, root: &str, hostname: Option<&str>) -> Result<()> {
        if let Some(name) = hostname {
            self.containers.root(root)?.rename_host(name)?;
        }
        self.containers.tell_id(root)
    }
}
