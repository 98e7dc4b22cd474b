//! Calls about processes: started with their streams, signalled, waited for or given up.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mvm_protocol::{
    Confinement, ExitStatus, PidNamespace, ProcessEntry, Reply, Request, SignalTarget, Start, Stdio, Token,
    User, WindowSize, limits,
};

use super::{
    client::{AgentClient, CALL_TIME, LONG_CALL_TIME, left, tokens, within},
    error::{Error, Result, at_most},
};

/// Most processes the agent is told to forget before another is started.
const MOST_FORGOTTEN: usize = 16;

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
    /// Runs a process; returns when its program runs and its streams are open, for all of which together there is
    /// the time of one call.
    pub fn start(&self, spec: ProcessSpec) -> Result<Process> {
        self.start_within(spec, LONG_CALL_TIME)
    }

    /// The same, within this time.
    pub(super) fn start_within(&self, spec: ProcessSpec, time: Duration) -> Result<Process> {
        let end = Instant::now() + time;
        self.forget_over();
        let process = self.next_id();
        let (stdio, tokens) = stdio(spec.stdio)?;
        self.shared.begin_process(process)?;
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
        let result = self.started(Request::Start(Box::new(request)), process, &stdio, end);
        if let Err(error) = &result {
            self.shared.forget_streams(&tokens);
            self.not_started(process, error);
        }
        result
    }

    /// A process that is asked for and its streams, all by `end`: a guest that is late with one thing has no more time
    /// for the next.
    pub(super) fn started(&self, request: Request, id: u64, stdio: &Stdio, end: Instant) -> Result<Process> {
        let Reply::Started { pid } = self.call_by(request, end)? else {
            return Err(Error::WrongReply);
        };
        let stream =
            |token: &Option<Token>| token.map(|token| self.shared.await_stream(token, left(end))).transpose();
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

    /// One the guest may have started all the same, and that nobody knows of, is not to run on.
    fn not_started(&self, process: u64, error: &Error) {
        if !matches!(error, Error::Deadline { .. }) {
            return self.shared.forget_process(process);
        }
        self.abandon(process);
        self.tell(Request::Signal { process, signal: libc::SIGKILL, target: SignalTarget::Process });
    }

    /// How a process ended, waiting for it if need be; by then its output streams hold all it wrote. The
    /// answer is given once; none is once the process was given up.
    pub fn wait(&self, process: u64, timeout: Option<Duration>) -> Result<ExitStatus> {
        let status = self.shared.await_exit(process, timeout)?;
        // The agent reports it again on its next connection unless it is told not to.
        self.tell(Request::Forget { process });
        Ok(status)
    }

    /// Gives a process up: whoever waits for its end does so no more, and its end, should the guest report it, is
    /// nobody's. It counts among the guest's processes until then. Nothing is asked of the guest, nor waited for.
    pub fn abandon(&self, process: u64) {
        self.shared.abandon_process(process);
    }

    /// Has the agent drop its records of processes that were given up and have ended since: they take the place of
    /// others. A few at a time, because each is a request in flight.
    fn forget_over(&self) {
        for process in self.shared.over().into_iter().take(MOST_FORGOTTEN) {
            if !self.tell(Request::Forget { process }) {
                return;
            }
            self.shared.forget_process(process);
        }
    }

    /// Sends a signal.
    pub fn signal(&self, process: u64, signal: i32, target: SignalTarget) -> Result<()> {
        self.done(Request::Signal { process, signal, target }, CALL_TIME)
    }

    /// Kills processes, all by `end`. One that is gone already is none that is left.
    pub fn kill_by(&self, processes: impl IntoIterator<Item = u64>, end: Instant) -> Result<()> {
        let target = SignalTarget::Process;
        processes.into_iter().try_for_each(|process| {
            let request = Request::Signal { process, signal: libc::SIGKILL, target };
            match self.done(request, within(CALL_TIME, end)?) {
                Err(error) if error.is_answer() => Ok(()),
                done => done,
            }
        })
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
            Reply::Processes(entries) => {
                at_most("processes", entries.len(), limits::MAX_PROCESSES)?;
                Ok(entries)
            }
            _ => Err(Error::WrongReply),
        }
    }
}

/// What the agent is asked for, and the tokens of it.
pub(super) fn stdio(spec: StdioSpec) -> Result<(Stdio, Vec<Token>)> {
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
