//! What a process gives up, against the real agent. Needs root.

use mvm_protocol::{Capabilities, Confinement, Rlimit, Scheduler, Surroundings, User};

use super::{
    containers::{inside, root, run},
    guest::Guest,
};

/// `CAP_NET_BIND_SERVICE` and `CAP_KILL`.
const SOME: u64 = 1 << 10 | 1 << 5;

#[test]
fn a_process_has_the_capabilities_limits_and_mask_it_was_given_and_no_more() {
    let guest = Guest::new();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    let sets =
        Capabilities { bounding: SOME, effective: SOME, inheritable: SOME, permitted: SOME, ambient: SOME };
    let mut spec = inside(
        "c1",
        "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr '\\t' ' '; umask; ulimit -n; ulimit -Hn; nice",
    );
    spec.user = User::Ids { uid: 1000, gid: 1000, groups: vec![5] };
    spec.confinement = Confinement {
        capabilities: Some(sets),
        no_new_privileges: true,
        rlimits: vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200 }],
        umask: Some(0o077),
        scheduler: Some(Scheduler { policy: 0, nice: 5, priority: 0 }),
        io_priority: Some(2 << 13 | 7),
        ..Default::default()
    };
    let set = "0000000000000420";
    let expected = format!(
        "CapInh: {set}\nCapPrm: {set}\nCapEff: {set}\nCapBnd: {set}\nCapAmb: {set}\n\
         NoNewPrivs: 1\nSeccomp: 0\n0077\n100\n200\n5\n"
    );
    assert_eq!(run(&guest, spec.clone()).0, expected);
    // Root without capabilities is nobody special; without a wish all are kept.
    spec.user = User::Ids { uid: 0, gid: 0, groups: vec![] };
    spec.confinement.capabilities = Some(Capabilities::default());
    assert!(run(&guest, spec.clone()).0.contains("CapEff: 0000000000000000\n"));
    spec.confinement = Confinement::default();
    assert!(!run(&guest, spec).0.contains("CapEff: 0000000000000000\n"));
}

/// A filter that answers one system call with an error number.
fn deny(system_call: i64, errno: u32) -> Vec<u8> {
    let instruction = |code: u16, jump_true: u8, jump_false: u8, k: u32| {
        let [a, b] = code.to_ne_bytes();
        let [c, d, e, f] = k.to_ne_bytes();
        [a, b, jump_true, jump_false, c, d, e, f]
    };
    let number = u32::try_from(system_call).unwrap();
    [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, number),
        instruction(0x06, 0, 0, 0x0005_0000 | errno),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat()
}

#[test]
fn a_system_call_filter_answers_with_and_without_new_privileges() {
    let guest = Guest::new();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    for no_new_privileges in [true, false] {
        let mut spec = inside("c1", "mkdir /x 2>&1; grep Seccomp: /proc/self/status | tr '\\t' ' '");
        let none = Capabilities::default();
        let confinement =
            Confinement { seccomp: deny(libc::SYS_mkdir, 1), no_new_privileges, ..Default::default() };
        spec.confinement = Confinement { capabilities: Some(none), ..confinement };
        let expected = "mkdir: cannot create directory '/x': Operation not permitted\nSeccomp: 2\n";
        assert_eq!(run(&guest, spec).0, expected, "{no_new_privileges}");
    }
    let mut spec = inside("c1", "true");
    spec.confinement.seccomp = vec![0; 16];
    let error = guest.client.start(spec).unwrap_err();
    assert_eq!(error.to_string(), "cannot install the system call filter");
}
