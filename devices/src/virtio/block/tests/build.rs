//! What a disk can be built from, and what it says of itself.

use super::*;
use std::fs::OpenOptions;

fn reason(result: Result<Box<dyn VirtioDevice>, BuildError>) -> String {
    match result.err().expect("refused") {
        BuildError::File { source, .. } => source.to_string(),
        error @ BuildError::Value { .. } => error.to_string(),
    }
}

#[test]
fn a_configuration_needs_only_the_file_and_refuses_unknown_fields() {
    let config: Config = serde_json::from_str(r#"{"disk": 3}"#).unwrap();
    assert_eq!(config, Config { disk: FdSlot(3), serial: String::new(), ..super::config() });
    assert!(serde_json::from_str::<Config>(r#"{"disk": 3, "raedonly": true}"#).is_err());
    let spec: crate::virtio::DeviceSpec =
        serde_json::from_str(r#"{"type": "block", "disk": 3, "cache": "unsafe"}"#).unwrap();
    let crate::virtio::DeviceSpec::Block(config) = spec else { panic!("not a disk: {spec:?}") };
    assert_eq!(config.cache, Cache::Unsafe);
}

#[test]
fn a_writable_disk_excludes_every_other_user_of_the_image() {
    let file = image(1);
    let rw = OpenOptions::new().read(true).write(true).to_owned();
    let ro = OpenOptions::new().read(true).to_owned();
    let read_only = Config { read_only: true, ..config() };

    let first = try_build(&config(), reopen(&file, &rw)).unwrap();
    assert_eq!(reason(try_build(&config(), reopen(&file, &rw))), "disk is in use by another VM");
    assert_eq!(reason(try_build(&read_only, reopen(&file, &ro))), "disk is in use by another VM");
    drop(first);

    let reader = try_build(&read_only, reopen(&file, &ro)).unwrap();
    let second = try_build(&read_only, reopen(&file, &ro)).expect("readers share");
    assert_eq!(reason(try_build(&config(), reopen(&file, &rw))), "disk is in use by another VM");
    drop((reader, second));
    try_build(&config(), reopen(&file, &rw)).expect("free again");
}

#[test]
fn a_file_opened_the_wrong_way_is_refused_with_its_reason() {
    let file = image(1);
    let ro = OpenOptions::new().read(true).to_owned();
    let wo = OpenOptions::new().write(true).to_owned();
    let append = OpenOptions::new().read(true).append(true).to_owned();
    assert!(reason(try_build(&config(), reopen(&file, &ro))).contains("reading only"));
    assert!(reason(try_build(&config(), reopen(&file, &wo))).contains("not open for reading"));
    assert!(reason(try_build(&config(), reopen(&file, &append))).contains("appending"));
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let read_only = Config { read_only: true, ..config() };
    let directory = File::open("/").unwrap();
    assert!(reason(try_build(&read_only, directory)).contains("neither a regular file nor a block device"));
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(reason(try_build(&config(), socket)).contains("neither"));
    let missing = config().build(&mut HashMap::new());
    assert!(matches!(missing.err(), Some(BuildError::File { what: "a disk", .. })));
}

#[test]
fn values_out_of_bounds_are_refused() {
    let file = image(1);
    for (wrong, setting) in [
        (Config { serial: "a".repeat(21), ..config() }, "disk serial"),
        (Config { serial: "a\0b".into(), ..config() }, "disk serial"),
        (Config { queues: 0, ..config() }, "disk queues"),
        (Config { queues: 17, ..config() }, "disk queues"),
    ] {
        assert!(reason(try_build(&wrong, file.try_clone().unwrap())).starts_with(setting));
    }
    build(&Config { serial: "a".repeat(20), queues: 16, ..config() }, &file);
}

#[test]
fn several_queues_are_offered_only_when_asked_for() {
    let file = image(2);
    let one = build(&config(), &file);
    assert_eq!((one.queues().len(), one.features() & 1 << 12), (1, 0));
    let four = build(&Config { queues: 4, ..config() }, &file);
    assert_eq!((four.queues().len(), four.features() & 1 << 12), (4, 1 << 12));
    let mut queues = [0; 2];
    four.config().unwrap().read(34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 4);
    assert!(one.wants_own_loop());
    assert!(!build(&config(), &image(NO_DISK / 512)).wants_own_loop(), "a place without a disk");
}

#[test]
fn a_restored_disk_of_another_size_tells_its_driver() {
    let empty = build(&config(), &image(0));
    let saved = serde_json::to_string(&empty.state()).unwrap();
    let state: DeviceState = serde_json::from_str(&saved).unwrap();

    let mut larger = build(&config(), &image(8));
    let space = larger.config().unwrap();
    // As the transport does: the driver's bytes first.
    space.update(|bytes| bytes[..8].copy_from_slice(&0u64.to_le_bytes()));
    larger.restore(&state).unwrap();
    let mut capacity = [0; 8];
    space.read(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), sectors(image(8).metadata().unwrap().len()));
    let vm = Harness::new(larger);
    assert_eq!(vm.config_changes(), 1);

    let mut same = build(&config(), &image(0));
    same.restore(&state).unwrap();
    assert_eq!(Harness::new(same).config_changes(), 0);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let mut disk = build(&config(), &image(1));
    assert!(disk.restore(&DeviceState::Rng(crate::virtio::rng::State {})).is_err());
}
