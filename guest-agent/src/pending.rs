//! Requests about a container that are answered when its processes have followed.

use mvm_protocol::Reply;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use crate::{
    agent::{Agent, root_key},
    error::{Error, Result},
    sys,
};

/// A request that waits.
pub(crate) struct Pending {
    request: u64,
    /// The container root's id.
    root: String,
    awaited: Awaited,
}

/// What a request waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// All processes are stopped, or may run.
    Frozen(bool),
    /// There are no processes.
    Empty,
}

impl Agent {
    /// Stops or continues a container's processes.
    pub(crate) fn freeze(&mut self, request: u64, root: &str, frozen: bool) -> Result<()> {
        self.containers.cgroup_of(root)?;
        if let Some(cgroup) = &mut self.containers.root_mut(root)?.cgroup {
            cgroup.freeze(frozen)?;
        }
        self.wait_for(request, root, Awaited::Frozen(frozen));
        Ok(())
    }

    /// Kills what is left in a container; its root goes when the last process has gone.
    pub(crate) fn remove_root(&mut self, request: u64, id: &str) -> Result<()> {
        let root = self.containers.root_mut(id)?;
        root.leaving = true;
        if let Some(cgroup) = &root.cgroup {
            let _ = cgroup.signal(libc::SIGKILL);
        }
        for pid in self.table.running_in(id) {
            let _ = sys::kill(nix::unistd::Pid::from_raw(-pid.as_raw()), libc::SIGKILL);
        }
        self.wait_for(request, id, Awaited::Empty);
        Ok(())
    }

    fn wait_for(&mut self, request: u64, root: &str, awaited: Awaited) {
        if let Some(slot) = self.containers.slot(root)
            && let Some((_, cgroup)) = self.containers.cgroup(slot)
        {
            // Another request may have begun to watch it.
            let _ =
                self.epoll.add(&cgroup.state, EpollEvent::new(EpollFlags::EPOLLPRI, root_key(slot, true)));
        }
        self.pending.push(Pending { request, root: root.to_owned(), awaited });
        self.settle();
    }

    /// Answers the requests whose containers have followed by now.
    pub(crate) fn settle(&mut self) {
        let mut at = 0;
        while let Some(pending) = self.pending.get(at) {
            let Some(answer) = self.outcome(pending) else {
                at += 1;
                continue;
            };
            let Pending { request, root, awaited } = self.pending.swap_remove(at);
            if awaited == Awaited::Empty && answer.is_ok() {
                self.containers.remove(&root);
            }
            self.respond(request, answer.map(|()| Reply::Done));
        }
        self.stop_watching();
    }

    fn outcome(&self, pending: &Pending) -> Option<Result<()>> {
        let root = match self.containers.root(&pending.root) {
            Ok(root) => root,
            Err(error) => return Some(Err(error)),
        };
        let cgroup = root.cgroup.as_ref();
        match pending.awaited {
            Awaited::Empty => {
                let empty = self.table.running_in(&pending.root).next().is_none();
                (empty && cgroup.is_none_or(|it| it.empty())).then_some(Ok(()))
            }
            Awaited::Frozen(wanted) => match cgroup {
                Some(cgroup) if cgroup.freezing != wanted => {
                    Some(Err(Error::Busy("a later request decided otherwise")))
                }
                Some(cgroup) => (cgroup.frozen() == wanted).then_some(Ok(())),
                None => Some(Ok(())),
            },
        }
    }

    /// A cgroup that nobody waits for would wake the loop with every process.
    fn stop_watching(&mut self) {
        for slot in 0..self.containers.slots() {
            let epoll = &self.epoll;
            if let Some((id, cgroup)) = self.containers.cgroup(slot)
                && !self.pending.iter().any(|it| it.root == id)
            {
                let _ = epoll.delete(&cgroup.state);
            }
        }
    }
}
