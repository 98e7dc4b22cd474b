//! What each request does.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use mvm_protocol::{PidNamespace, Reply, Request, STREAM_PORT, SignalTarget, Start, StreamHeader, Token};
use nix::{
    sys::epoll::{EpollEvent, EpollFlags},
    unistd::Pid,
};

use crate::{
    agent::{Agent, root_key},
    boot::Role,
    clock,
    dial::Dialer,
    error::{Context, Error, Result},
    files, kmsg, network,
    process::{self, StdioFiles, Surroundings, environment, set_nonblocking},
    root::Root,
    shutdown::Shutdown,
    spawn::{PidSpace, Place, Program, launch},
    stats,
    step::Linux,
    streams::{Kind, Stream},
    sys, user,
};

impl Agent {
    /// Serves a request; `None` when the answer comes later.
    pub(crate) fn handle(&mut self, id: u64, request: Request) -> Option<Result<Reply>> {
        let done = |result: Result<()>| result.map(|()| Reply::Done);
        let later = |result: Result<()>| result.err().map(Err);
        if !self.serves(&request) {
            return Some(Err(Error::Busy("the machine is being saved")));
        }
        Some(match request {
            Request::Ping => Ok(Reply::Done),
            Request::Mount(mounts) => done(self.containers.storage.mount_all(&mut Linux, &mounts)),
            Request::SetupRoot(root) => done(self.set_up_root(&root)),
            Request::Configure(configure) => done(self.configure(&configure)),
            Request::Start(start) => self.start(&start),
            Request::Signal { process, signal, target } => done(self.signal(process, signal, target)),
            Request::Resize { process, size } => done(self.streams.resize(process, size)),
            Request::CloseStdin { process } => {
                self.streams.close_input(&self.epoll, process);
                Ok(Reply::Done)
            }
            Request::Forget { process } => done(self.table.forget(process)),
            Request::List => Ok(Reply::Processes(self.table.entries())),
            Request::Stats => Ok(Reply::Stats(stats::read(self.table.all_running().count()))),
            Request::Sync => return later(self.sync(id)),
            Request::Shutdown { mode, grace_ms } => {
                self.release();
                self.shutdown = Some(Shutdown::begin(mode, grace_ms));
                self.signal_all(libc::SIGTERM);
                Ok(Reply::Done)
            }
            Request::Update { root, limits } => {
                done(self.containers.cgroup_of(&root).and_then(|cgroup| cgroup.limit(&limits)))
            }
            Request::Freeze { root, frozen } => return later(self.freeze(id, &root, frozen)),
            Request::RootStats { root } => {
                self.containers.cgroup_of(&root).map(|cgroup| Reply::RootStats(cgroup.stats()))
            }
            Request::RemoveRoot { root } => return later(self.remove_root(id, &root)),
            Request::Put(put) => done(files::put(&self.containers, &put)),
            Request::Get(get) => files::get(&self.containers, &get).map(Reply::Got),
            Request::Forward { port, stream } => return self.forward(id, port, stream),
            Request::Rescan => done(self.containers.storage.found.rescan()),
            Request::Eject { serial } => done(self.containers.storage.eject(&serial)),
            Request::Prepare => done(self.prepare()),
            Request::Clock => Ok(Reply::Clock(clock::wall_clock())),
            Request::AdjustClock { by_ns } => done(self.adjust_clock(by_ns)),
            Request::Hold => done(self.hold()),
            Request::Release => {
                self.release();
                Ok(Reply::Done)
            }
            Request::Attach { process, stdio } => self.attach(process, &stdio),
            Request::Rename { root, hostname } => done(self.rename(&root, hostname.as_deref())),
            Request::EjectCard { mac } => done(network::eject(Path::new("/sys/class/net"), mac)),
        })
    }

    /// The clock of a trial run is the developer's.
    fn adjust_clock(&self, by_ns: i64) -> Result<()> {
        if self.role != Role::Init {
            return Err(Error::Invalid("this agent has no clock of its own".into()));
        }
        sys::adjust_wall_clock(by_ns).context(|| format!("cannot adjust the clock by {by_ns} ns"))
    }

    /// From here on a new host is awaited. Whatever is of a container would be in every clone.
    fn prepare(&mut self) -> Result<()> {
        let idle = self.containers.is_empty()
            && self.table.entries().is_empty()
            && self.syncs.is_empty()
            && self.forwards.iter().all(Option::is_none)
            && self.shutdown.is_none();
        if !idle {
            return Err(Error::Busy("the guest has containers or processes"));
        }
        self.containers.warm();
        self.awaiting = true;
        Ok(())
    }

    fn set_up_root(&mut self, request: &mvm_protocol::SetupRoot) -> Result<()> {
        let slot = self.containers.set_up(request)?;
        if let Some((_, cgroup)) = self.containers.cgroup(slot)
            && let Some(events) = &cgroup.events
        {
            let event = EpollEvent::new(EpollFlags::EPOLLPRI, root_key(slot, false));
            if let Err(errno) = self.epoll.add(events, event) {
                kmsg::say(&format!("cannot watch memory events: {errno}"));
            }
        }
        Ok(())
    }

    fn configure(&mut self, request: &mvm_protocol::Configure) -> Result<()> {
        if let Some(hostname) = &request.hostname {
            nix::unistd::sethostname(hostname)
                .context(|| format!("cannot set the host name to {hostname}"))?;
        }
        self.containers.configure(request);
        network::configure(request)
    }

    fn start(&mut self, start: &Start) -> Result<Reply> {
        if self.shutdown.is_some() {
            return Err(Error::Busy("the guest is shutting down"));
        }
        process::check(start)?;
        self.table.check_free(start.process)?;
        let root = start.root.as_deref().map(|id| self.containers.root(id)).transpose()?;
        if let Some(root) = root {
            check_open(root)?;
        }
        let directory = match root {
            Some(root) => root.directory.try_clone(),
            None => File::open("/").map(OwnedFd::from),
        };
        let directory = directory.context(|| "cannot open the root directory".into())?;
        let account = user::resolve(&start.user, directory.as_fd())?;
        let program = Program::new(&start.args, &environment(start, &account))?;
        let mut stdio = StdioFiles::new(&start.stdio, directory.as_fd())?;
        self.streams.check_room(stdio.outer.len())?;
        let pids = match start.pid_namespace {
            PidNamespace::Agent => PidSpace::Agent,
            PidNamespace::New => PidSpace::New,
            PidNamespace::Join(process) => PidSpace::of(self.table.running(process)?)?,
        };
        let ends = std::mem::take(&mut stdio.outer);
        let streams = connect(&*self.dialer, start.process, ends)?;

        let anew = |root: &&Root| !root.has_proc || matches!(pids, PidSpace::New);
        let surroundings = Surroundings {
            spaces: root.map(|root| &root.spaces),
            proc: root.filter(anew).and_then(|root| root.proc.as_ref()),
        };
        let cgroup = root.and_then(|root| root.cgroup.as_ref()).map(|cgroup| cgroup.directory.as_fd());
        let place = Place { pids, cgroup };
        let steps = process::steps(start, &account, &surroundings, &stdio)?;
        let pid = launch(&steps, &program, &place)?;

        if let Some(id) = &start.root {
            self.containers.note_proc(id);
        }
        let outputs = streams.iter().filter(|stream| stream.kind != Kind::Input).count();
        self.table.started(start.process, pid, start.root.clone(), outputs);
        streams.into_iter().for_each(|stream| self.streams.add(&self.epoll, stream));
        Ok(Reply::Started { pid: pid.as_raw().unsigned_abs() })
    }

    fn signal(&mut self, process: u64, signal: i32, target: SignalTarget) -> Result<()> {
        if !(0..=64).contains(&signal) {
            return Err(Error::Invalid(format!("there is no signal {signal}")));
        }
        let pid = self.table.running(process)?;
        // Every process started here leads a session, so its group has its number.
        let group = Pid::from_raw(-pid.as_raw());
        let sent = match target {
            SignalTarget::Process => sys::kill(pid, signal),
            SignalTarget::Group => sys::kill(group, signal),
            SignalTarget::Everyone => {
                let root = self.table.root_of(process).map(|id| self.containers.root(id)).transpose()?;
                match root.and_then(|root| root.cgroup.as_ref()) {
                    Some(cgroup) => cgroup.signal(signal),
                    None => sys::kill(group, signal),
                }
            }
        };
        sent.context(|| format!("cannot send signal {signal} to process {process}"))
    }

    /// Syncs in a child, because it may take long and the loop must not.
    fn sync(&mut self, id: u64) -> Result<()> {
        match sys::fork().context(|| "cannot fork".into())? {
            None => {
                nix::unistd::sync();
                sys::exit_now(0)
            }
            Some(pid) => {
                self.syncs.push((pid, id));
                Ok(())
            }
        }
    }
}

/// Whether a process can begin in a root: in a frozen cgroup it could not, and the agent would wait for it.
fn check_open(root: &Root) -> Result<()> {
    if root.leaving {
        return Err(Error::Busy("the container is being removed"));
    }
    match &root.cgroup {
        Some(cgroup) if cgroup.freezing => Err(Error::Busy("the container is frozen")),
        _ => Ok(()),
    }
}

/// Opens each stream's connection to the host.
fn connect(dialer: &dyn Dialer, process: u64, ends: Vec<(Kind, u64, OwnedFd)>) -> Result<Vec<Stream>> {
    ends.into_iter().map(|end| open_stream(dialer, Some(process), end)).collect()
}

/// Opens a stream's connection to the host.
pub(crate) fn open_stream(
    dialer: &dyn Dialer,
    process: Option<u64>,
    (kind, token, end): (Kind, u64, OwnedFd),
) -> Result<Stream> {
    Ok(Stream { process, kind, socket: dial_stream(dialer, Token(token))?, end })
}

/// A connection to the host for the stream of this token, non-blocking.
pub(crate) fn dial_stream(dialer: &dyn Dialer, token: Token) -> Result<OwnedFd> {
    let socket = dialer.dial(STREAM_PORT).context(|| "cannot dial the stream port".into())?;
    let mut file = File::from(socket);
    file.write_all(&StreamHeader { token }.encode()).context(|| "cannot open a stream to the host".into())?;
    set_nonblocking(file.as_fd())?;
    Ok(file.into())
}
