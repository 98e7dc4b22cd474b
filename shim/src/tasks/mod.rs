//! The state of a shim: its machine, the containers in it and their processes.
//!
//! One actor owns it. Everything else sends it closures, which it runs one after the other; whatever blocks runs on
//! threads and sends a closure when it is done. So there is no lock, and state changes only between two closures.

mod checkpoint;
mod control;
mod create;
mod delete;
mod exit;
mod kill;
mod machine;
mod oom;
mod pod;
mod process;
mod program;
mod start;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use mvm_runtime::sandbox::{Launcher, Sandbox};
use tokio::sync::{mpsc, oneshot, watch};

use crate::bundle::Role;
use crate::error::{Error, Result};
use crate::events::Publisher;
pub(crate) use checkpoint::NewCheckpoint;
use create::Creating;
pub(crate) use create::NewTask;
pub(crate) use machine::Place;
use machine::{Machine, own_thread};
pub(crate) use process::{Exit, Name, Report, Status};
use process::{Process, State, Ticket};

/// Something the actor does.
type Job = Box<dyn FnOnce(&mut Tasks) + Send>;
/// Where the outcome of a call goes. Whoever asked may be gone.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// Reaches the actor.
#[derive(Clone)]
pub(crate) struct Handle(mpsc::UnboundedSender<Job>);

impl Handle {
    /// Has the actor do something.
    pub(crate) fn tell(&self, job: impl FnOnce(&mut Tasks) + Send + 'static) {
        // Without the actor the daemon is about to end.
        let _ = self.0.send(Box::new(job));
    }

    /// Has the actor do something and waits for the outcome. If the caller stops waiting, it is done nevertheless.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Tasks, Reply<T>) + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(move |tasks| question(tasks, reply));
        answer.await.unwrap_or_else(|_| Err(Error::failed("the shim ends")))
    }
}

/// The actor's state.
pub(crate) struct Tasks {
    me: Handle,
    launcher: Arc<dyn Launcher>,
    publisher: Publisher,
    place: Arc<Place>,
    machine: Machine,
    /// How many machines there were: what is told of one later may find another.
    machines: u64,
    containers: BTreeMap<String, Container>,
    /// Containers being made.
    creating: BTreeMap<String, Creating>,
    /// The bundle with the record by which whatever is left of this daemon can be ended.
    keeper: Option<PathBuf>,
    /// What waits for the end of a pod's containers.
    members_over: Vec<Job>,
    /// The daemon is to end when nothing is left to serve.
    end_wanted: bool,
    /// Told when the daemon is to end.
    finished: watch::Sender<bool>,
}

/// One container.
struct Container {
    role: Role,
    bundle: PathBuf,
    init: Process,
    execs: BTreeMap<String, Process>,
    paused: bool,
    /// An operation is under way that others must wait for.
    busy: bool,
    /// That is a checkpoint.
    saving: bool,
    waiting: VecDeque<Job>,
    /// Kills for want of memory that were published.
    memory_kills: u64,
    /// How its init ended, while that waits for its other processes to be over.
    held_exit: Option<Exit>,
}

impl Tasks {
    /// Starts the actor. The receiver turns true when no container is left and the daemon was told to end.
    pub(crate) fn spawn(
        launcher: Arc<dyn Launcher>,
        publisher: Publisher,
        place: Place,
    ) -> (Handle, watch::Receiver<bool>) {
        let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
        let (finished, is_finished) = watch::channel(false);
        let me = Handle(jobs);
        let mut tasks = Self {
            me: me.clone(),
            launcher,
            publisher,
            place: Arc::new(place),
            machine: Machine::Absent,
            machines: 0,
            containers: BTreeMap::new(),
            creating: BTreeMap::new(),
            keeper: None,
            members_over: Vec::new(),
            end_wanted: false,
            finished,
        };
        tokio::spawn(async move {
            while let Some(job) = queue.recv().await {
                job(&mut tasks);
            }
        });
        (me, is_finished)
    }

    /// Ends the daemon if it has nothing to do; tells whether it ends. What is being made is given up.
    pub(crate) fn shut_down(&mut self) -> bool {
        // containerd asks after each deletion: while others are there, what is being made is theirs.
        if self.containers.is_empty() {
            self.creating.values().for_each(Creating::give_up);
            self.end_wanted = true;
        }
        self.end_if_wanted()
    }

    /// Ends the daemon as soon as it has nothing to do. Not every containerd asks again.
    pub(crate) fn shut_down_when_idle(&mut self) {
        self.end_wanted = true;
        self.shut_down();
    }

    /// Ends the daemon if that is wanted and nothing is left to serve; tells whether it ends.
    fn end_if_wanted(&mut self) -> bool {
        let ends = self.end_wanted && self.containers.is_empty() && self.creating.is_empty();
        if ends {
            // Before anybody learns of the end: the next `start` must not find this daemon.
            let _ = std::fs::remove_file(&self.place.socket);
            self.finished.send_replace(true);
        }
        ends
    }

    /// Comes back when all events so far are with containerd.
    pub(crate) fn flushed(&self) -> oneshot::Receiver<()> {
        self.publisher.flushed()
    }

    /// Runs what blocks on a thread, and what follows from it in the actor.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) {
        let me = self.me.clone();
        tokio::task::spawn_blocking(move || {
            let result = work();
            me.tell(move |tasks| then(tasks, result));
        });
    }

    /// The same on a thread of its own: what ends a machine must not queue behind calls that its guest holds up.
    fn apart<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) {
        let me = self.me.clone();
        own_thread(name, move || {
            let result = work();
            me.tell(move |tasks| then(tasks, result));
        });
    }

    fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::not_found("container not created"))
    }

    fn process(&mut self, name: &Name) -> Result<&mut Process> {
        self.container(&name.container)?.process(&name.exec)
    }

    fn ticket(&mut self, name: &Name) -> Result<Ticket> {
        let serial = self.process(name)?.serial;
        Ok(Ticket { name: name.clone(), serial })
    }

    /// The process a ticket is for, if it is still there.
    fn holder(&mut self, ticket: &Ticket) -> Option<&mut Process> {
        self.process(&ticket.name).ok().filter(|process| process.serial == ticket.serial)
    }

    /// The machine, for a call about a container in it.
    fn sandbox(&self) -> Result<Arc<dyn Sandbox>> {
        match &self.machine {
            Machine::Up(sandbox) => Ok(Arc::clone(sandbox)),
            _ => Err(Error::failed_precondition("the machine does not run")),
        }
    }

    /// Does something once no other operation of the container is under way. A container that is not there has none.
    fn when_idle(&mut self, container: &str, job: impl FnOnce(&mut Self) + Send + 'static) {
        match self.containers.get_mut(container) {
            Some(container) if container.busy => container.waiting.push_back(Box::new(job)),
            _ => job(self),
        }
    }

    /// An operation of the container is over: what waited for it goes on.
    fn idle(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id) {
            container.busy = false;
        }
        while let Some(container) = self.containers.get_mut(id)
            && !container.busy
            && let Some(job) = container.waiting.pop_front()
        {
            job(self);
        }
    }
}

impl Container {
    fn new(role: Role, bundle: PathBuf, init: Process) -> Self {
        Self {
            role,
            bundle,
            init,
            execs: BTreeMap::new(),
            paused: false,
            busy: false,
            saving: false,
            waiting: VecDeque::new(),
            memory_kills: 0,
            held_exit: None,
        }
    }

    fn process(&mut self, exec: &str) -> Result<&mut Process> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs.get_mut(exec).ok_or_else(|| Error::not_found("process does not exist"))
    }
}

/// A process's exit, as far as nothing is known of it.
const KILLED: u32 = 137;

fn now() -> SystemTime {
    SystemTime::now()
}
