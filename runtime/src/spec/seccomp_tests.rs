//! Compiled profiles, run by an interpreter of their own.

use oci_spec::runtime::LinuxSeccomp;

use super::*;

/// What a call would meet.
#[derive(Clone, Copy)]
struct Call {
    arch: u32,
    number: u32,
    args: [u64; 6],
}

fn call(name: &str, args: &[u64]) -> Call {
    let number = syscalls::number(name).unwrap().try_into().unwrap();
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call { arch: AUDIT_X86_64, number, args: all }
}

/// The word of `struct seccomp_data` at an offset.
fn load(call: &Call, at: u32) -> u32 {
    match at {
        0 => call.number,
        4 => call.arch,
        16.. => {
            let arg = call.args[usize::try_from((at - 16) / 8).unwrap()];
            u32::try_from(if at.is_multiple_of(8) { arg & 0xffff_ffff } else { arg >> 32 }).unwrap()
        }
        _ => panic!("{at}"),
    }
}

/// Runs a program as the kernel would.
fn run(profile: &Profile, call: Call) -> u32 {
    let code: Vec<_> = profile
        .program
        .chunks_exact(8)
        .map(|b| (u16::from_le_bytes([b[0], b[1]]), b[2], b[3], u32::from_le_bytes([b[4], b[5], b[6], b[7]])))
        .collect();
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let (op, jt, jf, k) = code[at];
        at += 1;
        let branch = |taken: bool| usize::from(if taken { jt } else { jf });
        match op {
            0x20 => a = load(&call, k),
            0x54 => a &= k,
            0x05 => at += usize::try_from(k).unwrap(),
            0x15 => at += branch(a == k),
            0x25 => at += branch(a > k),
            0x35 => at += branch(a >= k),
            0x06 => return k,
            _ => panic!("{op:#x}"),
        }
    }
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.unsigned_abs()
}

fn compile(json: &str) -> Result<Profile> {
    let given: LinuxSeccomp = serde_json::from_str(json).unwrap();
    profile(Some(&given))
}

#[test]
fn what_is_listed_is_allowed_and_the_rest_gets_the_default() {
    let profile = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["read","no_such_call","mseal"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    assert_eq!(run(&profile, call("read", &[])), ALLOW);
    assert_eq!(run(&profile, call("mseal", &[])), ALLOW);
    assert_eq!(run(&profile, call("write", &[])), errno(libc::EPERM));
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let json = |default| {
        format!(
            r#"{{"defaultAction":"{default}","syscalls":[{{"names":["openat"],"action":"SCMP_ACT_TRAP"}}]}}"#
        )
    };
    let strict = compile(&json("SCMP_ACT_KILL_PROCESS")).unwrap();
    assert_eq!(run(&strict, call("clone3", &[])), errno(libc::ENOSYS));
    assert_eq!(run(&strict, call("read", &[])), libc::SECCOMP_RET_KILL_PROCESS);
    assert_eq!(run(&strict, call("openat", &[])), libc::SECCOMP_RET_TRAP);
    let open = compile(&json("SCMP_ACT_ALLOW")).unwrap();
    assert_eq!(run(&open, call("clone3", &[])), ALLOW);
}

#[test]
fn several_actions_live_in_one_profile() {
    let profile = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":13,"syscalls":[
            {"names":["read","write"],"action":"SCMP_ACT_ALLOW"},
            {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
            {"names":["ptrace"],"action":"SCMP_ACT_KILL_PROCESS"},
            {"names":["kexec_load"],"action":"SCMP_ACT_LOG"},
            {"names":["bpf"],"action":"SCMP_ACT_TRACE","errnoRet":7}]}"#,
    )
    .unwrap();
    for (name, expected) in [
        ("write", ALLOW),
        ("clone3", errno(38)),
        ("ptrace", libc::SECCOMP_RET_KILL_PROCESS),
        ("kexec_load", libc::SECCOMP_RET_LOG),
        ("bpf", libc::SECCOMP_RET_TRACE | 7),
        ("open", errno(13)),
    ] {
        assert_eq!(run(&profile, call(name, &[])), expected, "{name}");
    }
}

#[test]
fn arguments_are_compared_as_the_operator_says() {
    let rule = |operator: &str, value: u64, two: u64| {
        compile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["personality"],"action":"SCMP_ACT_ALLOW",
                "args":[{{"index":1,"value":{value},"valueTwo":{two},"op":"{operator}"}}]}}]}}"#
        ))
        .unwrap()
    };
    let big = 1 << 40;
    for (operator, value, two, passing, failing) in [
        ("SCMP_CMP_EQ", big, 0, big, 0),
        ("SCMP_CMP_NE", big, 0, 0, big),
        ("SCMP_CMP_LT", big, 0, big - 1, big),
        ("SCMP_CMP_LE", big, 0, big, big + 1),
        ("SCMP_CMP_GE", big, 0, big, big - 1),
        ("SCMP_CMP_GT", big, 0, big + 1, big),
        ("SCMP_CMP_MASKED_EQ", 0x7e02_0000, 0, 0x11, 0x0002_0000),
        ("SCMP_CMP_MASKED_EQ", 0xf0, 0x30, 0x3f, 0x4f),
    ] {
        let profile = rule(operator, value, two);
        assert_eq!(run(&profile, call("personality", &[0, passing])), ALLOW, "{operator}");
        assert_eq!(run(&profile, call("personality", &[0, failing])), errno(libc::EPERM), "{operator}");
    }
}

#[test]
fn conditions_on_one_argument_are_alternatives_and_on_several_are_not() {
    let profile = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#,
    )
    .unwrap();
    assert_eq!(run(&profile, call("personality", &[8])), ALLOW);
    assert_eq!(run(&profile, call("personality", &[9])), errno(libc::EPERM));
    assert_eq!(run(&profile, call("socket", &[1, 2])), ALLOW);
    assert_eq!(run(&profile, call("socket", &[1, 3])), errno(libc::EPERM));
}

#[test]
fn rules_of_one_call_with_other_actions_are_tried_in_order() {
    let profile = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":2,"args":[{"index":1,"value":1,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"args":[{"index":2,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
    )
    .unwrap();
    for (args, expected) in
        [([1, 1, 1], errno(1)), ([0, 1, 1], errno(2)), ([0, 0, 1], errno(1)), ([0, 0, 0], ALLOW)]
    {
        assert_eq!(run(&profile, call("socket", &args)), expected, "{args:?}");
    }
}

#[test]
fn a_rule_for_every_call_stands_above_rules_for_some() {
    let profile = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    assert_eq!(run(&profile, call("clone", &[5])), ALLOW);
}

#[test]
fn calls_of_other_abis_are_answered_by_whether_the_profile_lists_them() {
    let json = |list: &str| {
        format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","architectures":[{list}],
                "syscalls":[{{"names":["ptrace"],"action":"SCMP_ACT_ERRNO"}}]}}"#
        )
    };
    let listed = compile(&json(r#""SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32""#)).unwrap();
    let native = compile(&json(r#""SCMP_ARCH_X86_64""#)).unwrap();
    let i386 = Call { arch: 0x4000_0003, ..call("read", &[]) };
    let mut x32 = call("ptrace", &[]);
    x32.number |= X32_BIT;
    for other in [i386, x32] {
        assert_eq!(run(&listed, other), errno(libc::ENOSYS));
        assert_eq!(run(&native, other), libc::SECCOMP_RET_KILL_PROCESS);
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    for (json, field) in [
        (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "linux.seccomp.defaultAction"),
        (r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#, "linux.seccomp.listenerPath"),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            "linux.seccomp.syscalls.action",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW",
                "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
            "linux.seccomp.syscalls.args.index",
        ),
        (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5000}"#, "linux.seccomp.defaultAction"),
    ] {
        assert_eq!(compile(json).unwrap_err().field, field, "{json}");
    }
}

#[test]
fn flags_that_mean_something_are_passed_on() {
    let profile = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW",
            "flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW","SECCOMP_FILTER_FLAG_TSYNC"]}"#,
    )
    .unwrap();
    assert_eq!(profile.flags, libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
}

#[test]
fn no_profile_is_no_program() {
    assert_eq!(profile(None).unwrap(), Profile::default());
}

/// As large as engines make them: nearly every call there is, and rules with arguments beside.
#[test]
fn a_profile_as_engines_make_them_fits_and_keeps_its_rules() {
    let privileged = ["clone", "clone3", "mount", "personality", "ptrace", "reboot", "setns", "unshare"];
    let all: Vec<_> = syscalls::names().filter(|name| !privileged.contains(name)).collect();
    assert!(all.len() > 340);
    let given = serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": all, "action": "SCMP_ACT_ALLOW"},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0xffff_ffff_u32, "op": "SCMP_CMP_EQ"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0x7e02_0000, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    });
    let profile = compile(&given.to_string()).unwrap();
    assert!(profile.program.len() / 8 < MAX_INSTRUCTIONS);
    for name in all {
        assert_eq!(run(&profile, call(name, &[])), ALLOW, "{name}");
    }
    let denied = errno(libc::EPERM);
    for (name, arg, expected) in [
        ("personality", 8, ALLOW),
        ("personality", 0xffff_ffff, ALLOW),
        ("personality", 1, denied),
        ("clone", 0x11, ALLOW),
        ("clone", 0x1000_0000, denied),
        ("clone3", 0, errno(38)),
        ("mount", 0, denied),
    ] {
        assert_eq!(run(&profile, call(name, &[arg])), expected, "{name}({arg:#x})");
    }
}
