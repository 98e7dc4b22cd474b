//! The lists of steps, read without performing them.

use mvm_protocol::Namespaces;

use super::*;

fn plan(surroundings: &Surroundings) -> Vec<String> {
    let sources: Vec<Option<Source>> = surroundings.mounts.iter().map(|_| None).collect();
    let joined = Spaces::default();
    let steps = steps("/run/mvm/root/c1", surroundings, &joined, &sources).unwrap();
    steps.iter().map(ToString::to_string).collect()
}

fn at(plan: &[String], text: &str) -> usize {
    plan.iter().position(|step| step.contains(text)).unwrap_or_else(|| panic!("no {text:?} in {plan:#?}"))
}

fn filesystem(kind: &str, target: &str) -> ContainerMount {
    let source = ContainerSource::Filesystem(kind.to_owned());
    ContainerMount { source, target: target.to_owned(), flags: 0, propagation: 0, data: String::new() }
}

fn own(path: &str) -> String {
    path.to_owned()
}

#[test]
fn the_root_is_entered_before_anything_is_mounted_in_it() {
    let plan = plan(&Surroundings::default());
    let entered = at(&plan, "the root");
    assert!(at(&plan, "cannot mount none at /") < entered, "nothing spreads to the agent");
    assert!(!plan[..entered].iter().any(|step| step.contains("/dev")));
    assert_eq!(plan.iter().filter(|step| step.contains("cannot make device")).count(), 6);
}

#[test]
fn what_needs_the_agents_proc_comes_before_and_what_hides_things_after_everything_else() {
    let surroundings = Surroundings {
        namespaces: Namespaces { uts: Namespace::Own, ..Namespaces::default() },
        hostname: Some(own("otter")),
        sysctls: vec![(own("net.ipv4.ip_forward"), own("1"))],
        mounts: vec![filesystem("proc", "/proc"), filesystem("tmpfs", "/dev")],
        masked_paths: vec![own("/proc/kcore")],
        read_only_paths: vec![own("/proc/sys")],
        read_only_root: true,
        root_propagation: MsFlags::MS_SHARED.bits(),
        ..Surroundings::default()
    };
    let plan = plan(&surroundings);
    let order = [
        "name spaces",
        "/proc/sys/kernel/hostname",
        "/proc/sys/net/ipv4/ip_forward",
        "the root",
        "cannot mount proc",
        "cannot mount tmpfs",
        "/dev/null",
        "/proc/sys read-only",
        "mask /proc/kcore",
    ];
    let places: Vec<usize> = order.iter().map(|text| at(&plan, text)).collect();
    assert!(places.is_sorted(), "{places:?} {plan:#?}");
    assert_eq!(plan.len(), places[8] + 3, "then the propagation and the read-only root");
}

#[test]
fn only_name_spaces_of_its_own_are_made() {
    let mut surroundings = Surroundings::default();
    assert_eq!(own_spaces(&surroundings), CloneFlags::CLONE_NEWNS);
    surroundings.namespaces =
        Namespaces { ipc: Namespace::Own, uts: Namespace::Of(own("pod")), cgroup: Namespace::Own };
    let expected = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWCGROUP;
    assert_eq!(own_spaces(&surroundings), expected);
}

#[test]
fn a_host_name_is_only_set_in_a_name_space_of_its_own() {
    let surroundings = Surroundings { hostname: Some(own("otter")), ..Surroundings::default() };
    assert!(!plan(&surroundings).iter().any(|step| step.contains("hostname")));
}

#[test]
fn kernel_parameters_are_files_below_proc_sys() {
    let path = |name| sysctl(name).unwrap().into_string().unwrap();
    assert_eq!(path("net.core.somaxconn"), "/proc/sys/net/core/somaxconn");
    assert_eq!(path("net.ipv4.conf.eth0/100.forwarding"), "/proc/sys/net/ipv4/conf/eth0.100/forwarding");
    assert_eq!(path("net/ipv4/conf/eth0.100/forwarding"), "/proc/sys/net/ipv4/conf/eth0.100/forwarding");
    for bad in ["", "a..b", "../x", "a/../../b", ".", "/etc/passwd", "a\0b"] {
        assert!(sysctl(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_target_names_its_parents_and_must_be_absolute_and_not_the_root() {
    let target = Target::new("/a/b/c/").unwrap();
    assert_eq!(target.path, c"/a/b/c".to_owned());
    assert_eq!(target.parents, [c"/a".to_owned(), c"/a/b".to_owned()]);
    for bad in ["", "/", "a/b", "//"] {
        assert!(Target::new(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_new_proc_is_mounted_below_the_outermost_mounts_on_the_old_one() {
    let surroundings = Surroundings {
        mounts: vec![
            filesystem("proc", "/proc"),
            filesystem("tmpfs", "/proc/acpi/x"),
            filesystem("tmpfs", "/tmp"),
        ],
        masked_paths: vec![own("/proc/acpi"), own("/proc/kcore"), own("/sys/firmware"), own("/processes")],
        read_only_paths: vec![own("/proc/sys"), own("/proc/sys/kernel")],
        ..Surroundings::default()
    };
    let proc = proc(&surroundings).unwrap().unwrap();
    assert_eq!(proc.above, [c"/proc/sys".to_owned(), c"/proc/acpi".to_owned(), c"/proc/kcore".to_owned()]);
}

#[test]
fn a_proc_that_is_masked_or_not_wanted_is_not_mounted_and_a_protected_one_stays_so() {
    let mut surroundings =
        Surroundings { mounts: vec![filesystem("tmpfs", "/tmp")], ..Surroundings::default() };
    assert!(proc(&surroundings).unwrap().is_none());
    surroundings.mounts.push(filesystem("proc", "/proc"));
    surroundings.read_only_paths = vec![own("/proc/")];
    let made = proc(&surroundings).unwrap().unwrap();
    assert_eq!(made.call.flags, MsFlags::MS_RDONLY);
    surroundings.masked_paths = vec![own("/proc")];
    assert!(proc(&surroundings).unwrap().is_none());
}

#[test]
fn devices_of_the_images_own_directory_may_be_missing() {
    let is_device = |step: &Step<'_>| matches!(step, Step::MakeDevice(_));
    let mut surroundings =
        Surroundings { mounts: vec![filesystem("tmpfs", "/tmp")], ..Surroundings::default() };
    assert_eq!(default_devices(&surroundings).iter().filter(|it| is_device(it)).count(), 0);
    surroundings.mounts.push(filesystem("tmpfs", "/dev"));
    assert_eq!(default_devices(&surroundings).iter().filter(|it| is_device(it)).count(), 6);
}

#[test]
fn lists_that_are_too_long_are_refused() {
    let masked_paths = vec![own("/x"); limits::MAX_SURROUNDINGS + 1];
    assert!(check(&Surroundings { masked_paths, ..Surroundings::default() }).is_err());
    assert!(check(&Surroundings::default()).is_ok());
}

#[test]
fn a_container_that_mounts_cgroups_does_not_change_how_the_guest_has_them() {
    let asked = ContainerMount { data: own("memory_localevents"), ..filesystem("cgroup2", "/sys/fs/cgroup") };
    let steps = mount_steps(&asked, None).unwrap();
    let Some(Step::Mount(call)) = steps.get(1) else { panic!("{steps:?}") };
    assert_eq!(call.data.as_c_str(), cgroup::OPTIONS);
}
