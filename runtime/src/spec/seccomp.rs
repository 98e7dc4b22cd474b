//! A seccomp profile becomes its program.
//!
//! [`seccompiler`] compiles rules of one action each. A profile has several, so its rules are laid in passes: within a
//! pass all rules of a system call have one action, and what a pass does not decide goes on to the next, the last of
//! them to the default action. Each pass is compiled by the crate; joining them is putting a jump to the next where
//! the crate returns its mismatch.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::refused::{Refused, Result};
use super::syscalls;

/// Instructions at the beginning of a compiled filter that check the architecture: done once for all passes here.
const ARCHITECTURE_CHECK: usize = 3;
/// Most instructions of a program (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
/// `AUDIT_ARCH_X86_64`.
const AUDIT_X86_64: u32 = 0xc000_003e;
/// Set in the number of each system call of the x32 ABI.
const X32_BIT: u32 = 0x4000_0000;
/// Offset of `nr` in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
/// Offset of `arch` in `struct seccomp_data`.
const ARCH_AT: u32 = 4;
/// `BPF_LD | BPF_W | BPF_ABS`.
const LOAD: u16 = 0x20;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
const JUMP_IF_EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JGT | BPF_K`.
const JUMP_IF_GREATER: u16 = 0x25;
/// `BPF_JMP | BPF_JGE | BPF_K`.
const JUMP_IF_AT_LEAST: u16 = 0x35;
/// `BPF_JMP | BPF_JA`.
const JUMP: u16 = 0x05;
/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;
/// What [`SeccompAction::Errno`] carries at most.
const MAX_ERRNO: u32 = 4095;

/// A compiled profile. The default is no filter at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// `struct sock_filter`, eight bytes each, in the guest's byte order.
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

/// Rules of one system call: those of an action that follow one another, in the profile's order. Conditions of a rule
/// must all hold; a rule without any always does.
type Runs = Vec<(SeccompAction, Vec<Vec<SeccompCondition>>)>;

/// System calls whose rules have one action, with those rules.
type Pass = (SeccompAction, BTreeMap<i64, Vec<Vec<SeccompCondition>>>);

/// Compiles a profile.
///
/// # Errors
/// An action or argument that cannot be, or a profile larger than a program may be.
pub fn profile(given: Option<&LinuxSeccomp>) -> Result<Profile> {
    let Some(given) = given else { return Ok(Profile::default()) };
    let listener = "a listener on the host would have to answer for processes in the guest";
    if given.listener_path().is_some() {
        return Err(Refused::new("linux.seccomp.listenerPath", listener));
    }
    let default = action(given.default_action(), given.default_errno_ret(), "linux.seccomp.defaultAction")?;
    let rules = rules(given, &default)?;
    let mut program = prologue(given, &default);
    for (action, rules) in passes(&rules) {
        program.extend(compile(rules, action)?);
    }
    program.push(instruction(RETURN, 0, 0, default.into()));
    if program.len() > MAX_INSTRUCTIONS {
        let reason = format!("its program has {} instructions, more than {MAX_INSTRUCTIONS}", program.len());
        return Err(Refused::new("linux.seccomp.syscalls", reason));
    }
    Ok(Profile { program: bytes(&program), flags: flags(given.flags().as_deref().unwrap_or_default()) })
}

/// The flags that mean something for a filter without a listener, set by a process of one thread.
fn flags(given: &[LinuxSeccompFilterFlag]) -> u64 {
    given.iter().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            }
    })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>, field: &str) -> Result<SeccompAction> {
    let data = errno.unwrap_or(libc::EPERM.unsigned_abs());
    if data > MAX_ERRNO {
        return Err(Refused::new(field, format!("{data} is no error number")));
    }
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        LinuxSeccompAction::ScmpActErrno => SeccompAction::Errno(data),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => SeccompAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => SeccompAction::Trap,
        LinuxSeccompAction::ScmpActTrace => SeccompAction::Trace(data),
        LinuxSeccompAction::ScmpActLog => SeccompAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Refused::new(field, "SCMP_ACT_NOTIFY needs a listener outside the guest"));
        }
    })
}

/// The rules by system call. Names the guest's kernel does not know name nothing that could be called, and rules that
/// do what is done anyway say nothing.
fn rules(given: &LinuxSeccomp, default: &SeccompAction) -> Result<BTreeMap<i64, Runs>> {
    let mut rules: BTreeMap<i64, Runs> = BTreeMap::new();
    for syscall in given.syscalls().as_deref().unwrap_or_default() {
        let action = action(syscall.action(), syscall.errno_ret(), "linux.seccomp.syscalls.action")?;
        if action == *default {
            continue;
        }
        let alternatives = alternatives(syscall)?;
        for number in syscall.names().iter().filter_map(|name| syscalls::number(name)) {
            let runs = rules.entry(number).or_default();
            match runs.last_mut() {
                Some((last, rules)) if *last == action => rules.extend(alternatives.iter().cloned()),
                _ => runs.push((action.clone(), alternatives.clone())),
            }
        }
    }
    // A rule for every call of a system call decides it, whatever rules for some calls stand beside it.
    for runs in rules.values_mut() {
        if let Some((action, _)) = runs.iter().find(|(_, rules)| rules.iter().any(Vec::is_empty)) {
            *runs = vec![(action.clone(), Vec::new())];
        }
    }
    Ok(rules)
}

/// The conditions of a rule. Conditions on the same argument are alternatives, as runc reads them.
fn alternatives(syscall: &LinuxSyscall) -> Result<Vec<Vec<SeccompCondition>>> {
    let args = syscall.args().as_deref().unwrap_or_default();
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>>>()?;
    let mut indices: Vec<_> = args.iter().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    indices.dedup();
    if indices.len() < args.len() {
        return Ok(conditions.into_iter().map(|condition| vec![condition]).collect());
    }
    Ok(vec![conditions])
}

fn condition(arg: &LinuxSeccompArg) -> Result<SeccompCondition> {
    let wrong = || Refused::new("linux.seccomp.syscalls.args.index", format!("{} is above 5", arg.index()));
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (SeccompCmpOp::Lt, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (SeccompCmpOp::Le, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (SeccompCmpOp::Ge, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (SeccompCmpOp::Gt, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let mask = arg.value();
            (SeccompCmpOp::MaskedEq(mask), arg.value_two().unwrap_or(0) & mask)
        }
    };
    let index = u8::try_from(arg.index()).map_err(|_| wrong())?;
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value).map_err(|_| wrong())
}

/// The n-th runs of all system calls, by action, for each n.
fn passes(rules: &BTreeMap<i64, Runs>) -> Vec<Pass> {
    let depth = rules.values().map(Vec::len).max().unwrap_or(0);
    let mut passes: Vec<Pass> = Vec::new();
    for level in 0..depth {
        let begin = passes.len();
        for (number, runs) in rules {
            let Some((action, rules)) = runs.get(level) else { continue };
            let at = passes.iter().skip(begin).position(|(other, _)| other == action);
            let at = at.map_or(passes.len(), |at| begin.saturating_add(at));
            if at == passes.len() {
                passes.push((action.clone(), BTreeMap::new()));
            }
            if let Some((_, pass)) = passes.get_mut(at) {
                pass.insert(*number, rules.clone());
            }
        }
    }
    passes
}

/// One pass, with jumps past its end where it does not decide.
fn compile(
    rules: BTreeMap<i64, Vec<Vec<SeccompCondition>>>,
    action: SeccompAction,
) -> Result<Vec<sock_filter>> {
    let wrong = |error: seccompiler::BackendError| Refused::new("linux.seccomp.syscalls", error.to_string());
    let mut compiled = BTreeMap::new();
    for (number, rules) in rules {
        let rules: std::result::Result<Vec<_>, _> = rules.into_iter().map(SeccompRule::new).collect();
        compiled.insert(number, rules.map_err(wrong)?);
    }
    // Any action will do that is not the one of the rules: it marks where to go on.
    let mark = if action == SeccompAction::Log { SeccompAction::Trap } else { SeccompAction::Log };
    let filter = SeccompFilter::new(compiled, mark.clone(), action, TargetArch::x86_64).map_err(wrong)?;
    let program = BpfProgram::try_from(filter).map_err(wrong)?;
    let mark = u32::from(mark);
    let mut program: Vec<_> = program.into_iter().skip(ARCHITECTURE_CHECK).collect();
    let length = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.code == RETURN && instruction.k == mark {
            let rest = length.saturating_sub(at).saturating_sub(1);
            *instruction = self::instruction(JUMP, 0, 0, u32::try_from(rest).unwrap_or(u32::MAX));
        }
    }
    Ok(program)
}

/// What comes before the rules: calls of other ABIs, and calls newer than the profile.
fn prologue(given: &LinuxSeccomp, default: &SeccompAction) -> Vec<sock_filter> {
    let no_such_call = u32::from(SeccompAction::Errno(libc::ENOSYS.unsigned_abs()));
    let listed = given.architectures().as_deref().unwrap_or_default();
    // The guest's kernel has neither ABI: a profile that lets them in gets the kernel's answer.
    let other = |arch| if listed.contains(&arch) { no_such_call } else { SeccompAction::KillProcess.into() };
    let mut program = vec![
        instruction(LOAD, 0, 0, ARCH_AT),
        instruction(JUMP_IF_EQUAL, 1, 0, AUDIT_X86_64),
        instruction(RETURN, 0, 0, other(Arch::ScmpArchX86)),
        instruction(LOAD, 0, 0, NUMBER_AT),
        instruction(JUMP_IF_AT_LEAST, 0, 1, X32_BIT),
        instruction(RETURN, 0, 0, other(Arch::ScmpArchX32)),
    ];
    // Programs try new calls first and take ENOSYS, but not EPERM, as word to use older ones. Whoever wrote the
    // profile did not mean calls that came later, so they are answered as if the kernel were as old, as runc does.
    let named = given.syscalls().iter().flatten().flat_map(|syscall| syscall.names());
    let newest = named.filter_map(|name| syscalls::number(name)).max();
    let lets_pass = matches!(default, SeccompAction::Allow | SeccompAction::Log | SeccompAction::Trace(_));
    if let (false, Some(newest)) = (lets_pass, newest.and_then(|newest| u32::try_from(newest).ok())) {
        program.push(instruction(JUMP_IF_GREATER, 0, 1, newest));
        program.push(instruction(RETURN, 0, 0, no_such_call));
    }
    program
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn bytes(program: &[sock_filter]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(program.len().saturating_mul(8));
    for instruction in program {
        bytes.extend(instruction.code.to_le_bytes());
        bytes.extend([instruction.jt, instruction.jf]);
        bytes.extend(instruction.k.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
