//! Who the agent says it is, and who the host says the guest is to be.

use std::ffi::CString;

use mvm_protocol::{Hello, Identity, MAGIC, StageTimes, VERSION};
use nix::sys::utsname::uname;

use crate::{
    boot::Role,
    error::{Context, Result},
    kmsg,
    step::{Kernel, Step},
};

/// How far the wall clock may be from the host's after a boot: kvm-clock usually has it right, and what the host
/// says took its time to come here.
const BOOTED_TOLERANCE_NS: u64 = 100_000_000;
/// The same in a machine that goes on after it was saved: its clock stood still meanwhile.
const RESUMED_TOLERANCE_NS: u64 = 1_000_000;

/// The hello of this agent on its `connection`th connection.
pub(crate) fn hello(connection: u32, stages: StageTimes) -> Hello {
    let kernel_release =
        uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    let agent_version = env!("CARGO_PKG_VERSION").to_owned();
    Hello { magic: MAGIC, version: VERSION, agent_version, kernel_release, connection, stages }
}

/// Becomes who the host says, which may be another than before; `resumed` says that others may have gone on from
/// where this machine was saved.
///
/// # Errors
/// It would give out the same randomness as those others. Nothing else is worth losing the machine for.
pub(crate) fn assume(kernel: &mut dyn Kernel, identity: &Identity, role: Role, resumed: bool) -> Result<()> {
    for step in steps(identity, role, resumed) {
        match kernel.perform(&step) {
            Err(errno) if resumed && matches!(step, Step::Reseed(_)) => {
                return Err(errno).context(|| step.to_string());
            }
            Err(errno) => kmsg::say(&format!("{step}: {errno}")),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Randomness comes first: nothing may be made of what a clone shares with its siblings.
fn steps(identity: &Identity, role: Role, resumed: bool) -> Vec<Step<'static>> {
    let mut steps = Vec::new();
    // Clock and entropy pool belong to the machine, and a trial run has no machine of its own.
    if role == Role::Init {
        steps.push(Step::Reseed(identity.entropy));
        if identity.wall_clock_ns != 0 {
            let tolerance_ns = if resumed { RESUMED_TOLERANCE_NS } else { BOOTED_TOLERANCE_NS };
            steps.push(Step::WallClock { ns: identity.wall_clock_ns, tolerance_ns });
        }
    }
    if let Ok(name) = CString::new(identity.hostname.as_str())
        && !name.is_empty()
    {
        steps.push(Step::HostName(name));
    }
    steps
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    /// Notes steps, and performs none; fails all if it is told to.
    #[derive(Default)]
    struct Notebook {
        steps: Vec<String>,
        fails: bool,
    }

    impl Kernel for Notebook {
        fn perform(&mut self, step: &Step<'_>) -> nix::Result<()> {
            self.steps.push(format!("{step:?}"));
            if self.fails { Err(Errno::EPERM) } else { Ok(()) }
        }
    }

    fn identity(hostname: &str, wall_clock_ns: u64) -> Identity {
        Identity { hostname: hostname.to_owned(), machine_id: 7, wall_clock_ns, entropy: [9; 32] }
    }

    fn assumed(hostname: &str, wall_clock_ns: u64, role: Role, resumed: bool) -> Vec<String> {
        let mut kernel = Notebook::default();
        assume(&mut kernel, &identity(hostname, wall_clock_ns), role, resumed).unwrap();
        kernel.steps
    }

    #[test]
    fn a_clone_that_cannot_have_randomness_of_its_own_is_nothing_and_a_booted_machine_goes_on() {
        let mut kernel = Notebook { fails: true, ..Notebook::default() };
        let failure = assume(&mut kernel, &identity("otter", 5), Role::Init, true).unwrap_err();
        assert_eq!((failure.to_string().as_str(), kernel.steps.len()), ("cannot add the host's entropy", 1));
        let mut kernel = Notebook { fails: true, ..Notebook::default() };
        assume(&mut kernel, &identity("otter", 5), Role::Init, false).unwrap();
        assert_eq!(kernel.steps.len(), 3);
    }

    #[test]
    fn a_clone_has_randomness_of_its_own_before_anything_else_and_the_hosts_clock() {
        let steps = assumed("otter", 5, Role::Init, true);
        let reseed = format!("Reseed({:?})", [9; 32]);
        assert_eq!(steps, [&reseed, "WallClock { ns: 5, tolerance_ns: 1000000 }", "HostName(\"otter\")"]);
    }

    #[test]
    fn a_booted_machine_keeps_a_clock_that_is_nearly_right_and_what_it_is_told_nothing_of() {
        let steps = assumed("", 5, Role::Init, false);
        assert_eq!(steps.get(1).unwrap(), "WallClock { ns: 5, tolerance_ns: 100000000 }");
        assert_eq!(steps.len(), 2);
        assert_eq!(assumed("", 0, Role::Init, true).len(), 1);
    }

    #[test]
    fn a_trial_run_leaves_the_developers_clock_and_randomness_alone() {
        assert_eq!(assumed("otter", 5, Role::Guest, true), ["HostName(\"otter\")"]);
        assert!(assumed("a\0b", 5, Role::Guest, false).is_empty());
    }
}
