//! The table of calls as a program that the kernel runs before each of a thread's calls (`linux/bpf_common.h`).
//!
//! `seccompiler` would make one that looks for the call's number among all of them, with five instructions for each value that
//! an argument may have. The kernel translates every instruction of a program that is installed, and asks the program about
//! every number there is: one with an instruction for each value, in a tree by number, with two ends for all, takes it a
//! fraction of that time, and next to no time to make. Tests hold it to what `seccompiler` makes of the same table.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{BpfProgram, SeccompAction, sock_filter};

use super::calls::{CALLS, Only, Row, Thread};

/// Calls of a leaf of the tree.
const LEAF: usize = 3;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Where the kernel has the call's number, its architecture, and its arguments of eight bytes (`linux/seccomp.h`).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// Programs of 64 bits: those of 32 have other numbers.
const X86_64: u32 = 0xc000_003e;

/// A call, and the rows of which one must hold.
type Rules = (u32, Vec<&'static Row>);

/// Where a test leads to.
#[derive(Clone, Copy)]
enum Goal {
    /// So many instructions are left out.
    Over(usize),
    Allowed,
    Denied,
}

const NEXT: Goal = Goal::Over(0);

/// An instruction, and where it leads to if what it asks holds and if not.
#[derive(Clone, Copy)]
struct Step {
    code: u16,
    k: u32,
    yes: Goal,
    no: Goal,
}

/// What `thread` may do; `denied` becomes of all else.
pub(super) fn program(thread: Thread, denied: &SeccompAction) -> io::Result<BpfProgram> {
    let mut rules = BTreeMap::<u32, Vec<&Row>>::new();
    for row in CALLS.iter().filter(|row| row.threads.contains(&thread)) {
        rules.entry(number(row.number)).or_default().push(row);
    }
    let starts = rules.contains_key(&number(libc::SYS_clone));
    let mut steps = Vec::new();
    if starts {
        // No call of clone3 can be told from another, because its flags lie in memory: whoever makes it is told that
        // there is none, and the C library makes the older one instead.
        steps.push(test(JUMP_IF_EQUAL, number(libc::SYS_clone3), NEXT, Goal::Over(1)));
        steps.push(end(&SeccompAction::Errno(libc::ENOSYS.unsigned_abs())));
    }
    let last = rules.keys().next_back().copied().unwrap_or_default();
    steps.push(test(JUMP_IF_GREATER, last, Goal::Denied, NEXT));
    steps.extend(tree(&rules.into_iter().collect::<Vec<_>>()));
    let begin = [
        step(LOAD, ARCHITECTURE),
        test(JUMP_IF_EQUAL, X86_64, Goal::Over(1), NEXT),
        end(&SeccompAction::KillProcess),
        step(LOAD, NUMBER),
    ];
    let steps = [&begin[..], &steps, &[end(&SeccompAction::Allow), end(denied)]].concat();
    let allowed = steps.len() - 2;
    steps.iter().enumerate().map(|(at, step)| step.placed(at, allowed)).collect()
}

impl Step {
    /// As the kernel has it, with the ends of the program at `allowed` and after it.
    fn placed(&self, at: usize, allowed: usize) -> io::Result<sock_filter> {
        let to = |goal| {
            let over = match goal {
                Goal::Over(steps) => steps,
                Goal::Allowed => allowed.saturating_sub(at + 1),
                Goal::Denied => allowed.saturating_sub(at),
            };
            u8::try_from(over).map_err(|_| io::Error::other("a filter's jump is too long"))
        };
        Ok(sock_filter { code: self.code, k: self.k, jt: to(self.yes)?, jf: to(self.no)? })
    }
}

/// The instructions that decide about `rules`, which are in order of numbers.
fn tree(rules: &[Rules]) -> Vec<Step> {
    let (below, above) = rules.split_at(rules.len() / 2);
    match above.first() {
        Some((first, _)) if rules.len() > LEAF => {
            let (below, above) = (tree(below), tree(above));
            let fork = test(JUMP_IF_AT_LEAST, *first, Goal::Over(below.len()), NEXT);
            [&[fork][..], &below, &above].concat()
        }
        _ => leaf(rules),
    }
}

/// The same one after the other.
fn leaf(rules: &[Rules]) -> Vec<Step> {
    let mut steps = Vec::new();
    for (index, (call, rows)) in rules.iter().enumerate() {
        let is_last = index + 1 == rules.len();
        if rows.iter().any(|row| row.only == Only::Any) {
            let other = if is_last { Goal::Denied } else { NEXT };
            steps.push(test(JUMP_IF_EQUAL, *call, Goal::Allowed, other));
            continue;
        }
        let mut alternatives = Vec::new();
        for (row, left) in rows.iter().zip((0..rows.len()).rev()) {
            alternatives.append(&mut allowed(row.only, left == 0));
        }
        let other = if is_last { Goal::Denied } else { Goal::Over(alternatives.len()) };
        steps.push(test(JUMP_IF_EQUAL, *call, NEXT, other));
        steps.append(&mut alternatives);
    }
    steps
}

/// Allows the call if `only` holds; else what follows decides, or it is denied if this is the last that may hold.
fn allowed(only: Only, is_last: bool) -> Vec<Step> {
    let is = |value| test(JUMP_IF_EQUAL, value, Goal::Allowed, NEXT);
    let masked = |argument, bits, value| vec![step(LOAD, low(argument)), step(AND, bits), is(value)];
    let mut steps = match only {
        Only::Any => Vec::new(),
        Only::OneOf(argument, values) => [step(LOAD, low(argument))]
            .into_iter()
            .chain(values.iter().map(|value| is(half(*value))))
            .collect(),
        Only::With(argument, bits) => masked(argument, bits, bits),
        Only::Without(argument, bits) => masked(argument, bits, 0),
        Only::Null(argument) => vec![
            step(LOAD, low(argument)),
            test(JUMP_IF_EQUAL, 0, NEXT, if is_last { Goal::Denied } else { Goal::Over(2) }),
            step(LOAD, low(argument) + 4),
            is(0),
        ],
    };
    if let Some(last) = steps.last_mut().filter(|_| is_last) {
        last.no = Goal::Denied;
    }
    steps
}

/// Where the lower half of an argument is.
fn low(argument: u8) -> u32 {
    ARGUMENTS + 8 * u32::from(argument)
}

/// The lower half of a value, which is all there is of those that are compared.
fn half(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn step(code: u16, k: u32) -> Step {
    test(code, k, NEXT, NEXT)
}

fn end(action: &SeccompAction) -> Step {
    step(RETURN, action.clone().into())
}

fn test(code: u16, k: u32, yes: Goal, no: Goal) -> Step {
    Step { code, k, yes, no }
}
