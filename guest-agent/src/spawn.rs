//! Fork, perform steps, become a program; and hear from the child where that failed.
//!
//! The child reports through a close-on-exec pipe: end of file means the program runs.

use std::{
    ffi::CString,
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns, unshare},
    sys::{stat::Mode, wait::waitpid},
    unistd::{Pid, pipe2, write},
};

use crate::{
    error::{Context, Error, Result},
    step::{Kernel, Linux, Step, perform_all},
    sys::{self, StringArray},
};

/// Where programs are looked for when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// In a report: no step but the execution itself failed.
const EXEC: u32 = u32::MAX;

/// A program to become, with all that execve(2) needs made beforehand.
pub(crate) struct Program {
    name: String,
    /// What to try, in order.
    candidates: Vec<CString>,
    args: StringArray,
    env: StringArray,
}

impl Program {
    /// The program `args[0]`, looked for in the `PATH` of `env` unless it has a slash.
    pub(crate) fn new(args: &[String], env: &[String]) -> Result<Self> {
        let name = args.first().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| Error::Invalid("there is no program to run".into()))?;
        let candidates = if name.contains('/') {
            vec![c_string(name)?]
        } else {
            let path = env.iter().find_map(|it| it.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
            path.split(':').map(|dir| c_string(&in_directory(dir, name))).collect::<Result<_>>()?
        };
        let array = |strings: &[String]| -> Result<StringArray> {
            Ok(StringArray::new(strings.iter().map(|it| c_string(it)).collect::<Result<_>>()?))
        };
        Ok(Self { name: name.clone(), candidates, args: array(args)?, env: array(env)? })
    }

    /// Becomes the program; returns only why not. What lacks permission counts more than what is missing.
    fn exec(&self) -> Errno {
        let mut refused = Errno::ENOENT;
        for candidate in &self.candidates {
            match sys::execve(candidate, &self.args, &self.env) {
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => refused = Errno::EACCES,
                errno => return errno,
            }
        }
        refused
    }
}

fn in_directory(directory: &str, name: &str) -> String {
    match directory {
        "" => format!("./{name}"),
        directory => format!("{directory}/{name}"),
    }
}

/// A string for the kernel; one with a NUL in it has no such form.
pub(crate) fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Invalid("a string contains a NUL byte".into()))
}

/// The pipe a child reports through.
pub(crate) struct Report {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Report {
    /// Makes the pipe; its writer must be spared by [`Step::CloseOthers`].
    pub(crate) fn new() -> Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
        Ok(Self { reader, writer })
    }

    /// The descriptor the child keeps open until it has become the program.
    pub(crate) fn writer(&self) -> RawFd {
        self.writer.as_raw_fd()
    }
}

/// Where a child is to live.
pub(crate) struct Place<'a> {
    pub(crate) pids: PidSpace,
    /// The directory of its cgroup.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// Which PID name space a child is to live in.
pub(crate) enum PidSpace {
    Agent,
    New,
    Of(OwnedFd),
}

impl PidSpace {
    /// The name space a process lives in.
    pub(crate) fn of(pid: Pid) -> Result<Self> {
        open_pid_space(&format!("/proc/{pid}/ns/pid")).map(Self::Of)
    }

    /// Makes the next fork end up there.
    fn choose(&self) -> nix::Result<()> {
        match self {
            Self::Agent => Ok(()),
            Self::New => unshare(CloneFlags::CLONE_NEWPID),
            Self::Of(space) => setns(space, CloneFlags::CLONE_NEWPID),
        }
    }
}

fn open_pid_space(path: &str) -> Result<OwnedFd> {
    open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .context(|| "cannot open a PID name space".into())
}

/// A child that performs `steps` and becomes `program`; [`await_exec`] tells whether it did.
pub(crate) fn launch(
    steps: &[Step<'_>],
    program: &Program,
    report: &Report,
    place: &Place<'_>,
) -> Result<Pid> {
    match fork_at(place)? {
        Some(pid) => Ok(pid),
        None => run_child(&mut Linux, steps, program, report.writer.as_fd()),
    }
}

/// Forks with the child in its place; `None` in the child.
pub(crate) fn fork_at(place: &Place<'_>) -> Result<Option<Pid>> {
    let own = match place.pids {
        PidSpace::Agent => None,
        _ => Some(open_pid_space("/proc/self/ns/pid")?),
    };
    let forked = place.pids.choose().and_then(|()| match place.cgroup {
        Some(cgroup) => sys::fork_into(cgroup),
        None => sys::fork(),
    });
    // The agent's own children are to be in its own name space again.
    if let Some(own) = own
        && forked != Ok(None)
    {
        setns(own, CloneFlags::CLONE_NEWPID)
            .context(|| "cannot return to the agent's PID name space".into())?;
    }
    forked.context(|| "cannot fork".into())
}

fn run_child(kernel: &mut dyn Kernel, steps: &[Step<'_>], program: &Program, report: BorrowedFd<'_>) -> ! {
    let (at, errno) = match perform_all(kernel, steps) {
        Ok(()) => (EXEC, program.exec()),
        Err((index, errno)) => (u32::try_from(index).unwrap_or(EXEC), errno),
    };
    let [a, b, c, d] = at.to_ne_bytes();
    let [e, f, g, h] = (errno as i32).to_ne_bytes();
    let _ = write(report, &[a, b, c, d, e, f, g, h]);
    sys::exit_now(127)
}

/// Waits until the child is the program. One that could not become it is reaped here.
pub(crate) fn await_exec(pid: Pid, steps: &[Step<'_>], program: &Program, report: Report) -> Result<()> {
    drop(report.writer);
    let mut record = [0; 8];
    if File::from(report.reader).read_exact(&mut record).is_err() {
        return Ok(());
    }
    let _ = waitpid(pid, None);
    let [a, b, c, d, e, f, g, h] = record;
    let errno = Errno::from_raw(i32::from_ne_bytes([e, f, g, h]));
    let at = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok();
    Err(match at.and_then(|at| steps.get(at)) {
        Some(step) => Error::System { what: step.to_string(), errno },
        None => Error::Exec { program: program.name.clone(), errno },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(args: &[&str], env: &[&str]) -> Vec<String> {
        let own = |strings: &[&str]| strings.iter().map(|&it| it.to_owned()).collect::<Vec<_>>();
        let program = Program::new(&own(args), &own(env)).unwrap();
        program.candidates.iter().map(|it| it.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_bare_name_is_looked_for_in_the_path_of_its_own_environment() {
        assert_eq!(candidates(&["sh", "-c"], &["A=1", "PATH=/bin:/x"]), ["/bin/sh", "/x/sh"]);
        assert_eq!(candidates(&["sh"], &["PATH=:/x"]), ["./sh", "/x/sh"]);
    }

    #[test]
    fn a_name_with_a_slash_is_not_looked_for() {
        assert_eq!(candidates(&["./run"], &["PATH=/bin"]), ["./run"]);
    }

    #[test]
    fn without_a_path_the_usual_directories_are_tried() {
        assert_eq!(candidates(&["id"], &[]).last().unwrap(), "/bin/id");
    }

    #[test]
    fn nothing_to_run_or_a_nul_byte_is_refused() {
        assert!(matches!(Program::new(&[], &[]), Err(Error::Invalid(_))));
        assert!(matches!(Program::new(&[String::new()], &[]), Err(Error::Invalid(_))));
        assert!(matches!(Program::new(&["a\0b".into()], &[]), Err(Error::Invalid(_))));
    }
}
