//! Plans against the configurations that they become.

use super::*;

/// A machine with a disk, a card and a console, of files that are not there.
fn plan(sockets: Option<PathBuf>) -> Plan {
    let kernel = Kernel {
        image: "/no/such/kernel".into(),
        initrd: Some("/no/such/initrd".into()),
        cmdline: "quiet".to_owned(),
    };
    Plan {
        disks: vec!["/no/such/disk,serial=d".parse().unwrap()],
        nets: vec!["tap=nosuch".parse().unwrap()],
        console: Some(ConsoleKind::Virtio),
        sockets,
        ..Plan::new("m".parse().unwrap(), Origin::Kernel(kernel))
    }
}

/// The kinds of its devices, in the order of the bus.
fn kinds(plan: &Plan) -> Vec<&'static str> {
    let kind = |device: &DeviceSpec| match device {
        DeviceSpec::Block(_) => "disk",
        DeviceSpec::Net(_) => "card",
        DeviceSpec::Vsock(_) => "vsock",
        DeviceSpec::Mem(_) => "memory",
        _ => "other",
    };
    describe(plan).unwrap().devices.iter().map(kind).collect()
}

#[test]
fn describing_a_plan_opens_and_makes_nothing_and_says_what_preparing_would() {
    let sockets = std::env::temp_dir().join(format!("mvm-no-such-{}", std::process::id()));
    let plan = plan(Some(sockets.clone()));
    let config = describe(&plan).unwrap();
    assert!(!sockets.exists());
    assert!(prepare(&plan).is_err());
    let Start::Boot(boot) = &config.start else { panic!("{config:?}") };
    assert_eq!((config.kvm, boot.kernel, boot.initrd), (FdSlot(4), FdSlot(5), Some(FdSlot(6))));
    assert_eq!(config.devices.len(), 4);
    assert_eq!(config.control, Some(FdSlot(13)), "disk, tap, listener, dialer and console come before");
}

#[test]
fn devices_come_in_the_order_that_they_are_or_were_plugged_in() {
    let plan = plan(None);
    assert_eq!(kinds(&plan), ["disk", "card", "vsock", "other"]);
    let plugged = Plan { plugged: true, console: None, ..plan.clone() };
    assert_eq!(kinds(&plugged), ["vsock", "card", "disk"], "where they are plugged in");
    let template =
        Plan { slots: vec![Slot::empty(true)], disks: Vec::new(), nets: Vec::new(), ..plugged.clone() };
    assert_eq!(kinds(&template), ["vsock", "disk"]);
    let clone = Plan { slots: template.slots, ..plugged.clone() };
    assert_eq!(kinds(&clone), ["vsock", "disk", "card", "disk"], "what was saved comes first");
    let grown = |plan: Plan| kinds(&Plan { plugs_mib: Some(256), ..plan });
    assert_eq!(grown(plugged), ["vsock", "card", "disk", "memory"]);
    assert_eq!(grown(plan), ["disk", "card", "vsock", "other", "memory"]);
}

#[test]
fn a_machine_that_goes_on_has_its_files_and_is_configured_as_one_that_boots() {
    let plan = plan(Some("/no/such/directory".into()));
    let mut saved = Snapshot {
        state: "/no/s".into(),
        memory: "/no/m".into(),
        base: None,
        working_set: None,
        source: None,
        contents: "k".to_owned(),
    };
    let from =
        |saved: &Snapshot| describe(&Plan { origin: Origin::Saved(saved.clone()), ..plan.clone() }).unwrap();
    let config = from(&saved);
    let restore = Restore { contents: "k".to_owned(), ..Restore::new(FdSlot(5), FdSlot(6)) };
    assert_eq!(config.start, Start::Restore(restore));
    assert_eq!((config.devices.len(), config.control), (4, Some(FdSlot(13))), "all else is the same");
    saved.base = Some("/no/b".into());
    saved.working_set = Some("/no/w".into());
    let config = from(&saved);
    let Start::Restore(restore) = config.start else { panic!("{config:?}") };
    assert_eq!((restore.base, restore.working_set), (Some(FdSlot(7)), Some(FdSlot(8))));

    let config = from(&Snapshot { base: None, source: "unix:/no/s".parse().ok(), ..saved });
    let Start::Restore(restore) = config.start else { panic!("{config:?}") };
    assert_eq!((restore.memory, restore.userfault), (FdSlot(6), Some(Userfault::default())));
}
