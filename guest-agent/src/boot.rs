//! The first and last things a machine's PID 1 does: mounts, descriptors, resources at the start; sync,
//! power-off or reset at the end.

use std::{ffi::CStr, mem, os::fd::AsRawFd, path::PathBuf};

use mvm_protocol::{Configure, ShutdownMode};
use nix::{
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_dumpable,
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
        signal::{SigSet, SigmaskHow, sigprocmask},
        stat::Mode,
    },
    unistd::sync,
};

use crate::{
    cgroup, kmsg, network,
    step::{Kernel, Linux, MountCall, Step},
    sys,
};

/// What the agent is: a machine's PID 1, or a program tried out on a developer's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Init,
    /// Touches nothing outside its own name spaces, signals nothing but its own children.
    Guest,
}

impl Role {
    /// What this process is.
    pub(crate) fn of_this_process() -> Self {
        if std::process::id() == 1 { Self::Init } else { Self::Guest }
    }

    /// Where the agent keeps its mounts.
    pub(crate) fn directory(self) -> PathBuf {
        match self {
            Self::Init => PathBuf::from("/run/mvm"),
            Self::Guest => std::env::var_os("MVM_AGENT_DIR").map_or_else(|| "/run/mvm".into(), PathBuf::from),
        }
    }
}

/// What must be there before the hello.
pub(crate) fn early(role: Role) {
    // A child shares the agent's memory until it is a program, and has its container's rights by then: others with the
    // same rights are not to trace it.
    if let Err(errno) = set_dumpable(false) {
        kmsg::say(&format!("cannot keep others from tracing the agent: {errno}"));
    }
    // Here once, for itself and for every process it starts: what is handled or ignored is inherited.
    if let Err(errno) = sys::reset_signals() {
        kmsg::say(&format!("cannot reset signals: {errno}"));
    }
    let blocked = SigSet::all();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None);
    if role == Role::Init {
        perform(&early_mounts());
        open_missing_stdio();
    } else {
        isolate();
    }
}

/// What must be there before the first request, done while the hello is on its way.
pub(crate) fn late(role: Role) {
    if role == Role::Init {
        perform(&late_mounts());
        if let Err(errno) = std::fs::write("/proc/self/oom_score_adj", "-999") {
            kmsg::say(&format!("cannot protect the agent from the OOM killer: {errno}"));
        }
        // What programs expect today: few descriptors unless they ask for more, and plenty if they do.
        if let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, 1024, 524_288) {
            kmsg::say(&format!("cannot set the limit of open files: {errno}"));
        }
        if let Err(error) = network::configure(&Configure::default()) {
            kmsg::say(&error.to_string());
        }
    }
}

fn early_mounts() -> Vec<Step<'static>> {
    let none = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    [
        made(c"proc", c"/proc", none | MsFlags::MS_NODEV, c""),
        made(c"devtmpfs", c"/dev", MsFlags::MS_NOSUID, c"mode=0755"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn late_mounts() -> Vec<Step<'static>> {
    let none = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let no_exec = none | MsFlags::MS_NOEXEC;
    let pts = c"ptmxmode=0666,mode=0620,gid=5";
    [
        made(c"sysfs", c"/sys", no_exec, c""),
        made(c"tmpfs", c"/run", none, c"mode=0755"),
        made(c"tmpfs", c"/tmp", none, c"mode=1777"),
        made(c"tmpfs", c"/dev/shm", none, c"mode=1777"),
        made(c"devpts", c"/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, pts),
        made(c"cgroup2", c"/sys/fs/cgroup", no_exec, cgroup::OPTIONS),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A directory and a mount on it.
fn made(kind: &CStr, target: &CStr, flags: MsFlags, data: &CStr) -> [Step<'static>; 2] {
    let directory = Step::MakeDirectory { path: target.into(), mode: 0o755 };
    [Step::Try(Box::new(directory)), Step::Mount(MountCall::of(kind, target.into(), flags, data))]
}

/// A guest that lacks one of these may still be of use, so a failure is only said.
fn perform(steps: &[Step<'_>]) {
    for step in steps {
        match Linux.perform(step) {
            // The kernel may have mounted it already.
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => kmsg::say(&format!("{step}: {errno}")),
        }
    }
}

/// Descriptors 0 to 2 must be taken, or the agent's own would become some process's standard streams.
fn open_missing_stdio() {
    while let Ok(null) = open("/dev/null", OFlag::O_RDWR, Mode::empty()) {
        if null.as_raw_fd() > 2 {
            break;
        }
        mem::forget(null);
    }
}

/// Name spaces of its own, so that a trial run leaves no mount, host name or address behind.
fn isolate() {
    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNET;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let isolated = unshare(own).and_then(|()| mount(None::<&str>, "/", None::<&str>, private, None::<&str>));
    if let Err(errno) = isolated {
        kmsg::say(&format!("running without name spaces of its own: {errno}"));
    }
}

/// Ends the machine; outside a guest, the agent.
pub(crate) fn end(role: Role, mode: ShutdownMode) -> ! {
    if role == Role::Init {
        sync();
        let how = match mode {
            ShutdownMode::PowerOff => RebootMode::RB_POWER_OFF,
            ShutdownMode::Reboot => RebootMode::RB_AUTOBOOT,
        };
        let Err(errno) = reboot(how);
        give_up(&format!("cannot end the machine: {errno}"));
    }
    std::process::exit(0)
}

/// The agent cannot do its work. In a guest the kernel then panics, which the VMM tells apart from a
/// machine that was shut down.
pub(crate) fn give_up(why: &str) -> ! {
    kmsg::say(why);
    std::process::exit(70)
}
