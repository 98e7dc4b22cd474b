//! Manifests as they were written, and as somebody else may have written them.

use super::*;

/// One as it could have been made.
pub(crate) fn manifest(name: &str) -> Manifest {
    let net = serde_json::json!({"choice": "none", "publish": [], "dns": [], "mtu": null});
    let job = serde_json::json!({
        "id": "0123456789ab", "name": "web", "labels": {}, "image": "image", "rootfs": "/r.erofs",
        "spec": {"ociVersion": "1.0.2"}, "restart": "no", "remove": false, "cpus": 1, "memory_mib": 128,
        "net": net, "stdin": false, "stats": false,
    });
    let machine = SavedMachine {
        cpus: VcpuCount::default(),
        memory_mib: MemSize::default(),
        growth: None,
        contents: "0".repeat(32),
        plugged: false,
        slots: Vec::new(),
        devices: vec![DeviceSpec::Balloon(Default::default())],
        cards: Vec::new(),
        disks: vec![
            SavedDisk { serial: "a-1".into(), read_only: true, bytes: 4 },
            SavedDisk { serial: "a-2".into(), read_only: false, bytes: 6 },
        ],
        root: "main".into(),
        protocol: PROTOCOL,
        agent_version: "0.1.0".into(),
        kernel_release: "6.12".into(),
        memory_bytes: 7,
        base: None,
        state_bytes: 5,
        held_ms: 3,
    };
    Manifest {
        version: VERSION,
        name: name.parse().unwrap(),
        created: 1_700_000_000,
        container: Of { id: "0123456789ab".into(), name: "web".into() },
        processor: "a processor".into(),
        vmm_sha256: "ab".repeat(32),
        run: SavedRun { job: serde_json::from_value(job).unwrap(), process: 7, machine },
    }
}

fn read(value: &serde_json::Value) -> Result<Manifest, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    fs::write(&path, value.to_string()).unwrap();
    Manifest::read(&path).map_err(|failure| failure.report())
}

#[test]
fn a_manifest_that_was_written_is_read() {
    let manifest = manifest("before");
    assert_eq!(read(&serde_json::to_value(&manifest).unwrap()), Ok(manifest.clone()));
    let mut above = manifest;
    above.run.machine.growth = Some(SavedGrowth { most_mib: 1024, usable_mib: 256 });
    above.run.machine.base = Some(Base { name: "first".parse().unwrap(), contents: "0".repeat(32) });
    assert_eq!(read(&serde_json::to_value(&above).unwrap()), Ok(above));
}

#[test]
fn a_manifest_of_another_version_with_more_or_less_in_it_or_that_cannot_be_is_an_error() {
    let mut good = serde_json::to_value(manifest("before")).unwrap();
    good["run"]["machine"]["base"] = serde_json::Value::Null;
    good["run"]["machine"]["growth"] = serde_json::Value::Null;
    let slot = |serial: &str| serde_json::json!({"read_only": true, "serial": serial});
    good["run"]["machine"]["slots"] = vec![slot("a-1"), serde_json::json!({"read_only": false})].into();
    read(&good).unwrap();
    let changed = |pointer: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        read(&bad).unwrap_err()
    };
    assert!(changed("/version", 2.into()).contains("of version 1 only"));
    for (pointer, value) in [
        ("/name", "../x".into()),
        ("/run/machine/cpus", 33.into()),
        ("/run/machine/memory_mib", 0.into()),
        ("/run/machine/root", "".into()),
        ("/run/machine/root", "/etc".into()),
        ("/run/machine/root", "..".into()),
        ("/run/machine/root", "x".repeat(MAX_ID + 1).into()),
        ("/run/machine/disks/0/read_only", false.into()),
        ("/run/machine/disks/0/serial", "x".repeat(21).into()),
        ("/run/machine/slots", vec![slot("a-1"), slot("a-1")].into()),
        ("/run/machine/slots/0/serial", "a-2".into()),
        ("/run/machine/slots/0/serial", "a-3".into()),
        ("/run/machine/slots", vec![serde_json::json!({"read_only": true}); 33].into()),
        ("/run/machine/cards", vec!["02:00:00:00:00:01"; 33].into()),
        ("/run/machine/cards", vec!["ff:00:00:00:00:01"].into()),
        ("/run/machine/devices/0", serde_json::json!({"type": "block", "disk": 4})),
        ("/run/job", serde_json::json!({})),
        ("/run/machine/base", serde_json::json!({"name": "../x", "contents": ""})),
        ("/run/machine/growth", serde_json::json!({"most_mib": 512 << 10, "usable_mib": 0})),
        ("/run/machine/growth", serde_json::json!({"most_mib": 100, "usable_mib": 0})),
        ("/run/machine/growth", serde_json::json!({"most_mib": 128, "usable_mib": 256})),
        ("/run/machine/base", serde_json::json!({"name": "x", "contents": "", "path": "/x"})),
        (
            "/run/machine/disks/0",
            serde_json::json!({"serial": "a", "read_only": true, "bytes": 1, "path": "/x"}),
        ),
    ] {
        changed(pointer, value);
    }
    let mut more = good.clone();
    more["path"] = "/etc/shadow".into();
    assert!(read(&more).unwrap_err().contains("unknown field"));
    for text in ["", "{", "[]", "{\"version\":1}"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("m"), text).unwrap();
        assert!(Manifest::read(&dir.path().join("m")).is_err(), "{text}");
    }
}

#[test]
fn disks_lie_where_they_were() {
    let mut machine = manifest("before").run.machine;
    let disks = ["/a,ro,serial=a-1", "/b,serial=a-2"].map(|text| text.parse::<Disk>().unwrap());
    assert_eq!(machine.lay(&disks), (vec![], disks.to_vec()));
    let slot = |read_only, serial: &str| SavedSlot { read_only, serial: Some(serial.to_owned()) };
    machine.slots = vec![SavedSlot { read_only: true, serial: None }, slot(false, "a-2")];
    let (slots, others) = machine.lay(&disks);
    assert_eq!(slots, [Slot::empty(true), Slot { read_only: false, disk: Some(disks[1].clone()) }]);
    assert_eq!(others, disks[..1]);
}

#[test]
fn what_does_not_fit_is_named_with_the_way_out() {
    let manifest = manifest("before");
    let (cpu, vmm) = ("a processor", "ab".repeat(32));
    manifest.fits(cpu, &vmm).unwrap();
    let other = manifest.fits("another", &vmm).unwrap_err().report();
    assert!(other.contains("it ran on a processor, and this host is another"), "{other}");
    let other = manifest.fits(cpu, "00").unwrap_err().report();
    assert!(other.contains("another mvm-vmm") && other.contains("MVM_VMM"), "{other}");
    let mut newer = manifest.clone();
    newer.run.machine.protocol.minor = PROTOCOL.minor + 1;
    let report = newer.fits(cpu, &vmm).unwrap_err().report();
    assert!(report.contains("its agent speaks protocol") && report.contains("help:"), "{report}");
}

#[test]
fn files_that_are_missing_cut_or_no_files_are_named_before_a_machine_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let machine = manifest("before").run.machine;
    let cached = dir.path().join("cached");
    let places = (Path::new("/w"), cached.as_path());
    let files = || machine.files(dir.path(), None, places).map_err(|failure| failure.report());
    fs::write(state_file(dir.path()), "state").unwrap();
    fs::write(memory_file(dir.path()), "memory").unwrap();
    fs::write(disk_file(dir.path(), 0), "disk").unwrap();
    assert!(files().unwrap_err().contains("disk-1"));
    fs::write(disk_file(dir.path(), 1), "writes").unwrap();
    let (snapshot, disks) = files().unwrap();
    assert_eq!(snapshot.contents, machine.contents);
    let paths: Vec<_> = disks.iter().map(|disk| disk.path.clone()).collect();
    assert_eq!(paths, [disk_file(dir.path(), 0), "/w".into()]);
    fs::hard_link(disk_file(dir.path(), 0), &cached).unwrap();
    assert_eq!(files().unwrap().1[0].path, cached);
    fs::write(state_file(dir.path()), "stat").unwrap();
    assert!(files().unwrap_err().contains("has 4 bytes, and 5 were saved"));
    fs::remove_file(state_file(dir.path())).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", state_file(dir.path())).unwrap();
    assert!(files().unwrap_err().contains("is no file"));
}
