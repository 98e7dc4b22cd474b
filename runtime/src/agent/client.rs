//! Typed, blocking calls to one agent.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mvm_protocol::{
    Configure, Decoder, Hello, HelloAck, HostMessage, Identity, MAGIC, Mount, Reply, Request, SetupRoot,
    ShutdownMode, Stats, Token, VERSION, encode,
};
use nix::{fcntl::OFlag, unistd::pipe2};

use super::{
    error::{Error, Result, printable},
    hello::read_hello,
    identity::wall_clock_ns,
    link::{Link, StreamSource},
    listener::io_error,
    state::Shared,
    writing::write_within,
};

/// Time for an ordinary call.
pub(super) const CALL_TIME: Duration = Duration::from_secs(15);
/// Time for calls that mount, execute or write back disks.
pub(super) const LONG_CALL_TIME: Duration = Duration::from_secs(60);
/// Time for reading or writing a part of a file.
pub(super) const FILE_TIME: Duration = Duration::from_secs(15);

/// A connection to one guest's agent. Shared between threads by reference; dropping it closes the
/// connection and stops its thread, and the guest goes on.
#[derive(Debug)]
pub struct AgentClient {
    hello: Hello,
    heard_ns: u64,
    pub(super) shared: Arc<Shared>,
    /// Callers take turns to write; held for one frame at most, and for no other lock.
    writer: Mutex<UnixStream>,
    pub(super) next_id: AtomicU64,
    /// Its other end tells the thread, by hanging up, that the client is gone.
    _stop: OwnedFd,
    /// Its other end is the thread's.
    lost: OwnedFd,
}

impl AgentClient {
    /// Answers the agent's hello on a control connection it has just opened. `streams` is where its
    /// stream connections arrive. A wall clock in `identity` is read anew when it is sent.
    pub fn connect(
        control: UnixStream,
        streams: impl StreamSource,
        identity: Identity,
        timeout: Duration,
    ) -> Result<Self> {
        let mut decoder = Decoder::new();
        let mut hello = read_hello(&control, &mut decoder, timeout)?;
        let heard_ns = mvm_vmm::status::now();
        for text in [&mut hello.agent_version, &mut hello.kernel_release] {
            *text = printable(text);
        }
        let what = "cannot prepare the control connection";
        control.set_read_timeout(None).map_err(io_error(what))?;
        let writer = control.try_clone().map_err(io_error(what))?;
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| io_error(what)(errno.into()));
        let ((stop, _stop), (lost, held)) = (pipe()?, pipe()?);
        let shared = Arc::new(Shared::default());
        let link = Link {
            shared: Arc::clone(&shared),
            control,
            decoder,
            streams,
            accepting: true,
            stop,
            _held: held,
        };
        thread::Builder::new()
            .name("agent".to_owned())
            .spawn(move || link.run())
            .map_err(io_error("cannot start the agent's thread"))?;
        let writer = Mutex::new(writer);
        let client = Self { hello, heard_ns, shared, writer, next_id: AtomicU64::new(1), _stop, lost };
        let mut identity = identity;
        if identity.wall_clock_ns != 0 {
            // The guest may have taken its time to call.
            identity.wall_clock_ns = wall_clock_ns();
        }
        let ack = HelloAck { magic: MAGIC, version: VERSION, features: 0, identity };
        client.write(&encode(&HostMessage::HelloAck(ack))?)?;
        Ok(client)
    }

    /// What the agent said about itself. Its texts are safe to show; nothing in it is to be believed.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// When that had come, on CLOCK_MONOTONIC in nanoseconds.
    pub fn heard_ns(&self) -> u64 {
        self.heard_ns
    }

    /// Asks whether the agent is there.
    pub fn ping(&self) -> Result<()> {
        self.done(Request::Ping, CALL_TIME)
    }

    /// Whether the agent answers, be it by a refusal.
    pub fn answers(&self) -> bool {
        self.ping().map_or_else(|error| error.is_answer(), |()| true)
    }

    /// Hangs up once the connection is lost: every call fails from then on.
    pub fn lost(&self) -> BorrowedFd<'_> {
        self.lost.as_fd()
    }

    /// Makes mounts in the agent's own name space.
    pub fn mount(&self, mounts: Vec<Mount>) -> Result<()> {
        self.done(Request::Mount(mounts), LONG_CALL_TIME)
    }

    /// Makes a container's root.
    pub fn set_up_root(&self, root: SetupRoot) -> Result<()> {
        self.done(Request::SetupRoot(Box::new(root)), LONG_CALL_TIME)
    }

    /// Sets host name, network and resolver.
    pub fn configure(&self, configure: Configure) -> Result<()> {
        self.done(Request::Configure(configure), CALL_TIME)
    }

    /// The guest's use of memory and CPU, by its own account.
    pub fn stats(&self) -> Result<Stats> {
        match self.call(Request::Stats, CALL_TIME)? {
            Reply::Stats(stats) => Ok(stats),
            _ => Err(Error::WrongReply),
        }
    }

    /// Writes all file systems of the guest to their disks.
    pub fn sync(&self) -> Result<()> {
        self.done(Request::Sync, LONG_CALL_TIME)
    }

    /// Begins an orderly end; the machine is gone some time after `grace`.
    pub fn shut_down(&self, mode: ShutdownMode, grace: Duration) -> Result<()> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.done(Request::Shutdown { mode, grace_ms }, CALL_TIME)
    }

    /// Has the agent get ready for the machine to be saved and to go on as others. When it ends, this connection
    /// must not be taken up again by anything but those.
    pub fn prepare(&self) -> Result<()> {
        self.done(Request::Prepare, CALL_TIME)
    }

    /// Kills for want of memory in a container root so far.
    pub fn memory_kills(&self, root: &str) -> u64 {
        self.shared.memory_kills(root)
    }

    pub(super) fn done(&self, request: Request, timeout: Duration) -> Result<()> {
        match self.call(request, timeout)? {
            Reply::Done => Ok(()),
            _ => Err(Error::WrongReply),
        }
    }

    pub(super) fn call(&self, request: Request, timeout: Duration) -> Result<Reply> {
        self.call_by(request, Instant::now() + timeout)
    }

    /// The same, by `end`: what it took to send the request is not added to the time for its answer.
    pub(super) fn call_by(&self, request: Request, end: Instant) -> Result<Reply> {
        let id = self.next_id();
        // First: a request that fits no frame gets no answer, and its place would stay taken.
        let frame = encode(&HostMessage::Request { id, request })?;
        self.shared.begin_call(id, false)?;
        self.write(&frame)?;
        self.shared.await_answer(id, left(end))
    }

    /// Asks for something whose answer nobody waits for; whether that could be sent.
    pub(super) fn tell(&self, request: Request) -> bool {
        let id = self.next_id();
        let Ok(frame) = encode(&HostMessage::Request { id, request }) else { return false };
        self.shared.begin_call(id, true).is_ok() && self.write(&frame).is_ok()
    }

    /// Writes one frame. A frame that cannot be written whole ends the connection: what follows it could
    /// not be understood.
    fn write(&self, frame: &[u8]) -> Result<()> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_within(&writer, frame, CALL_TIME).map_err(|source| {
            let _ = writer.shutdown(std::net::Shutdown::Both);
            Error::Io { what: "cannot write to the guest's agent".to_owned(), source }
        })
    }

    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

/// Time until `end`.
pub(super) fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}

/// What of a call's time is left until `end`. Nothing is asked for which there is none.
pub(super) fn within(time: Duration, end: Instant) -> Result<Duration> {
    let left = left(end);
    if left.is_zero() { Err(Error::Deadline { what: "answer" }) } else { Ok(time.min(left)) }
}

/// Tokens that nobody can guess.
pub(super) fn tokens(count: usize) -> Result<Vec<Token>> {
    let mut random = File::open("/dev/urandom").map_err(io_error("cannot open /dev/urandom"))?;
    let mut token = || {
        let mut bytes = [0; 8];
        random.read_exact(&mut bytes).map_err(io_error("cannot read /dev/urandom"))?;
        Ok(Token(u64::from_ne_bytes(bytes)))
    };
    (0..count).map(|_| token()).collect()
}
