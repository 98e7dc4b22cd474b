//! The event loop: control connection, signals, streams, and the little that has a deadline.

use std::time::{Duration, Instant};

use mvm_protocol::{CONTROL_PORT, Event, GuestMessage, HostMessage, MAGIC, StageTimes, Stamp, VERSION};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        prctl::set_child_subreaper,
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};

use crate::{
    boot::{self, Role},
    clock,
    containers::Containers,
    control::{Control, Incoming, Lost},
    dial::Dialer,
    error::{Context, Result},
    forward::{Connecting, FORWARDS},
    hold::Held,
    identity, kmsg,
    pending::Pending,
    process::set_nonblocking,
    shutdown::Shutdown,
    step::Linux,
    streams::{Streams, slot_of},
    sys,
    table::Table,
};

const SIGNALS: u64 = 1;
const CONTROL: u64 = 2;
/// The first of the roots' keys, two for each slot.
const ROOTS: u64 = 16;

/// The epoll key of a root's memory events, or of the state of its processes.
pub(crate) fn root_key(slot: usize, state: bool) -> u64 {
    ROOTS.saturating_add((slot as u64).saturating_mul(2)).saturating_add(u64::from(state))
}

/// Longest pause between two attempts to reach a host that went away.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// The same while a new host is awaited, which wants its machine soon.
const MAX_AWAITING_PAUSE: Duration = Duration::from_millis(20);

/// Everything the agent knows.
pub(crate) struct Agent {
    pub(crate) role: Role,
    pub(crate) dialer: Box<dyn Dialer>,
    pub(crate) epoll: Epoll,
    pub(crate) containers: Containers,
    pub(crate) table: Table,
    pub(crate) streams: Streams,
    /// Children that sync, with the request that waits for each.
    pub(crate) syncs: Vec<(Pid, u64)>,
    pub(crate) shutdown: Option<Shutdown>,
    /// Requests that wait for a container's processes.
    pub(crate) pending: Vec<Pending>,
    /// Connections to the guest's ports under way, by slot.
    pub(crate) forwards: Vec<Option<Connecting>>,
    /// The machine is being saved, or goes on after that and no host has greeted it yet.
    pub(crate) awaiting: bool,
    /// The machine is being saved with what is in it, or goes on after that.
    pub(crate) held: Option<Held>,
    signals: SignalFd,
    link: Link,
    connections: u32,
    stages: StageTimes,
}

/// Whether the host can be talked to.
enum Link {
    Up { control: Control, interest: EpollFlags },
    Down { next: Instant, pause: Duration },
}

impl Agent {
    /// An agent that has not dialled yet.
    pub(crate) fn new(role: Role, dialer: Box<dyn Dialer>) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context(|| "cannot make an epoll".into())?;
        let mut mask = SigSet::empty();
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|it| mask.add(it));
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags).context(|| "cannot make a signalfd".into())?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS);
        epoll.add(&signals, event).context(|| "cannot watch signals".into())?;
        if role == Role::Guest {
            set_child_subreaper(true).context(|| "cannot adopt orphans".into())?;
        }
        Ok(Self {
            role,
            dialer,
            epoll,
            containers: Containers::new(role),
            table: Table::default(),
            streams: Streams::new(),
            syncs: Vec::new(),
            shutdown: None,
            pending: Vec::new(),
            forwards: Vec::new(),
            awaiting: false,
            held: None,
            signals,
            link: Link::Down { next: Instant::now(), pause: Duration::ZERO },
            connections: 0,
            stages: StageTimes::default(),
        })
    }

    /// Dials, says hello, then serves for ever.
    pub(crate) fn run(mut self, agent_start: Stamp, mounts_done: Stamp) -> ! {
        self.stages = StageTimes { agent_start, mounts_done, dialled: mounts_done };
        if let Err(error) = self.dial() {
            boot::give_up(&format!("cannot reach the host: {error}"));
        }
        boot::late(self.role);
        let mut events = [EpollEvent::empty(); 32];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => boot::give_up(&format!("cannot wait for events: {errno}")),
            };
            for event in &events[..count] {
                self.serve(event.data(), event.events());
            }
            self.keep_deadlines();
            self.flush_control();
        }
    }

    fn serve(&mut self, key: u64, events: EpollFlags) {
        match key {
            SIGNALS => self.serve_signals(),
            CONTROL => {
                if self.serve_control(events).is_err() {
                    self.hang_up();
                }
            }
            key => match slot_of(key) {
                Some(slot) => {
                    if let Some(process) = self.streams.turn(&self.epoll, slot) {
                        let event = self.table.output_ended(process);
                        self.emit_exit(event);
                    }
                }
                None if key >= FORWARDS => {
                    self.serve_connection(
                        usize::try_from(key.saturating_sub(FORWARDS)).unwrap_or(usize::MAX),
                    );
                }
                None => self.serve_root(key.saturating_sub(ROOTS)),
            },
        }
    }

    fn serve_root(&mut self, key: u64) {
        if key % 2 == 1 {
            return self.settle();
        }
        self.emit_kills(usize::try_from(key / 2).unwrap_or(usize::MAX));
    }

    /// Reports kills for want of memory in the root in this slot that were not reported yet.
    fn emit_kills(&mut self, slot: usize) {
        let Some((id, cgroup)) = self.containers.cgroup(slot) else {
            return;
        };
        let event = cgroup.new_kills().map(|kills| Event::OutOfMemory { root: id.to_owned(), kills });
        self.emit(event);
    }

    fn serve_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            // PID 1 ends when the host says so; a trial run also when its user does.
            if self.role == Role::Guest && i32::try_from(signal.ssi_signo) != Ok(libc::SIGCHLD) {
                self.leave();
            }
        }
        while let Ok(Some((pid, status))) = sys::reap() {
            self.child_ended(pid, status);
        }
    }

    fn child_ended(&mut self, pid: Pid, status: mvm_protocol::ExitStatus) {
        if let Some(at) = self.syncs.iter().position(|(it, _)| *it == pid) {
            let (_, id) = self.syncs.swap_remove(at);
            return self.respond(id, Ok(mvm_protocol::Reply::Done));
        }
        let Some(process) = self.table.reaped(pid, status, clock::now()) else {
            return;
        };
        for _ in 0..self.streams.drain(&self.epoll, process) {
            let event = self.table.output_ended(process);
            self.emit_exit(event);
        }
        let event = self.table.report(process);
        self.emit_exit(event);
        if !self.pending.is_empty() {
            self.settle();
        }
    }

    fn serve_control(&mut self, events: EpollFlags) -> Result<(), Lost> {
        if events.contains(EpollFlags::EPOLLOUT)
            && let Link::Up { control, .. } = &mut self.link
        {
            control.flush()?;
        }
        loop {
            let Link::Up { control, .. } = &mut self.link else {
                return Ok(());
            };
            match control.next_message()? {
                Some(Incoming::Unknown { id }) => self.respond(id, Err(crate::error::Error::Unsupported)),
                Some(Incoming::Message(message)) => self.serve_message(*message)?,
                None if control.receive()? => {}
                None => return Ok(()),
            }
        }
    }

    fn serve_message(&mut self, message: HostMessage) -> Result<(), Lost> {
        let Link::Up { control, .. } = &mut self.link else {
            return Err(Lost);
        };
        match message {
            HostMessage::HelloAck(ack) => {
                if ack.magic != MAGIC || ack.version.major != VERSION.major || control.greeted {
                    kmsg::say("control connection dropped: the host speaks another protocol");
                    return Err(Lost);
                }
                control.greeted = true;
                self.awaiting = false;
                let resumed = self.connections > 1;
                if let Err(error) = identity::assume(&mut Linux, &ack.identity, self.role, resumed) {
                    boot::give_up(&error.to_string());
                }
                self.containers.name_machine(ack.identity.machine_id);
                for event in self.table.unforgotten() {
                    self.emit(Some(event));
                }
            }
            HostMessage::Request { .. } if !control.greeted => {
                kmsg::say("control connection dropped: a request came before the hello");
                return Err(Lost);
            }
            HostMessage::Request { id, request } => {
                // Nobody waits to hear that a process is forgotten: that goes with what comes next.
                let now = !matches!(request, mvm_protocol::Request::Forget { .. });
                if let Some(result) = self.handle(id, request) {
                    self.send(&GuestMessage::Response { id, result: result.map_err(Into::into) }, now);
                }
            }
        }
        Ok(())
    }

    /// Answers a request.
    pub(crate) fn respond(&mut self, id: u64, result: Result<mvm_protocol::Reply>) {
        self.send(&GuestMessage::Response { id, result: result.map_err(Into::into) }, true);
    }

    /// Reports the exit of a process, if it is to be, and before it the kills for want of memory that it may be one of:
    /// the kernel counts a kill before it kills, but puts off telling of it when it has just told of something else.
    fn emit_exit(&mut self, event: Option<Event>) {
        if let Some(Event::Exited { process, .. }) = event
            && let Some(slot) = self.table.root_of(process).and_then(|root| self.containers.slot(root))
        {
            self.emit_kills(slot);
        }
        self.emit(event);
    }

    /// Reports an event, if there is one and a host to hear it. A lost exit is repeated later.
    pub(crate) fn emit(&mut self, event: Option<Event>) {
        if let (Some(event), Link::Up { control: Control { greeted: true, .. }, .. }) = (event, &self.link) {
            self.send(&GuestMessage::Event(event), true);
        }
    }

    /// Sends a message `now`, or at the latest before the loop waits.
    fn send(&mut self, message: &GuestMessage, now: bool) {
        if let Link::Up { control, .. } = &mut self.link
            && control.send(message, now).is_err()
        {
            self.hang_up();
        }
    }

    /// Opens the control connection and says hello.
    fn dial(&mut self) -> Result<()> {
        let socket = self.dialer.dial(CONTROL_PORT).context(|| "cannot dial the control port".into())?;
        set_nonblocking(std::os::fd::AsFd::as_fd(&socket))?;
        if self.connections == 0 {
            self.stages.dialled = clock::now();
        }
        let hello = identity::hello(self.connections, self.stages);
        self.connections = self.connections.saturating_add(1);
        let control = Control::new(socket);
        let interest = EpollFlags::EPOLLIN;
        let event = EpollEvent::new(interest, CONTROL);
        self.epoll.add(control.socket(), event).context(|| "cannot watch the control connection".into())?;
        self.link = Link::Up { control, interest };
        self.send(&GuestMessage::Hello(hello), true);
        Ok(())
    }

    /// Closes the control connection; it is dialled anew soon.
    fn hang_up(&mut self) {
        if let Link::Up { control, .. } = &self.link {
            let _ = self.epoll.delete(control.socket());
            // A host that answered may be back at once, one that did not is not hurried.
            let pause = if control.greeted { Duration::ZERO } else { self.max_pause() };
            self.link = Link::Down { next: Instant::now() + pause, pause };
        }
    }

    fn redial(&mut self) {
        let Link::Down { next, pause } = self.link else {
            return;
        };
        if Instant::now() < next || self.dial().is_ok() {
            return;
        }
        if self.role == Role::Guest && !self.expects_another() {
            self.leave();
        }
        let longest = self.max_pause();
        let pause = (pause * 2).clamp(Duration::from_millis(10), longest);
        self.link = Link::Down { next: Instant::now() + pause, pause };
    }

    /// A host that is not there may be another one soon.
    fn expects_another(&self) -> bool {
        self.awaiting || self.held.is_some()
    }

    fn max_pause(&self) -> Duration {
        if self.expects_another() { MAX_AWAITING_PAUSE } else { MAX_PAUSE }
    }

    /// A trial run ends and takes its processes with it.
    fn leave(&mut self) -> ! {
        self.signal_all(libc::SIGKILL);
        self.containers.unmount_all();
        std::process::exit(0)
    }

    /// Sends what was put by, and watches the control connection for room to write only while something is left.
    fn flush_control(&mut self) {
        let Link::Up { control, interest } = &mut self.link else {
            return;
        };
        if control.flush().is_err() {
            return self.hang_up();
        }
        let mut wanted = EpollFlags::EPOLLIN;
        wanted.set(EpollFlags::EPOLLOUT, control.has_unsent());
        if wanted != *interest
            && self.epoll.modify(control.socket(), &mut EpollEvent::new(wanted, CONTROL)).is_ok()
        {
            *interest = wanted;
        }
    }

    fn keep_deadlines(&mut self) {
        self.redial();
        self.advance_shutdown();
    }

    fn timeout(&self) -> EpollTimeout {
        let redial = match self.link {
            Link::Down { next, .. } => Some(next),
            Link::Up { .. } => None,
        };
        let deadline = redial.into_iter().chain(self.shutdown.as_ref().map(|it| it.deadline)).min();
        let Some(deadline) = deadline else {
            return EpollTimeout::NONE;
        };
        // Rounded up, or the loop would turn idly through the last millisecond.
        let wait = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
        u16::try_from(wait).unwrap_or(u16::MAX).into()
    }

    /// The connection to the host, if there is one, taken out of the loop.
    pub(crate) fn take_control(&mut self) -> Option<Control> {
        let down = Link::Down { next: Instant::now() + MAX_PAUSE, pause: MAX_PAUSE };
        match std::mem::replace(&mut self.link, down) {
            Link::Up { control, .. } => Some(control),
            Link::Down { .. } => None,
        }
    }
}
