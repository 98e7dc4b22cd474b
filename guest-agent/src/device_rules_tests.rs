//! The programs, run by a small interpreter of the instructions they are made of.

use proptest::{collection::vec, option, prelude::*};

use super::*;

/// What a program says about a request.
fn verdict(program: &[u64], kind: u32, access: u8, numbers: (u32, u32)) -> bool {
    let context = [u32::from(access) << 16 | kind, numbers.0, numbers.1];
    let mut registers = [0_u32; 6];
    let mut at = 0;
    loop {
        let [operation, pair, o0, o1, c0, c1, c2, c3] = program[at].to_ne_bytes();
        let (to, from) = (usize::from(pair & 0xf), usize::from(pair >> 4));
        let offset = usize::try_from(i16::from_ne_bytes([o0, o1])).unwrap();
        let constant = u32::from_ne_bytes([c0, c1, c2, c3]);
        at += 1;
        match operation {
            LOAD_WORD => registers[to] = context[offset / 4],
            SET => registers[to] = constant,
            COPY => registers[to] = registers[from],
            AND => registers[to] &= constant,
            SHIFT_RIGHT => registers[to] >>= constant,
            JUMP_UNLESS_EQUAL => at += if registers[to] == constant { 0 } else { offset },
            JUMP_UNLESS_ANY => at += if registers[to] == constant { offset } else { 0 },
            0x95 => return registers[0] == 1,
            other => panic!("no operation {other:#x}"),
        }
    }
}

fn rule(
    allow: bool,
    kind: Option<DeviceKind>,
    numbers: (Option<u32>, Option<u32>),
    access: &str,
) -> DeviceRule {
    DeviceRule { allow, kind, major: numbers.0, minor: numbers.1, access: access.to_owned() }
}

const CHAR: u32 = 2;
const BLOCK: u32 = 1;

#[test]
fn the_default_devices_are_usable_under_a_rule_that_denies_all() {
    let program = program(&[rule(false, None, (None, None), "rwm")]).unwrap();
    for numbers in [(1, 3), (1, 5), (1, 9), (5, 0), (5, 2), (136, 7)] {
        assert!(verdict(&program, CHAR, READ | WRITE, numbers), "{numbers:?}");
    }
    assert!(verdict(&program, BLOCK, MAKE, (8, 0)));
    assert!(!verdict(&program, BLOCK, READ, (8, 0)));
    assert!(!verdict(&program, CHAR, READ, (1, 11)));
    assert!(!verdict(&program, BLOCK, READ | WRITE, (1, 3)), "the numbers of another kind");
}

#[test]
fn kinds_of_access_are_granted_by_different_rules() {
    let here = (Some(8), Some(0));
    let rules = [
        rule(false, None, (None, None), "rwm"),
        rule(true, Some(DeviceKind::Block), here, "r"),
        rule(true, Some(DeviceKind::Block), here, "w"),
    ];
    let program = program(&rules).unwrap();
    assert!(verdict(&program, BLOCK, READ | WRITE, (8, 0)));
    assert!(!verdict(&program, BLOCK, READ | WRITE, (8, 1)));
}

#[test]
fn access_that_does_not_exist_or_too_many_rules_are_refused_and_pipes_say_nothing() {
    assert!(program(&[rule(true, None, (None, None), "x")]).is_err());
    assert!(program(&vec![rule(true, None, (None, None), "r"); MAX_RULES + 1]).is_err());
    let pipes = rule(true, Some(DeviceKind::Fifo), (None, None), "rwm");
    assert_eq!(program(&[pipes]).unwrap(), program(&[]).unwrap());
}

/// What the rules say by their definition: for each kind of access the last that fits.
fn meant(rules: &[DeviceRule], kind: DeviceKind, access: &str, (major, minor): (u32, u32)) -> bool {
    let fits = |rule: &DeviceRule, letter: char| {
        rule.kind.is_none_or(|it| it == kind)
            && rule.major.is_none_or(|it| it == major)
            && rule.minor.is_none_or(|it| it == minor)
            && rule.access.contains(letter)
    };
    access.chars().all(|letter| rules.iter().rfind(|rule| fits(rule, letter)).is_some_and(|rule| rule.allow))
}

fn any_rule() -> impl Strategy<Value = DeviceRule> {
    let kind = option::of(prop_oneof![Just(DeviceKind::Char), Just(DeviceKind::Block)]);
    let number = || option::of(200..203_u32);
    (any::<bool>(), kind, number(), number(), "[rw]{0,2}")
        .prop_map(|(allow, kind, major, minor, access)| rule(allow, kind, (major, minor), &access))
}

proptest! {
    #[test]
    fn a_program_says_what_its_rules_say(
        rules in vec(any_rule(), 0..8),
        major in 200..203_u32,
        minor in 200..203_u32,
    ) {
        let program = program(&rules).unwrap();
        for (kind, number) in [(DeviceKind::Char, CHAR), (DeviceKind::Block, BLOCK)] {
            for (access, bits) in [("r", READ), ("w", WRITE), ("rw", READ | WRITE)] {
                let expected = meant(&rules, kind, access, (major, minor));
                prop_assert_eq!(verdict(&program, number, bits, (major, minor)), expected);
            }
        }
    }
}
