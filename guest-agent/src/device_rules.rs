//! A container's device rules as a program for the kernel (cgroup v2, `BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! Every kind of access is decided for itself by the last rule that fits it; a request is granted when all its
//! kinds are. The program therefore walks the rules backwards and strikes out what is granted.

use mvm_protocol::{DeviceKind, DeviceRule};

use crate::error::{Error, Result};

/// Most rules of one container; the kernel takes 4096 instructions, and a rule needs up to eight.
const MAX_RULES: usize = 400;

/// `BPF_DEVCG_ACC_*` of linux/bpf.h.
const MAKE: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;

/// What every container may do whatever its rules say: make nodes, use the six devices it always has, and
/// terminals of its own (OCI runtime specification, default devices).
const ALWAYS: [(Kind, Option<u32>, Option<u32>, u8); 10] = [
    (Kind::Char, None, None, MAKE),
    (Kind::Block, None, None, MAKE),
    (Kind::Char, Some(1), Some(3), READ | WRITE),
    (Kind::Char, Some(1), Some(5), READ | WRITE),
    (Kind::Char, Some(1), Some(7), READ | WRITE),
    (Kind::Char, Some(1), Some(8), READ | WRITE),
    (Kind::Char, Some(1), Some(9), READ | WRITE),
    (Kind::Char, Some(5), Some(0), READ | WRITE),
    (Kind::Char, Some(5), Some(2), READ | WRITE),
    (Kind::Char, Some(136), None, READ | WRITE),
];

/// `BPF_DEVCG_DEV_*` of linux/bpf.h.
#[derive(Clone, Copy)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// A rule in the kernel's numbers.
struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

/// The program of these rules.
pub(crate) fn program(rules: &[DeviceRule]) -> Result<Vec<u64>> {
    if rules.len() > MAX_RULES {
        return Err(Error::Invalid("more device rules than are allowed".into()));
    }
    let mut program = opening();
    let always = ALWAYS.iter().map(|&(kind, major, minor, access)| Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    });
    let asked: Vec<Rule> = rules.iter().filter_map(|rule| read(rule).transpose()).collect::<Result<_>>()?;
    for rule in always.chain(asked.into_iter().rev()) {
        program.extend(judge(&rule));
    }
    // What no rule has granted is denied.
    program.extend([set(R0, 0), EXIT]);
    Ok(program)
}

/// A rule about named pipes says nothing: they are no devices to the kernel.
fn read(rule: &DeviceRule) -> Result<Option<Rule>> {
    let kind = match rule.kind {
        None => None,
        Some(DeviceKind::Char) => Some(Kind::Char),
        Some(DeviceKind::Block) => Some(Kind::Block),
        Some(DeviceKind::Fifo) => return Ok(None),
    };
    let mut access = 0;
    for letter in rule.access.bytes() {
        access |= match letter {
            b'r' => READ,
            b'w' => WRITE,
            b'm' => MAKE,
            _ => return Err(Error::Invalid(format!("{:?} is no device access", rule.access))),
        };
    }
    Ok(Some(Rule { allow: rule.allow, kind, major: rule.major, minor: rule.minor, access }))
}

/// Registers: r0 the verdict, r1 the context and later a copy, r2 the kind, r3 what is asked and not yet
/// granted, r4 and r5 the device.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R5: u8 = 5;

/// Operations of the 32-bit class (linux/bpf_common.h, linux/bpf.h).
const LOAD_WORD: u8 = 0x61;
const SET: u8 = 0xb4;
const COPY: u8 = 0xbc;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_UNLESS_EQUAL: u8 = 0x56;
const JUMP_UNLESS_ANY: u8 = 0x16;
const EXIT: u64 = 0x95;

/// One instruction: operation, registers, jump distance or offset, constant.
fn instruction(operation: u8, to: u8, from: u8, offset: i16, constant: u32) -> u64 {
    let [o0, o1] = offset.to_ne_bytes();
    let [c0, c1, c2, c3] = constant.to_ne_bytes();
    u64::from_ne_bytes([operation, to | from << 4, o0, o1, c0, c1, c2, c3])
}

fn set(register: u8, value: u32) -> u64 {
    instruction(SET, register, 0, 0, value)
}

/// Takes `struct bpf_cgroup_dev_ctx` apart: access and kind in one word, then the numbers.
fn opening() -> Vec<u64> {
    vec![
        instruction(LOAD_WORD, R2, R1, 0, 0),
        instruction(COPY, R3, R2, 0, 0),
        instruction(AND, R2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, R3, 0, 0, 16),
        instruction(LOAD_WORD, R4, R1, 4, 0),
        instruction(LOAD_WORD, R5, R1, 8, 0),
    ]
}

/// What one rule does to a request: grant some of it, perhaps the last, or deny it.
fn judge(rule: &Rule) -> Vec<u64> {
    let verdict = match rule.allow {
        true => vec![
            instruction(AND, R3, 0, 0, u32::from(!rule.access & (MAKE | READ | WRITE))),
            instruction(JUMP_UNLESS_EQUAL, R3, 0, 2, 0),
            set(R0, 1),
            EXIT,
        ],
        false => vec![
            instruction(COPY, R1, R3, 0, 0),
            instruction(AND, R1, 0, 0, u32::from(rule.access)),
            instruction(JUMP_UNLESS_ANY, R1, 0, 2, 0),
            set(R0, 0),
            EXIT,
        ],
    };
    let conditions =
        [(R2, rule.kind.map(|kind| kind as u32)), (R4, rule.major), (R5, rule.minor)].into_iter();
    let conditions: Vec<(u8, u32)> =
        conditions.filter_map(|(register, value)| Some((register, value?))).collect();
    // Where a condition fails, all that follows of this rule is passed over.
    let skip = |at: usize| i16::try_from(conditions.len() - 1 - at + verdict.len()).unwrap_or(i16::MAX);
    let mut code: Vec<u64> = conditions
        .iter()
        .enumerate()
        .map(|(at, &(register, value))| instruction(JUMP_UNLESS_EQUAL, register, 0, skip(at), value))
        .collect();
    code.extend(verdict);
    code
}

#[cfg(test)]
#[path = "device_rules_tests.rs"]
mod tests;
