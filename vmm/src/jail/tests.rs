//! The table of calls and the programs made of it, run by a machine of our own; what the kernel makes of them is next door.
#![allow(clippy::print_stdout, clippy::print_stderr)] // figures, and what a child has to say

mod kernel;
mod used;

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{SeccompCondition, SeccompFilter, SeccompRule, TargetArch, sock_filter};

use super::calls::{CALLS, Only, Row};
use super::*;

pub(super) const THREADS: [Thread; 4] = [Thread::Main, Thread::Io, Thread::Vcpu, Thread::Memory];
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ALLOWED: u32 = 0x7fff_0000;
const KILLED: u32 = 0x8000_0000;
const MISSING: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();
/// Bit of the numbers of calls of programs with 32-bit addresses.
const X32: i64 = 0x4000_0000;

pub(super) fn program(thread: Thread) -> Vec<sock_filter> {
    filter::program(thread, &SeccompAction::KillProcess).unwrap()
}

/// The rows of `thread`.
pub(super) fn rows(thread: Thread) -> impl Iterator<Item = &'static Row> {
    CALLS.iter().filter(move |row| row.threads.contains(&thread))
}

/// What becomes of a call, by the program.
fn run(program: &[sock_filter], architecture: u32, call: i64, arguments: [u64; 6]) -> u32 {
    let word = |offset: u32| match offset {
        0 => u32::try_from(call).unwrap(),
        4 => architecture,
        _ => {
            let argument = arguments[usize::try_from(offset - 16).unwrap() / 8];
            u32::try_from(argument >> (8 * (offset % 8)) & 0xffff_ffff).unwrap()
        }
    };
    let (mut at, mut loaded) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |taken| usize::from(if taken { jt } else { jf });
        match code {
            0x20 => loaded = word(k),
            0x54 => loaded &= k,
            0x05 => at += usize::try_from(k).unwrap(),
            0x15 => at += jump(loaded == k),
            0x25 => at += jump(loaded > k),
            0x35 => at += jump(loaded >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// What `seccompiler` makes of the table. It has no action but one for what is allowed, so it knows nothing of clone3.
fn reference(thread: Thread) -> Vec<sock_filter> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for row in rows(thread) {
        let alternatives = rules.entry(row.number).or_default();
        let one = |argument, length, operator, value| {
            let condition = SeccompCondition::new(argument, length, operator, value).unwrap();
            SeccompRule::new(vec![condition]).unwrap()
        };
        match row.only {
            Only::Any => {}
            Only::OneOf(argument, values) => {
                alternatives.extend(values.iter().map(|value| one(argument, Dword, Eq, *value)));
            }
            Only::With(argument, bits) => {
                alternatives.push(one(argument, Qword, MaskedEq(bits.into()), bits.into()));
            }
            Only::Without(argument, bits) => {
                alternatives.push(one(argument, Qword, MaskedEq(bits.into()), 0))
            }
            Only::Null(argument) => alternatives.push(one(argument, Qword, Eq, 0)),
        }
    }
    let (denied, allowed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, denied, allowed, TargetArch::x86_64).unwrap();
    filter.try_into().unwrap()
}

/// What becomes of a call, by the table.
fn expected(thread: Thread, call: i64, arguments: [u64; 6]) -> u32 {
    if call == libc::SYS_clone3 && rows(thread).any(|row| row.number == libc::SYS_clone) {
        return MISSING;
    }
    let argument = |number: u8| arguments[usize::from(number)];
    let allowed = rows(thread).filter(|row| row.number == call).any(|row| match row.only {
        Only::Any => true,
        Only::OneOf(number, values) => values.contains(&(argument(number) & 0xffff_ffff)),
        Only::With(number, bits) => argument(number) & u64::from(bits) == u64::from(bits),
        Only::Without(number, bits) => argument(number) & u64::from(bits) == 0,
        Only::Null(number) => argument(number) == 0,
    });
    if allowed { ALLOWED } else { KILLED }
}

/// Arguments that keep to `row`.
pub(super) fn good(row: &Row) -> Vec<[u64; 6]> {
    let with = |number: u8, value| {
        let mut arguments = [u64::MAX; 6];
        arguments[usize::from(number)] = value;
        arguments
    };
    match row.only {
        Only::Any => vec![[u64::MAX; 6]],
        Only::OneOf(number, values) => values.iter().map(|value| with(number, *value)).collect(),
        Only::With(number, bits) => vec![with(number, bits.into()), with(number, u64::MAX)],
        Only::Without(number, bits) => vec![with(number, 0), with(number, !u64::from(bits))],
        Only::Null(number) => vec![with(number, 0)],
    }
}

#[test]
fn sec_16_a_filter_is_the_table_for_every_call_and_every_bit_of_what_is_looked_at() {
    for thread in THREADS {
        let (program, reference) = (program(thread), reference(thread));
        let check = |call, arguments| {
            let wanted = expected(thread, call, arguments);
            assert_eq!(run(&program, X86_64, call, arguments), wanted, "{thread:?} {call} {arguments:x?}");
            if wanted != MISSING {
                let referred = run(&reference, X86_64, call, arguments);
                assert_eq!(referred, wanted, "{thread:?} {call} {arguments:x?}, by seccompiler");
            }
        };
        for call in 0..1024 {
            for arguments in [[0; 6], [u64::MAX; 6]] {
                check(call, arguments);
                check(call | X32, arguments);
            }
        }
        for row in CALLS {
            for arguments in good(row) {
                check(row.number, arguments);
                for (argument, bit) in (0..6).flat_map(|argument| (0..64).map(move |bit| (argument, bit))) {
                    let mut other = arguments;
                    other[argument] ^= 1 << bit;
                    check(row.number, other);
                }
            }
        }
    }
}

#[test]
fn sec_07_calls_of_other_kinds_of_programs_are_denied() {
    for thread in THREADS {
        for call in 0..1024 {
            assert_eq!(run(&program(thread), I386, call, [0; 6]), KILLED, "{thread:?} {call}");
            assert_eq!(run(&program(thread), X86_64, call | X32, [0; 6]), KILLED, "{thread:?} {call}");
        }
    }
}

#[test]
fn a_call_that_a_thread_may_make_with_anything_has_one_row_for_it() {
    for (thread, row) in THREADS.into_iter().flat_map(|thread| rows(thread).map(move |row| (thread, row))) {
        let same = rows(thread).filter(|other| other.number == row.number).count();
        assert!(row.only != Only::Any || same == 1, "{thread:?} {row:?}: the others say nothing");
    }
    assert!(CALLS.iter().all(|row| !row.reason.1.is_empty()));
}

/// SEC-15. Firecracker's are 50 and 27 (`resources/seccomp`, x86-64).
#[test]
fn sec_15_threads_make_few_calls() {
    let count = |thread| {
        let calls = rows(thread).map(|row| row.number).collect::<BTreeSet<_>>().len();
        println!("{thread:?}: {calls} calls, {} instructions", program(thread).len());
        calls
    };
    let [main, io, vcpu, memory] = THREADS.map(count);
    assert!(main <= 50 && io <= 50, "{main} {io}");
    assert!(vcpu <= 27 && memory <= 27, "{vcpu} {memory}");
    let all = CALLS.iter().map(|row| row.number).collect::<BTreeSet<_>>().len();
    println!("all: {all} calls");
}

#[test]
fn the_signal_that_is_allowed_is_the_kick() {
    let kick = u64::try_from(crate::vcpu::kick_signal()).unwrap();
    let signals = |row: &&Row| row.number == libc::SYS_tgkill;
    let mut allowed = rows(Thread::Main).filter(signals).flat_map(good).map(|arguments| arguments[2]);
    assert!(allowed.any(|signal| signal == kick), "{kick}");
}
