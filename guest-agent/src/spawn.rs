//! Fork, perform steps, become a program; and hear from the child where that failed.
//!
//! A child that is to become a program shares the agent's memory until it has, and the agent stands still meanwhile: to
//! copy its memory and to give the copy back would be a quarter of what it takes to start a small program.

use std::{
    ffi::CString,
    os::fd::{BorrowedFd, OwnedFd},
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::wait::waitpid,
    unistd::Pid,
};

use crate::{
    error::{Context, Error, Result},
    step::{Kernel, Linux, Step, perform_all},
    sys::{self, StringArray},
};

/// Where programs are looked for when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
        process(pid).map(Self::Of)
    }

    /// Makes the next fork end up there.
    fn choose(&self) -> nix::Result<()> {
        match self {
            Self::Agent => Ok(()),
            Self::New => unshare(CloneFlags::CLONE_NEWPID),
            Self::Of(process) => setns(process, CloneFlags::CLONE_NEWPID),
        }
    }
}

/// A descriptor of a process, which stands for the name spaces it lives in.
fn process(pid: Pid) -> Result<OwnedFd> {
    sys::open_process(pid).context(|| "cannot open a PID name space".into())
}

/// The agent's own, opened once.
fn own_process() -> Result<&'static OwnedFd> {
    static OWN: OnceLock<OwnedFd> = OnceLock::new();
    match OWN.get() {
        Some(own) => Ok(own),
        None => process(Pid::this()).map(|own| OWN.get_or_init(|| own)),
    }
}

/// A child that performs `steps` and has become `program` by the time this returns. One that could not is reaped here.
pub(crate) fn launch(steps: &[Step<'_>], program: &Program, place: &Place<'_>) -> Result<Pid> {
    let mut failure = None;
    let child = &mut || failure = Some(run_child(&mut Linux, steps, program));
    let pid = divide(place, |cgroup| sys::fork_sharing(cgroup, child).map(Some))?;
    let pid = pid.ok_or_else(|| Error::Invalid("a child has come back".into()))?;
    let Some((at, errno)) = failure else { return Ok(pid) };
    let _ = waitpid(pid, None);
    Err(match at.and_then(|at| steps.get(at)) {
        Some(step) => Error::System { what: step.to_string(), errno },
        None => Error::Exec { program: program.name.clone(), errno },
    })
}

/// Forks with the child in its place, in memory of its own; `None` in the child.
pub(crate) fn fork_at(place: &Place<'_>) -> Result<Option<Pid>> {
    divide(place, |cgroup| match cgroup {
        Some(cgroup) => sys::fork_into(cgroup),
        None => sys::fork(),
    })
}

/// Forks by `fork`, which is given the cgroup, with the child in the PID name space of its place; `None` in the child.
fn divide(
    place: &Place<'_>,
    fork: impl FnOnce(Option<BorrowedFd<'_>>) -> nix::Result<Option<Pid>>,
) -> Result<Option<Pid>> {
    let own = match place.pids {
        PidSpace::Agent => None,
        _ => Some(own_process()?),
    };
    let forked = place.pids.choose().and_then(|()| fork(place.cgroup));
    // The agent's own children are to be in its own name space again.
    if let Some(own) = own
        && forked != Ok(None)
    {
        setns(own, CloneFlags::CLONE_NEWPID)
            .context(|| "cannot return to the agent's PID name space".into())?;
    }
    forked.context(|| "cannot fork".into())
}

/// Becomes the program; returns only why not, and which step it was unless it was the last of all.
fn run_child(kernel: &mut dyn Kernel, steps: &[Step<'_>], program: &Program) -> (Option<usize>, Errno) {
    match perform_all(kernel, steps) {
        Ok(()) => (None, program.exec()),
        Err((index, errno)) => (Some(index), errno),
    }
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
