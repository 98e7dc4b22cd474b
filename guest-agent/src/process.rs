//! Starting a process: its streams, the steps of its set-up, its program.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mvm_protocol::{PidNamespace, Start, Stdio, WindowSize};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::stat::Mode,
    unistd::pipe2,
};

use crate::{
    confinement,
    error::{Context, Error, Result},
    root::Spaces,
    spawn::c_string,
    step::Step,
    streams::Kind,
    surroundings::Proc,
    sys,
    user::{self, Account},
};

/// The process's side of its standard streams, and the agent's ends of those the host reads or writes.
pub(crate) struct StdioFiles {
    /// What becomes 0, 1 and 2; where there is nothing, `null` does.
    inner: [Option<OwnedFd>; 3],
    /// The null device, if it is needed.
    null: Option<OwnedFd>,
    /// Whether they are a terminal.
    pub(crate) terminal: bool,
    /// The agent's ends, non-blocking, with the stream's token.
    pub(crate) outer: Vec<(Kind, u64, OwnedFd)>,
}

impl StdioFiles {
    /// Makes pipes or a terminal; a terminal comes from the root's own /dev/pts.
    pub(crate) fn new(stdio: &Stdio, root: BorrowedFd<'_>) -> Result<Self> {
        match stdio {
            Stdio::Terminal { stream, size } => Self::terminal(stream.0, *size, root),
            Stdio::Pipes { stdin, stdout, stderr } => {
                let mut outer = Vec::new();
                let mut make = |token: &Option<mvm_protocol::Token>, kind| {
                    let Some(token) = token else { return Ok(None) };
                    let (inner, ours) = pipe(kind)?;
                    outer.push((kind, token.0, ours));
                    Ok(Some(inner))
                };
                let inner = [
                    make(stdin, Kind::Input)?,
                    make(stdout, Kind::Output)?,
                    make(stderr, Kind::ErrorOutput)?,
                ];
                let null = || open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
                let null = inner.iter().any(Option::is_none).then(null).transpose();
                let null = null.context(|| "cannot open /dev/null".into())?;
                Ok(Self { inner, null, terminal: false, outer })
            }
        }
    }

    /// The steps that make them the standard streams of a user's process. The null device is everybody's.
    fn steps(&self, uid: u32) -> Vec<Step<'_>> {
        let files = self.inner.iter().filter_map(|file| file.as_ref().or(self.null.as_ref()));
        let mut steps: Vec<_> =
            files.zip(0..).map(|(file, to)| Step::Stdio { from: file.as_fd(), to }).collect();
        if self.terminal {
            steps.push(Step::ControllingTerminal);
        }
        let own = |(fd, _)| Step::Try(Box::new(Step::OwnStdio { fd, uid }));
        steps.extend((0..).zip(&self.inner).filter(|(_, file)| file.is_some()).map(own));
        steps
    }

    fn terminal(token: u64, size: WindowSize, root: BorrowedFd<'_>) -> Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let master = user::open_in_root(root, "dev/pts/ptmx", flags)
            .context(|| "cannot open /dev/pts/ptmx in the root".into())?;
        sys::set_window_size(master.as_fd(), size.rows, size.columns)
            .context(|| "cannot set the terminal's size".into())?;
        let peer = sys::open_terminal_peer(master.as_fd()).context(|| "cannot open the terminal".into())?;
        let again = || peer.try_clone().context(|| "cannot duplicate the terminal".into()).map(Some);
        let inner = [again()?, again()?, again()?];
        Ok(Self { inner, null: None, terminal: true, outer: vec![(Kind::Terminal, token, master)] })
    }
}

/// The process's end and the agent's.
fn pipe(kind: Kind) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
    let (inner, ours) = if kind == Kind::Input { (reader, writer) } else { (writer, reader) };
    set_nonblocking(ours.as_fd())?;
    Ok((inner, ours))
}

/// From now on nothing waits on this descriptor.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .context(|| "cannot make a descriptor non-blocking".into())?;
    Ok(())
}

/// The environment, with HOME as the user's entry says where the host did not.
pub(crate) fn environment(start: &Start, account: &Account) -> Vec<String> {
    let mut env = start.env.clone();
    if !env.iter().any(|it| it.starts_with("HOME=")) {
        let home = account.home.as_deref().filter(|home| !home.is_empty()).unwrap_or("/");
        env.push(format!("HOME={home}"));
    }
    env
}

/// What the child does between fork and exec. Order matters: what needs the agent's /proc and descriptors
/// first, then nothing but its streams stays open, then the working directory (so that no path can lead to
/// a descriptor of the agent's), and privileges last.
pub(crate) fn steps<'a>(
    start: &Start,
    account: &Account,
    surroundings: &Surroundings<'a>,
    stdio: &'a StdioFiles,
) -> Result<Vec<Step<'a>>> {
    let oom_score_adj = start.oom_score_adj.to_string().into_bytes();
    let oom_step = Step::WriteFile { path: c"/proc/self/oom_score_adj".into(), bytes: oom_score_adj };
    let mut steps = vec![Step::Try(Box::new(oom_step))];
    steps.extend(surroundings.spaces.iter().flat_map(|spaces| spaces.enter()));
    if let Some(Proc { call, above }) = surroundings.proc.cloned() {
        steps.push(Step::Replace { call, above });
    }
    steps.push(Step::NewSession);
    steps.extend(stdio.steps(account.uid.as_raw()));
    steps.push(Step::CloseOthers);
    steps.push(Step::Umask(start.confinement.umask.unwrap_or(0o022)));
    steps.push(working_directory(&start.cwd)?);
    let groups = account.groups.clone();
    let credentials = Step::Credentials { uid: account.uid, gid: account.gid, groups };
    steps.extend(confinement::steps(&start.confinement, credentials)?);
    Ok(steps)
}

/// Where a process finds itself.
#[derive(Default)]
pub(crate) struct Surroundings<'a> {
    /// The name spaces it enters.
    pub(crate) spaces: Option<&'a Spaces>,
    /// The mount of /proc it makes anew: it is the first of its PID name space, which only it can show.
    pub(crate) proc: Option<&'a Proc>,
}

fn working_directory<'a>(cwd: &str) -> Result<Step<'a>> {
    if !cwd.starts_with('/') {
        return Err(Error::Invalid(format!("working directory {cwd} is not absolute")));
    }
    let ends = cwd.match_indices('/').map(|(at, _)| at).skip(1).chain([cwd.len()]);
    let parents = ends
        .filter_map(|end| cwd.get(..end))
        .filter(|parent| !parent.ends_with('/'))
        .map(c_string)
        .collect::<Result<_>>()?;
    Ok(Step::WorkingDirectory { path: c_string(cwd)?, parents })
}

/// Refuses combinations that mean nothing.
pub(crate) fn check(start: &Start) -> Result<()> {
    if start.env.iter().any(|it| it.find('=').is_none_or(|at| at == 0)) {
        return Err(Error::Invalid("an environment entry is not NAME=value".into()));
    }
    if start.root.is_none() && start.pid_namespace == PidNamespace::New {
        return Err(Error::Invalid("a new PID name space needs a root of its own".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use mvm_protocol::{Token, User};

    use super::*;
    use crate::surroundings;

    fn start(cwd: &str) -> Start {
        Start {
            process: 1,
            root: None,
            args: vec!["true".into()],
            env: vec!["A=1".into()],
            cwd: cwd.into(),
            user: User::Named(String::new()),
            stdio: Stdio::Pipes { stdin: None, stdout: Some(Token(1)), stderr: None },
            pid_namespace: PidNamespace::Agent,
            oom_score_adj: 0,
            confinement: Default::default(),
        }
    }

    fn names(steps: &[Step<'_>]) -> Vec<String> {
        let first_word =
            |step: &Step<'_>| format!("{step:?}").split([' ', '(', '{']).next().unwrap().to_owned();
        steps.iter().map(first_word).collect()
    }

    fn plan(start: &Start, surroundings: &Surroundings<'_>) -> Vec<String> {
        let root = File::open("/").unwrap();
        let account = user::resolve(&start.user, root.as_fd()).unwrap();
        let stdio = StdioFiles::new(&start.stdio, root.as_fd()).unwrap();
        names(&steps(start, &account, surroundings, &stdio).unwrap())
    }

    #[test]
    fn descriptors_close_before_the_working_directory_and_privileges_go_last() {
        let expected = [
            "Try",
            "NewSession",
            "Stdio",
            "Stdio",
            "Stdio",
            "Try",
            "CloseOthers",
            "Umask",
            "WorkingDirectory",
            "Credentials",
            "UnblockSignals",
        ];
        assert_eq!(plan(&start("/"), &Surroundings::default()), expected);
    }

    #[test]
    fn the_first_process_enters_every_name_space_and_mounts_its_proc_before_anything_else() {
        let space = || Some(File::open("/proc/self/ns/uts").unwrap().into());
        let spaces = Spaces { ipc: space(), uts: space(), cgroup: space(), mount: space() };
        let proc = surroundings::proc(&mvm_protocol::Surroundings::default()).unwrap();
        let plan = plan(&start("/"), &Surroundings { spaces: Some(&spaces), proc: proc.as_ref() });
        let enter = "EnterNamespace";
        assert_eq!(plan[..7], ["Try", enter, enter, enter, enter, "Replace", "NewSession"]);
        let Some(Step::EnterNamespace { kind, .. }) = spaces.enter().pop() else { panic!() };
        assert_eq!(kind, nix::sched::CloneFlags::CLONE_NEWNS, "the others' files are the agent's");
    }

    #[test]
    fn a_missing_working_directory_is_made_parent_by_parent() {
        let Step::WorkingDirectory { parents, .. } = working_directory("/a//b/c/").unwrap() else { panic!() };
        assert_eq!(parents, [c"/a".to_owned(), c"/a//b".to_owned(), c"/a//b/c".to_owned()]);
        assert!(working_directory("a").is_err());
        assert!(working_directory("").is_err());
    }

    #[test]
    fn home_comes_from_the_user_unless_the_host_says_otherwise() {
        let root = File::open("/").unwrap();
        let account = |home: Option<&str>| Account {
            home: home.map(str::to_owned),
            ..user::resolve(&User::Ids { uid: 0, gid: 0, groups: vec![] }, root.as_fd()).unwrap()
        };
        let mut it = start("/");
        assert_eq!(environment(&it, &account(Some("/home/x"))), ["A=1", "HOME=/home/x"]);
        assert_eq!(environment(&it, &account(None)), ["A=1", "HOME=/"]);
        it.env.push("HOME=/mine".into());
        assert_eq!(environment(&it, &account(Some("/home/x"))), ["A=1", "HOME=/mine"]);
    }

    #[test]
    fn an_environment_entry_without_a_name_is_refused() {
        for bad in ["NAME", "=x", ""] {
            let mut it = start("/");
            it.env.push(bad.into());
            assert!(matches!(check(&it), Err(Error::Invalid(_))), "{bad}");
        }
        assert!(check(&start("/")).is_ok());
    }
}
