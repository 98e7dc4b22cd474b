//! A process of a specification becomes what the agent starts.

use mvm_protocol::{Confinement, Rlimit, Scheduler, User, WindowSize};
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Process,
    Scheduler as OciScheduler,
};

use super::capabilities::capabilities;
use super::refused::{Refused, Result};
use super::seccomp::Profile;

/// What of a process its specification decides; where it runs and what its streams are is its sandbox's business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessPart {
    /// Program and arguments, at least one.
    pub args: Vec<String>,
    /// The whole environment.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: String,
    /// Who it runs as.
    pub user: User,
    /// `oom_score_adj`.
    pub oom_score_adj: i16,
    /// What confines it.
    pub confinement: Confinement,
    /// The size of its terminal, if it has one and the specification says.
    pub window: Option<WindowSize>,
}

/// Translates `process`; `profile` is its container's system call filter.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn process(process: &Process, profile: &Profile) -> Result<ProcessPart> {
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return Err(Refused::new("process.args", "it names no program"));
    }
    let cwd = process.cwd().to_str().unwrap_or_default();
    if !cwd.starts_with('/') {
        return Err(Refused::new("process.cwd", format!("{:?} is no absolute path", process.cwd())));
    }
    let user = process.user();
    let adjustment = process.oom_score_adj().unwrap_or(0);
    let oom_score_adj = i16::try_from(adjustment).ok().filter(|score| (-1000..=1000).contains(score));
    Ok(ProcessPart {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd: cwd.to_owned(),
        user: account(user),
        oom_score_adj: oom_score_adj.ok_or_else(|| {
            Refused::new("process.oomScoreAdj", format!("{adjustment} is not in -1000 to 1000"))
        })?,
        confinement: Confinement {
            capabilities: Some(capabilities(process.capabilities().as_ref())),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
            umask: user.umask().map(umask).transpose()?,
            seccomp: profile.program.clone(),
            seccomp_flags: profile.flags,
            io_priority: process.io_priority().as_ref().map(io_priority).transpose()?,
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
        },
        window: window(process)?,
    })
}

/// Who the process runs as. A name stands where nobody has looked it up: the agent does, in the container's own user
/// database, as an image's `User` is meant.
fn account(user: &oci_spec::runtime::User) -> User {
    let groups = user.additional_gids().clone().unwrap_or_default();
    match user.username() {
        Some(name) if !name.is_empty() && user.uid() == 0 && user.gid() == 0 && groups.is_empty() => {
            User::Named(name.clone())
        }
        _ => User::Ids { uid: user.uid(), gid: user.gid(), groups },
    }
}

fn umask(mask: u32) -> Result<u32> {
    let fits = mask <= 0o777;
    fits.then_some(mask)
        .ok_or_else(|| Refused::new("process.user.umask", format!("{mask:#o} is more than 0o777")))
}

/// The size of the terminal, if there is one; numbers no terminal has are refused.
fn window(process: &Process) -> Result<Option<WindowSize>> {
    let (Some(true), Some(size)) = (process.terminal(), process.console_size()) else { return Ok(None) };
    let side = |value: u64| {
        u16::try_from(value).map_err(|_| Refused::new("process.consoleSize", format!("{value} is too large")))
    };
    Ok(Some(WindowSize { rows: side(size.height())?, columns: side(size.width())? }))
}

fn rlimits(given: &[PosixRlimit]) -> Result<Vec<Rlimit>> {
    let mut limits: Vec<Rlimit> = Vec::new();
    for limit in given {
        let resource = rlimit_number(limit.typ());
        let wrong = |why: &str| Refused::new("process.rlimits", format!("{} {why}", limit.typ()));
        if limit.soft() > limit.hard() {
            return Err(wrong("has a soft limit above its hard limit"));
        }
        if limits.iter().any(|other| other.resource == resource) {
            return Err(wrong("is limited twice"));
        }
        limits.push(Rlimit { resource, soft: limit.soft(), hard: limit.hard() });
    }
    Ok(limits)
}

/// `RLIMIT_*` of Linux on this architecture.
fn rlimit_number(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// As ioprio_set(2) takes it: the class above thirteen bits of level.
fn io_priority(given: &LinuxIOPriority) -> Result<u32> {
    let class = match given.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u32::try_from(given.priority()).ok().filter(|level| *level < 8).ok_or_else(|| {
        Refused::new("process.ioPriority.priority", format!("{} is not in 0 to 7", given.priority()))
    })?;
    Ok(class << 13 | level)
}

fn scheduler(given: &OciScheduler) -> Result<Scheduler> {
    let policy = match given.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        other @ (LinuxSchedulerPolicy::SchedIso | LinuxSchedulerPolicy::SchedDeadline) => {
            let reason = format!("{other}: a machine's CPUs share the host's, and keep no deadlines");
            return Err(Refused::new("process.scheduler.policy", reason));
        }
    };
    if given.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(Refused::new("process.scheduler.flags", "none of them is passed on to the guest"));
    }
    for (field, value) in
        [("runtime", given.runtime()), ("deadline", given.deadline()), ("period", given.period())]
    {
        if value.is_some_and(|value| value != 0) {
            let reason = "it belongs to SCHED_DEADLINE, which a machine does not keep";
            return Err(Refused::new(format!("process.scheduler.{field}"), reason));
        }
    }
    let priority = given.priority().unwrap_or(0);
    Ok(Scheduler {
        policy: policy.unsigned_abs(),
        nice: given.nice().unwrap_or(0),
        priority: u32::try_from(priority)
            .map_err(|_| Refused::new("process.scheduler.priority", format!("{priority} is below zero")))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translate(json: &str) -> Result<ProcessPart> {
        process(&serde_json::from_str(json).unwrap(), &Profile::default())
    }

    #[test]
    fn everything_a_process_may_say_arrives() {
        let part = translate(
            r#"{"args":["a","b"],"env":["A=1"],"cwd":"/w","terminal":true,
                "consoleSize":{"height":24,"width":80},"oomScoreAdj":-998,"noNewPrivileges":true,
                "user":{"uid":1,"gid":2,"umask":63,"additionalGids":[3,4]},
                "rlimits":[{"type":"RLIMIT_NOFILE","soft":10,"hard":20}],
                "ioPriority":{"class":"IOPRIO_CLASS_IDLE","priority":5},
                "scheduler":{"policy":"SCHED_BATCH","nice":3}}"#,
        )
        .unwrap();
        assert_eq!(
            (part.args, part.env, part.cwd),
            (vec!["a".into(), "b".into()], vec!["A=1".into()], "/w".into())
        );
        assert_eq!(part.user, User::Ids { uid: 1, gid: 2, groups: vec![3, 4] });
        assert_eq!(part.window, Some(WindowSize { rows: 24, columns: 80 }));
        assert_eq!(part.oom_score_adj, -998);
        let confinement = part.confinement;
        assert_eq!(confinement.rlimits, [Rlimit { resource: 7, soft: 10, hard: 20 }]);
        assert_eq!(confinement.umask, Some(0o77));
        assert_eq!(confinement.io_priority, Some(3 << 13 | 5));
        assert_eq!(confinement.scheduler, Some(Scheduler { policy: 3, nice: 3, priority: 0 }));
        assert!(confinement.no_new_privileges);
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        let base = r#""user":{},"cwd":"/","args":["x"]"#;
        for (more, field) in [
            (r#","rlimits":[{"type":"RLIMIT_CPU","soft":2,"hard":1}]"#, "process.rlimits"),
            (r#","oomScoreAdj":1001"#, "process.oomScoreAdj"),
            (r#","ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#, "process.ioPriority.priority"),
            (r#","scheduler":{"policy":"SCHED_DEADLINE"}"#, "process.scheduler.policy"),
            (r#","terminal":true,"consoleSize":{"height":65536,"width":1}"#, "process.consoleSize"),
        ] {
            assert_eq!(translate(&format!("{{{base}{more}}}")).unwrap_err().field, field);
        }
        assert_eq!(translate(r#"{"user":{},"cwd":"x","args":["x"]}"#).unwrap_err().field, "process.cwd");
        assert_eq!(translate(r#"{"user":{},"cwd":"/"}"#).unwrap_err().field, "process.args");
    }
}
