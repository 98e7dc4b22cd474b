//! What a process gives up before it becomes its program, as steps around the change of its user.
//!
//! The order is that of runc, whose seccomp profiles are written for it: with `no_new_privs` the filter comes
//! last, without it a filter needs CAP_SYS_ADMIN and therefore comes before the capabilities go.

use mvm_protocol::Confinement;

use crate::{
    error::{Error, Result},
    step::Step,
};

/// Bytes of one instruction of a filter, and most instructions the kernel takes (`BPF_MAXINSNS`).
const INSTRUCTION: usize = 8;
const MAX_INSTRUCTIONS: usize = 4096;

/// `SECCOMP_FILTER_FLAG_TSYNC`, `_LOG` and `_SPEC_ALLOW`: those that give no descriptor to wait on.
const FILTER_FLAGS: u64 = 0x7;

/// Everything from the resource limits to the last step before the program.
pub(crate) fn steps<'a>(confinement: &Confinement, credentials: Step<'a>) -> Result<Vec<Step<'a>>> {
    let mut steps: Vec<Step<'a>> = confinement.rlimits.iter().copied().map(Step::LimitResource).collect();
    steps.extend(confinement.scheduler.map(Step::Schedule));
    steps.extend(confinement.io_priority.map(Step::IoPriority));
    let filter = filter(confinement)?;
    let (early, late) = match confinement.no_new_privileges {
        true => (Some(Step::NoNewPrivileges), filter),
        false => (filter, None),
    };
    steps.extend(early);
    match confinement.capabilities {
        None => steps.push(credentials),
        Some(sets) => steps.extend([
            Step::BoundCapabilities(sets.bounding),
            Step::KeepCapabilities(true),
            credentials,
            Step::KeepCapabilities(false),
            Step::Capabilities(sets),
        ]),
    }
    steps.push(Step::UnblockSignals);
    steps.extend(late);
    Ok(steps)
}

fn filter<'a>(confinement: &Confinement) -> Result<Option<Step<'a>>> {
    let Confinement { seccomp, seccomp_flags: flags, .. } = confinement;
    if seccomp.is_empty() {
        return Ok(None);
    }
    let (instructions, rest) = seccomp.as_chunks::<INSTRUCTION>();
    if !rest.is_empty() || instructions.len() > MAX_INSTRUCTIONS {
        return Err(Error::Invalid(format!("a system call filter cannot have {} bytes", seccomp.len())));
    }
    if flags & !FILTER_FLAGS != 0 {
        return Err(Error::Invalid(format!("system call filter flags {flags:#x} are not supported")));
    }
    let program = instructions.iter().map(|it| u64::from_ne_bytes(*it)).collect();
    Ok(Some(Step::FilterSystemCalls { program, flags: *flags }))
}

#[cfg(test)]
mod tests {
    use mvm_protocol::{Capabilities, Rlimit, Scheduler};
    use nix::unistd::{Gid, Uid};

    use super::*;

    fn plan(confinement: &Confinement) -> Vec<String> {
        let credentials =
            Step::Credentials { uid: Uid::from_raw(1), gid: Gid::from_raw(1), groups: Vec::new() };
        let name = |step: &Step<'_>| {
            let text = format!("{step:?}");
            text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
        };
        steps(confinement, credentials).unwrap().iter().map(name).collect()
    }

    fn full() -> Confinement {
        Confinement {
            capabilities: Some(Capabilities::default()),
            no_new_privileges: true,
            rlimits: vec![Rlimit { resource: 7, soft: 1, hard: 2 }],
            umask: None,
            seccomp: vec![0; 16],
            seccomp_flags: 2,
            io_priority: Some(0x4007),
            scheduler: Some(Scheduler { policy: 3, nice: 5, priority: 0 }),
        }
    }

    #[test]
    fn with_no_new_privileges_the_filter_comes_last() {
        let expected = [
            "LimitResource",
            "Schedule",
            "IoPriority",
            "NoNewPrivileges",
            "BoundCapabilities",
            "KeepCapabilities",
            "Credentials",
            "KeepCapabilities",
            "Capabilities",
            "UnblockSignals",
            "FilterSystemCalls",
        ];
        assert_eq!(plan(&full()), expected);
    }

    #[test]
    fn without_it_the_filter_comes_while_the_capability_for_it_is_still_there() {
        let steps = plan(&Confinement { no_new_privileges: false, ..full() });
        assert_eq!(steps[3..5], ["FilterSystemCalls", "BoundCapabilities"]);
        assert_eq!(steps.last().unwrap(), "UnblockSignals");
    }

    #[test]
    fn a_process_that_is_not_confined_only_changes_its_user() {
        assert_eq!(plan(&Confinement::default()), ["Credentials", "UnblockSignals"]);
    }

    #[test]
    fn a_filter_that_is_cut_too_long_or_wants_a_listener_is_refused() {
        let refused = |seccomp: Vec<u8>, seccomp_flags| {
            filter(&Confinement { seccomp, seccomp_flags, ..Confinement::default() }).is_err()
        };
        assert!(refused(vec![0; 15], 0));
        assert!(refused(vec![0; 8 * 4097], 0));
        assert!(!refused(vec![0; 8 * 4096], 0));
        assert!(refused(vec![0; 8], 8), "SECCOMP_FILTER_FLAG_NEW_LISTENER");
    }
}
