//! Calls about containers: what they may use, what they use, their files, ports and disks.

use std::{
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use mvm_protocol::{Get, Got, GotContent, Limits, Put, Reply, Request, RootStats, limits};

use super::{
    client::{AgentClient, CALL_TIME, FILE_TIME, LONG_CALL_TIME, left, tokens, within},
    error::{Error, Result, at_most},
};
use crate::failure::cut;

impl AgentClient {
    /// Changes what a container may use.
    pub fn update(&self, root: &str, limits: Limits) -> Result<()> {
        self.done(Request::Update { root: root.to_owned(), limits }, CALL_TIME)
    }

    /// Stops all processes of a container, or lets them go on; returns when they have followed.
    pub fn freeze(&self, root: &str, frozen: bool) -> Result<()> {
        self.done(Request::Freeze { root: root.to_owned(), frozen }, CALL_TIME)
    }

    /// A container's use of its resources, by the guest's own account. The texts are the guest's: bounded, and
    /// not to be believed.
    pub fn root_stats(&self, root: &str) -> Result<RootStats> {
        match self.call(Request::RootStats { root: root.to_owned() }, CALL_TIME)? {
            Reply::RootStats(mut stats) => {
                at_most("files of statistics", stats.files.len(), limits::MAX_STAT_FILES)?;
                at_most("process numbers", stats.pids.len(), limits::MAX_STAT_PIDS)?;
                stats.files.iter_mut().for_each(|(_, text)| cut(text, limits::MAX_STAT_TEXT));
                Ok(stats)
            }
            _ => Err(Error::WrongReply),
        }
    }

    /// Kills what is left in a container and gives its root and disks up; returns when all that is done.
    pub fn remove_root(&self, root: &str) -> Result<()> {
        self.done(Request::RemoveRoot { root: root.to_owned() }, LONG_CALL_TIME)?;
        self.shared.forget_kills(root);
        Ok(())
    }

    /// Puts files into the guest. A file larger than [`limits::MAX_PART`] takes several calls.
    pub fn put(&self, put: Put) -> Result<()> {
        self.done(Request::Put(put), FILE_TIME)
    }

    /// The same, by `end` at the latest.
    pub fn put_by(&self, put: Put, end: Instant) -> Result<()> {
        self.done(Request::Put(put), within(FILE_TIME, end)?)
    }

    /// Reads a part of a file or a directory of the guest.
    pub fn get(&self, get: Get) -> Result<Got> {
        self.got(get, FILE_TIME)
    }

    /// The same, by `end` at the latest.
    pub fn get_by(&self, get: Get, end: Instant) -> Result<Got> {
        self.got(get, within(FILE_TIME, end)?)
    }

    fn got(&self, get: Get, time: Duration) -> Result<Got> {
        match self.call(Request::Get(get), time)? {
            Reply::Got(got) => {
                match &got.content {
                    GotContent::File(part) => at_most("bytes of a file", part.len(), limits::MAX_PART)?,
                    GotContent::Directory(names) => {
                        at_most("names", names.len(), limits::MAX_PART_NAMES)?;
                    }
                    GotContent::Link(_) | GotContent::Other => {}
                }
                Ok(got)
            }
            _ => Err(Error::WrongReply),
        }
    }

    /// A connection to a TCP port of the guest's loopback address. Each direction ends on its own.
    pub fn forward(&self, port: u16) -> Result<UnixStream> {
        let token = tokens(1)?.pop().ok_or(Error::WrongReply)?;
        self.shared.expect_streams(&[token]);
        let end = Instant::now() + CALL_TIME;
        let stream = match self.call_by(Request::Forward { port, stream: token }, end) {
            Ok(Reply::Done) => self.shared.await_stream(token, left(end)),
            Ok(_) => Err(Error::WrongReply),
            Err(error) => Err(error),
        };
        if stream.is_err() {
            self.shared.forget_streams(&[token]);
        }
        stream
    }

    /// Has the guest look for devices that were plugged in.
    pub fn rescan(&self) -> Result<()> {
        self.done(Request::Rescan, CALL_TIME)
    }

    /// Has the guest let go of the disk of this virtio serial before it is unplugged.
    pub fn eject(&self, serial: &str) -> Result<()> {
        self.done(Request::Eject { serial: serial.to_owned() }, CALL_TIME)
    }

    /// The same, by `end` at the latest.
    pub fn eject_by(&self, serial: &str, end: Instant) -> Result<()> {
        self.done(Request::Eject { serial: serial.to_owned() }, within(CALL_TIME, end)?)
    }

    /// Has `heard` told, on the client's thread, of each container root in which the kernel has killed for
    /// want of memory, and how often so far. It must not wait, nor call this client.
    pub fn on_memory_kill(&self, heard: impl Fn(&str, u64) + Send + Sync + 'static) {
        self.shared.on_memory_kill(Arc::new(heard));
    }
}
