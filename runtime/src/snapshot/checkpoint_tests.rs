//! Checkpoints as they were written, and as somebody else may have written them.

use std::os::unix::fs::symlink;

use nix::unistd::mkfifo;
use serde_json::{Value, json};

use super::super::manifest::tests::manifest;
use super::*;

/// One of a machine with a layer and a disk of writes.
pub(crate) fn checkpoint_of(layers: Vec<String>) -> Checkpoint {
    let machine = manifest("a").run.machine;
    Checkpoint::of(machine, (7, false), layers, Path::new("/proc/self/exe")).unwrap()
}

/// A checkpoint's directory.
struct Made {
    _scratch: tempfile::TempDir,
    directory: PathBuf,
}

fn made() -> Made {
    let scratch = tempfile::tempdir().unwrap();
    let (saved, directory) = (scratch.path().join("saved"), scratch.path().join("checkpoint"));
    fs::create_dir(&saved).unwrap();
    fs::create_dir(&directory).unwrap();
    for (name, text) in [("state", "state"), ("memory", "memory"), ("disk-1", "writes")] {
        fs::write(saved.join(name), text).unwrap();
    }
    checkpoint_of(vec!["ab".to_owned()]).write(&saved, &directory).unwrap();
    Made { _scratch: scratch, directory }
}

impl Made {
    fn open(&self) -> Result<Opened, String> {
        Opened::open(&self.directory).map_err(|failure| failure.report())
    }

    fn unpack(&self, piece: Piece) -> Result<Vec<u8>, String> {
        let to = self.directory.join("unpacked");
        let _ = fs::remove_file(&to);
        let file = File::create_new(&to).unwrap();
        self.open()?.unpack(piece, &file).map_err(|failure| failure.report())?;
        Ok(fs::read(to).unwrap())
    }

    /// Has its record say something else.
    fn say(&self, pointer: &str, value: Value) {
        let path = self.directory.join(RECORD);
        let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        *record.pointer_mut(pointer).unwrap() = value;
        fs::write(path, record.to_string()).unwrap();
    }
}

#[test]
fn what_was_written_is_read_file_by_file() {
    let made = made();
    let opened = made.open().unwrap();
    assert_eq!((opened.checkpoint.process, opened.checkpoint.terminal), (7, false));
    assert_eq!(opened.checkpoint.machine, manifest("a").run.machine);
    for (piece, text) in [(Piece::State, "state"), (Piece::Memory, "memory"), (Piece::Writes, "writes")] {
        assert_eq!(made.unpack(piece).unwrap(), text.as_bytes());
    }
}

#[test]
fn it_is_written_over_nothing_and_leaves_nothing_when_it_cannot_be() {
    let (made, directory) = (made(), tempfile::tempdir().unwrap());
    let again = || made.open().unwrap().checkpoint;
    let failure = again().write(directory.path(), &made.directory).unwrap_err();
    assert!(failure.report().contains("File exists"), "{}", failure.report());
    assert_eq!(made.unpack(Piece::Memory).unwrap(), b"memory");
    let to = directory.path().join("to");
    fs::create_dir(&to).unwrap();
    fs::write(directory.path().join("disk-1"), "writes").unwrap();
    let failure = again().write(directory.path(), &to).unwrap_err();
    assert!(failure.report().contains("cannot read"), "there was no state: {}", failure.report());
    assert_eq!(fs::read_dir(&to).unwrap().count(), 0);
}

#[test]
fn links_devices_and_pipes_in_the_place_of_files_are_not_opened() {
    let made = made();
    let path = made.directory.join("memory");
    let same = made.directory.join("elsewhere");
    fs::rename(&path, &same).unwrap();
    symlink(&same, &path).unwrap();
    assert!(made.unpack(Piece::Memory).unwrap_err().contains("memory is no file"));
    fs::remove_file(&path).unwrap();
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    assert!(made.unpack(Piece::Memory).unwrap_err().contains("memory is no file"));
    let record = made.directory.join(RECORD);
    fs::rename(&record, made.directory.join("record")).unwrap();
    symlink(made.directory.join("record"), &record).unwrap();
    assert!(made.open().unwrap_err().contains("mvm.json is no file"));
    let link = made.directory.with_file_name("link");
    symlink(&made.directory, &link).unwrap();
    assert!(Opened::open(&link).is_err());
}

#[test]
fn a_file_that_was_changed_or_is_of_another_length_is_an_error() {
    let made = made();
    let path = made.directory.join("memory");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(made.unpack(Piece::Memory).unwrap_err().contains("damaged"));
    made.say("/files/memory/bytes", json!(7));
    assert!(made.unpack(Piece::Memory).unwrap_err().contains("another file"));
}

#[test]
fn a_record_that_cannot_be_is_refused_before_anything_is_unpacked() {
    for (pointer, value, why) in [
        ("/version", json!(2), "version 1 only"),
        ("/version", json!("1"), "version 1 only"),
        ("/layers", json!([]), "not a digest for each disk"),
        ("/files/writes", json!(null), "another disk of writes"),
        ("/files/writes/bytes", json!(1_u64 << 62), "another disk of writes"),
        ("/files/memory/bytes", json!(1_u64 << 62), "more memory"),
        ("/files/memory/bytes", json!((128_u64 << 20) + (2 << 20)), "more memory"),
        ("/files/state/bytes", json!(1_u64 << 62), "more memory or devices"),
        ("/machine/devices", json!([{"type": "block", "path": "/etc/shadow"}]), "cannot read"),
        ("/machine/root", json!(""), "impossible name"),
        ("/machine/root", json!("/etc"), "impossible name"),
        ("/machine/root", json!("../.."), "impossible name"),
        ("/process", json!("one"), "cannot read"),
        ("/processor", json!("a".repeat(1025)), "words longer"),
        ("/files", json!({"state": {}, "more": 1}), "cannot read"),
    ] {
        let made = made();
        made.say(pointer, value);
        let report = made.open().unwrap_err();
        assert!(report.contains(why), "{pointer}: {report}");
    }
    let made = made();
    fs::write(made.directory.join(RECORD), "x".repeat(2 << 20)).unwrap();
    made.open().unwrap_err();
    fs::remove_file(made.directory.join(RECORD)).unwrap();
    assert!(made.open().unwrap_err().contains("only what a task of this runtime"));
}
