//! Typed, blocking calls to one agent.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mvm_protocol::{
    Configure, Confinement, Decoder, ExitStatus, GuestMessage, Hello, HelloAck, HostMessage, Identity, MAGIC,
    Mount, PidNamespace, ProcessEntry, Reply, Request, SetupRoot, ShutdownMode, SignalTarget, Start, Stats,
    Stdio, Token, User, VERSION, WindowSize, decode, encode,
};
use nix::unistd::pipe2;

use super::{
    error::{Error, Result, printable},
    link::{Link, StreamSource},
    listener::io_error,
    state::Shared,
    writing::write_within,
};

/// Time for an ordinary call.
pub(super) const CALL_TIME: Duration = Duration::from_secs(5);
/// Time for calls that mount, execute or write back disks.
pub(super) const LONG_CALL_TIME: Duration = Duration::from_secs(60);

/// A connection to one guest's agent. Shared between threads by reference; dropping it closes the
/// connection and stops its thread, and the guest goes on.
#[derive(Debug)]
pub struct AgentClient {
    hello: Hello,
    pub(super) shared: Arc<Shared>,
    /// Callers take turns to write; held for one frame at most, and for no other lock.
    writer: Mutex<UnixStream>,
    next_id: AtomicU64,
    /// Its other end tells the thread, by hanging up, that the client is gone.
    _stop: std::os::fd::OwnedFd,
}

/// A process to run; see [`Start`] for the meaning of the fields.
#[derive(Clone, Debug)]
pub struct ProcessSpec {
    /// The id of the container root it runs in; `None` is the agent's own.
    pub root: Option<String>,
    /// Program and arguments.
    pub args: Vec<String>,
    /// The whole environment, `NAME=value` each.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: String,
    /// Who it runs as.
    pub user: User,
    /// Its standard streams.
    pub stdio: StdioSpec,
    /// Which PID name space it lives in.
    pub pid_namespace: PidNamespace,
    /// `oom_score_adj`, -1000 to 1000.
    pub oom_score_adj: i16,
    /// What confines it.
    pub confinement: Confinement,
}

/// Which standard streams of a process the host wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdioSpec {
    /// Those that are true; the others are `/dev/null`.
    Pipes {
        /// Standard input.
        stdin: bool,
        /// Standard output.
        stdout: bool,
        /// Standard error.
        stderr: bool,
    },
    /// A terminal of this size.
    Terminal(WindowSize),
}

impl ProcessSpec {
    /// A program run as root in the agent's own root with output streams and no input.
    pub fn new(args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            root: None,
            args: args.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: "/".to_owned(),
            user: User::Named(String::new()),
            stdio: StdioSpec::Pipes { stdin: false, stdout: true, stderr: true },
            pid_namespace: PidNamespace::Agent,
            oom_score_adj: 0,
            confinement: Confinement::default(),
        }
    }
}

/// A running process and the streams that were asked for, in blocking mode. Shutting down the writing
/// side of a stream is end of file for the process.
#[derive(Debug)]
pub struct Process {
    /// The id other calls name it by.
    pub id: u64,
    /// Its number in the guest's first PID name space.
    pub pid: u32,
    /// Towards its standard input.
    pub stdin: Option<UnixStream>,
    /// From its standard output.
    pub stdout: Option<UnixStream>,
    /// From its standard error.
    pub stderr: Option<UnixStream>,
    /// Its terminal, both ways.
    pub terminal: Option<UnixStream>,
}

impl AgentClient {
    /// Answers the agent's hello on a control connection it has just opened. `streams` is where its
    /// stream connections arrive.
    pub fn connect(
        control: UnixStream,
        streams: impl StreamSource,
        identity: Identity,
        timeout: Duration,
    ) -> Result<Self> {
        let mut decoder = Decoder::new();
        let mut hello = read_hello(&control, &mut decoder, timeout)?;
        for text in [&mut hello.agent_version, &mut hello.kernel_release] {
            *text = printable(text);
        }
        let what = "cannot prepare the control connection";
        control.set_read_timeout(None).map_err(io_error(what))?;
        let writer = control.try_clone().map_err(io_error(what))?;
        let (stop, _stop) =
            pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| io_error(what)(errno.into()))?;
        let shared = Arc::new(Shared::default());
        let link = Link { shared: Arc::clone(&shared), control, decoder, streams, accepting: true, stop };
        thread::Builder::new()
            .name("agent".to_owned())
            .spawn(move || link.run())
            .map_err(io_error("cannot start the agent's thread"))?;
        let writer = Mutex::new(writer);
        let client = Self { hello, shared, writer, next_id: AtomicU64::new(1), _stop };
        let ack = HelloAck { magic: MAGIC, version: VERSION, features: 0, identity };
        client.write(&HostMessage::HelloAck(ack))?;
        Ok(client)
    }

    /// What the agent said about itself. Its texts are safe to show; nothing in it is to be believed.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Asks whether the agent is there.
    pub fn ping(&self) -> Result<()> {
        self.done(Request::Ping, CALL_TIME)
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

    /// Runs a process; returns when its program runs and its streams are open.
    pub fn start(&self, spec: ProcessSpec) -> Result<Process> {
        let process = self.next_id();
        let (stdio, tokens) = stdio(spec.stdio)?;
        self.shared.expect_streams(&tokens);
        let request = Start {
            process,
            root: spec.root,
            args: spec.args,
            env: spec.env,
            cwd: spec.cwd,
            user: spec.user,
            stdio: stdio.clone(),
            pid_namespace: spec.pid_namespace,
            oom_score_adj: spec.oom_score_adj,
            confinement: spec.confinement,
        };
        let result = self.started(Request::Start(Box::new(request)), process, &stdio);
        if result.is_err() {
            self.shared.forget_streams(&tokens);
        }
        result
    }

    fn started(&self, request: Request, id: u64, stdio: &Stdio) -> Result<Process> {
        let Reply::Started { pid } = self.call(request, LONG_CALL_TIME)? else {
            return Err(Error::WrongReply);
        };
        let stream =
            |token: &Option<Token>| token.map(|token| self.shared.await_stream(token, CALL_TIME)).transpose();
        let mut process = Process { id, pid, stdin: None, stdout: None, stderr: None, terminal: None };
        match stdio {
            Stdio::Terminal { stream: token, .. } => process.terminal = stream(&Some(*token))?,
            Stdio::Pipes { stdin, stdout, stderr } => {
                process.stdin = stream(stdin)?;
                process.stdout = stream(stdout)?;
                process.stderr = stream(stderr)?;
            }
        }
        Ok(process)
    }

    /// How a process ended, waiting for it if need be; by then its output streams hold all it wrote. The
    /// answer is given once.
    pub fn wait(&self, process: u64, timeout: Option<Duration>) -> Result<ExitStatus> {
        let status = self.shared.await_exit(process, timeout)?;
        // The agent reports it again on its next connection unless it is told not to.
        let id = self.next_id();
        if self.shared.begin_call(id, true).is_ok() {
            let _ = self.write(&HostMessage::Request { id, request: Request::Forget { process } });
        }
        Ok(status)
    }

    /// Sends a signal.
    pub fn signal(&self, process: u64, signal: i32, target: SignalTarget) -> Result<()> {
        self.done(Request::Signal { process, signal, target }, CALL_TIME)
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, process: u64, size: WindowSize) -> Result<()> {
        self.done(Request::Resize { process, size }, CALL_TIME)
    }

    /// Closes a process's standard input, whatever its stream's state.
    pub fn close_stdin(&self, process: u64) -> Result<()> {
        self.done(Request::CloseStdin { process }, CALL_TIME)
    }

    /// The processes on the agent's record.
    pub fn list(&self) -> Result<Vec<ProcessEntry>> {
        match self.call(Request::List, CALL_TIME)? {
            Reply::Processes(entries) => Ok(entries),
            _ => Err(Error::WrongReply),
        }
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
        let id = self.next_id();
        self.shared.begin_call(id, false)?;
        self.write(&HostMessage::Request { id, request })?;
        self.shared.await_answer(id, timeout)
    }

    /// Writes one frame. A frame that cannot be written whole ends the connection: what follows it could
    /// not be understood.
    fn write(&self, message: &HostMessage) -> Result<()> {
        let frame = encode(message)?;
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_within(&writer, &frame, CALL_TIME).map_err(|source| {
            let _ = writer.shutdown(std::net::Shutdown::Both);
            Error::Io { what: "cannot write to the guest's agent".to_owned(), source }
        })
    }

    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

/// The hello, which must be whole within the time.
fn read_hello(mut control: &UnixStream, decoder: &mut Decoder, timeout: Duration) -> Result<Hello> {
    let deadline = Instant::now() + timeout;
    let mut chunk = [0; 4096];
    loop {
        if let Some(payload) = decoder.next_payload()? {
            let guest = Hello::version_in(payload).ok_or(Error::NotHello)?;
            if guest.major != VERSION.major {
                return Err(Error::Version { guest, host: VERSION });
            }
            return match decode(payload)? {
                GuestMessage::Hello(hello) => Ok(hello),
                _ => Err(Error::NotHello),
            };
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Deadline { what: "say hello" });
        }
        control.set_read_timeout(Some(left)).map_err(io_error("cannot set a timeout"))?;
        match control.read(&mut chunk) {
            Ok(0) => return Err(Error::Lost { reason: "it was closed before the hello".to_owned() }),
            Ok(count) => decoder.push(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("cannot read the agent's hello")(error)),
        }
    }
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

/// What the agent is asked for, and the tokens of it.
fn stdio(spec: StdioSpec) -> Result<(Stdio, Vec<Token>)> {
    let wanted = match spec {
        StdioSpec::Terminal(_) => 1,
        StdioSpec::Pipes { stdin, stdout, stderr } => {
            [stdin, stdout, stderr].into_iter().filter(|wanted| *wanted).count()
        }
    };
    let tokens = tokens(wanted)?;
    let mut unused = tokens.iter().copied();
    let stdio = match spec {
        StdioSpec::Terminal(size) => {
            Stdio::Terminal { stream: unused.next().ok_or(Error::WrongReply)?, size }
        }
        StdioSpec::Pipes { stdin, stdout, stderr } => {
            let mut token = |wanted: bool| if wanted { unused.next() } else { None };
            Stdio::Pipes { stdin: token(stdin), stdout: token(stdout), stderr: token(stderr) }
        }
    };
    Ok((stdio, tokens))
}
