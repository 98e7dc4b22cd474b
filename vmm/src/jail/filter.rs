//! The table of calls as a program that the kernel runs before each of a thread's calls (`linux/bpf_common.h`).
//!
//! `seccompiler` would make one that looks for the call's number among all of them, with five instructions for each value that
//! an argument may have. The kernel translates every instruction of a program that is installed, and asks the program about
//! every number there is: one with two instructions for each value, in a tree by number, takes it half as long, and next
//! to no time to make. Tests hold it to what `seccompiler` makes of the same table.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, sock_filter};

use super::calls::{CALLS, Only, Row, Thread};

/// Calls of a leaf of the tree.
const LEAF: usize = 3;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
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

/// What `thread` may do; `denied` becomes of all else.
pub(super) fn program(thread: Thread, denied: &SeccompAction) -> BpfProgram {
    let mut rules = BTreeMap::<u32, Vec<&Row>>::new();
    for row in CALLS.iter().filter(|row| row.threads.contains(&thread)) {
        rules.entry(number(row.number)).or_default().push(row);
    }
    let denied = end(denied);
    let mut program = vec![
        step(LOAD, ARCHITECTURE),
        jump(JUMP_IF_EQUAL, X86_64, 1, 0),
        end(&SeccompAction::KillProcess),
        step(LOAD, NUMBER),
    ];
    if rules.contains_key(&number(libc::SYS_clone)) {
        // No call of clone3 can be told from another, because its flags lie in memory: whoever makes it is told that
        // there is none, and the C library makes the older one instead.
        program.push(jump(JUMP_IF_EQUAL, number(libc::SYS_clone3), 0, 1));
        program.push(end(&SeccompAction::Errno(libc::ENOSYS.unsigned_abs())));
    }
    let last = rules.keys().next_back().copied().unwrap_or_default();
    program.extend([jump(JUMP_IF_GREATER, last, 0, 1), denied.clone()]);
    program.extend(tree(&rules.into_iter().collect::<Vec<_>>(), &denied));
    program
}

/// The instructions that decide about `rules`, which are in order of numbers.
fn tree(rules: &[Rules], denied: &sock_filter) -> BpfProgram {
    let (below, above) = rules.split_at(rules.len() / 2);
    match above.first() {
        Some((first, _)) if rules.len() > LEAF => {
            let (below, above) = (tree(below, denied), tree(above, denied));
            [&[jump(JUMP_IF_AT_LEAST, *first, 0, 1), over(&below)], &below[..], &above].concat()
        }
        _ => leaf(rules, denied),
    }
}

/// The same one after the other.
fn leaf(rules: &[Rules], denied: &sock_filter) -> BpfProgram {
    let mut program = Vec::new();
    for (call, rows) in rules {
        let mut alternatives: Vec<_> = rows.iter().flat_map(|row| allowed(row.only)).collect();
        if rows.iter().all(|row| row.only != Only::Any) {
            alternatives.push(denied.clone());
        }
        match u8::try_from(alternatives.len()) {
            Ok(length) => program.push(jump(JUMP_IF_EQUAL, *call, 0, length)),
            Err(_) => program.extend([jump(JUMP_IF_EQUAL, *call, 1, 0), over(&alternatives)]),
        }
        program.append(&mut alternatives);
    }
    program.push(denied.clone());
    program
}

/// Allows the call if `only` holds; else what follows decides.
fn allowed(only: Only) -> BpfProgram {
    let allow = || end(&SeccompAction::Allow);
    let masked = |argument, bits, value| {
        vec![step(LOAD, low(argument)), step(AND, bits), jump(JUMP_IF_EQUAL, value, 0, 1), allow()]
    };
    match only {
        Only::Any => vec![allow()],
        Only::OneOf(argument, values) => {
            let each = values.iter().flat_map(|value| [jump(JUMP_IF_EQUAL, half(*value), 0, 1), allow()]);
            [step(LOAD, low(argument))].into_iter().chain(each).collect()
        }
        Only::With(argument, bits) => masked(argument, bits, bits),
        Only::Without(argument, bits) => masked(argument, bits, 0),
        Only::Null(argument) => vec![
            step(LOAD, low(argument)),
            jump(JUMP_IF_EQUAL, 0, 0, 3),
            step(LOAD, low(argument) + 4),
            jump(JUMP_IF_EQUAL, 0, 0, 1),
            allow(),
        ],
    }
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

fn step(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

/// Goes on after `program`.
fn over(program: &[sock_filter]) -> sock_filter {
    step(JUMP, u32::try_from(program.len()).unwrap_or(u32::MAX))
}

fn end(action: &SeccompAction) -> sock_filter {
    step(RETURN, action.clone().into())
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
