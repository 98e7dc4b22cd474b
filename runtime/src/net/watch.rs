//! A network that changes after its name space was handed over: told of when it has settled.
//!
//! Some engines connect the name space only once the container has been made. Nothing polls: the kernel tells of
//! each change, and when it has been quiet for a moment the tables are read again.

use std::io::PipeWriter;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netlink::Netlink;
use super::scan::scan_here;
use super::{Netns, Network};
use crate::failure::{Context, Failure};

/// Changes that are told of: links, addresses, routes and neighbours.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_NEIGH
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE;
/// So long without a change, and the network has settled.
const QUIET: Duration = Duration::from_millis(50);
/// A network that never is quiet is reported this often.
const RESTLESS: Duration = Duration::from_secs(1);

/// Reports come until this is dropped; one that is under way then still ends.
#[derive(Debug)]
pub struct Watch {
    /// Its reader wakes up when this is closed.
    _stop: PipeWriter,
}

/// Watches `netns` and calls `report`, on a thread of its own, with each settled network that differs from the one
/// before; the first from `known`, so that nothing is missed between a scan and this.
///
/// # Errors
/// The name space cannot be entered, or the kernel gives no socket.
pub fn watch(
    netns: &Netns,
    known: Network,
    report: impl FnMut(Network) + Send + 'static,
) -> Result<Watch, Failure> {
    let (stop, writer) = std::io::pipe().context(|| "cannot make a pipe".to_owned())?;
    let (began, beginning) = mpsc::sync_channel(1);
    let netns = netns.clone();
    let thread = move || {
        let socket = netns.enter().and_then(|()| subscribe());
        let name = netns.to_string();
        // The thread is in it; only the guest's own processes need keep it alive.
        drop(netns);
        let (socket, result) = match socket {
            Ok(socket) => (Some(socket), Ok(())),
            Err(failure) => (None, Err(failure)),
        };
        let _ = began.send(result);
        let Some(kernel) = socket else { return };
        if let Err(failure) = (Watcher { kernel, stop, known, report }).run() {
            log::warn!("{name} is no longer watched: {}", failure.report());
        }
    };
    std::thread::Builder::new()
        .name("network watch".to_owned())
        .spawn(thread)
        .context(|| "cannot start a thread".to_owned())?;
    beginning.recv().context(|| "cannot start watching a network".to_owned())??;
    Ok(Watch { _stop: writer })
}

fn subscribe() -> Result<Netlink, Failure> {
    Netlink::with_groups(GROUPS.cast_unsigned()).context(|| "cannot watch a network name space".to_owned())
}

/// What woke the watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Change,
    Silence,
    Stop,
}

struct Watcher<Stop, Report> {
    kernel: Netlink,
    stop: Stop,
    known: Network,
    report: Report,
}

impl<Stop: AsFd, Report: FnMut(Network)> Watcher<Stop, Report> {
    fn run(mut self) -> Result<(), Failure> {
        loop {
            let now = scan_here()?;
            if now != self.known {
                self.known = now.clone();
                (self.report)(now);
            }
            if self.wait(PollTimeout::NONE)? == Wake::Stop || self.settle()? == Wake::Stop {
                return Ok(());
            }
        }
    }

    /// Waits until changes stop coming.
    fn settle(&mut self) -> Result<Wake, Failure> {
        let quiet = PollTimeout::try_from(QUIET).unwrap_or(PollTimeout::ZERO);
        let first = Instant::now();
        while first.elapsed() < RESTLESS {
            self.kernel.drain().context(|| "cannot read word of changes".to_owned())?;
            match self.wait(quiet)? {
                Wake::Change => {}
                wake => return Ok(wake),
            }
        }
        Ok(Wake::Silence)
    }

    fn wait(&self, timeout: PollTimeout) -> Result<Wake, Failure> {
        let mut ready = [
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.kernel.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, timeout) {
            Ok(0) => return Ok(Wake::Silence),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Wake::Change),
            Err(error) => return Err(Failure::because("cannot wait for word of changes", error)),
        }
        let [stop, _] = &ready;
        Ok(if stop.any().unwrap_or(true) { Wake::Stop } else { Wake::Change })
    }
}
