//! What a well-formed image becomes.

use std::fs;

use mvm_runtime::image::{Error, Format, Source, Store};
use serde_json::json;

use crate::support::erofs_reader::list;
use crate::support::images::{Layer, Layout, Packed, docker_archive, gzip};
use crate::{DEMO_PATHS, demo, paths, unpack};

#[test]
fn every_format_and_packing_gives_the_same_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let mut keys = Vec::new();
    let mut images = Vec::new();
    for (index, packed) in [Packed::Plain, Packed::Gzip, Packed::Zstd].into_iter().enumerate() {
        let layers: Vec<_> = demo().into_iter().map(|bytes| (bytes, packed)).collect();
        let mut layout = Layout::new(&dir.path().join(format!("layout{index}")));
        layout.list(layout.image(&layers, &json!({})), "demo");
        let archive = dir.path().join(format!("{index}.tar"));
        layout.archive(&archive);
        images.push((Source::open(&layout.path).unwrap(), Format::OciLayout));
        images.push((Source::open(&archive).unwrap(), Format::OciArchive));
    }
    let docker = dir.path().join("docker.tar");
    docker_archive(&docker, &[("demo:1", demo())]);
    images.push((Source::open(&docker).unwrap(), Format::DockerArchive));
    fs::write(dir.path().join("docker.tgz"), gzip(&fs::read(&docker).unwrap())).unwrap();
    images.push((Source::open(dir.path().join("docker.tgz")).unwrap(), Format::DockerArchive));
    let mut images_bytes = Vec::new();
    for (index, (source, format)) in images.iter().enumerate() {
        assert_eq!(source.format(), *format);
        keys.push(source.key().unwrap());
        let store = Store::open(dir.path().join(format!("store{index}"))).unwrap();
        let rootfs = store.rootfs(source, &mut ()).unwrap();
        images_bytes.push(fs::read(rootfs.path).unwrap());
    }
    assert!(keys.windows(2).all(|pair| pair[0] == pair[1]));
    assert!(images_bytes.windows(2).all(|pair| pair[0] == pair[1]), "the same layers give the same bytes");
    let listing = list(&images_bytes[0]);
    assert_eq!(paths(&listing), DEMO_PATHS);
    assert_eq!(listing[&b"bin/sh"[..]].body, [7; 10_000]);
    assert_eq!(listing[&b"bin/sh"[..]].nlink, 2);
    assert_eq!(listing[&b"etc/passwd"[..]].mtime, (1_700_000_000, 0));
}

#[test]
fn the_configuration_says_how_to_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(dir.path());
    let config = json!({
        "Entrypoint": ["/init"], "Cmd": ["a", "b"], "Env": ["X=1"], "WorkingDir": "/w", "User": "1:2",
        "StopSignal": "SIGINT", "Labels": { "l": "v" }, "ExposedPorts": { "80/tcp": {} }, "Volumes": { "/d": {} },
    });
    layout.list(layout.image(&[(demo().remove(0), Packed::Zstd)], &config), "x");
    let source = Source::open(dir.path()).unwrap();
    let found = source.config();
    assert_eq!(
        (&found.entrypoint[..], &found.cmd[..]),
        (&["/init".to_owned()][..], &["a".to_owned(), "b".to_owned()][..])
    );
    assert_eq!((found.env[0].as_str(), found.cwd.as_str(), found.user.as_str()), ("X=1", "/w", "1:2"));
    assert_eq!(found.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(found.labels["l"], "v");
    assert_eq!((found.exposed_ports[0].as_str(), found.volumes[0].as_str()), ("80/tcp", "/d"));
    assert_eq!(source.name(), Some("x"));
}

#[test]
fn special_files_owners_and_attributes_are_kept() {
    let layer = Layer::new()
        .device("null", tar::EntryType::Char, 1, 3)
        .device("disk", tar::EntryType::Block, 259, 300)
        .entry("pipe", tar::EntryType::Fifo, b"", |_| {})
        .entry("su", tar::EntryType::Regular, b"x", |header| {
            header.set_mode(0o4755);
            header.set_uid(100_000);
            header.set_gid(3_000_000);
        })
        .pax(&[("SCHILY.xattr.security.capability", b"\x01\n\x00=x"), ("mtime", b"1.5")])
        .file("cap", b"y");
    let seen = unpack(vec![layer.bytes()]).unwrap();
    assert_eq!((seen[&b"null"[..]].mode, seen[&b"null"[..]].device), (0o020_644, Some((1, 3))));
    assert_eq!((seen[&b"disk"[..]].mode, seen[&b"disk"[..]].device), (0o060_644, Some((259, 300))));
    assert_eq!(seen[&b"pipe"[..]].mode, 0o010_644);
    let su = &seen[&b"su"[..]];
    assert_eq!((su.mode, su.uid, su.gid), (0o104_755, 100_000, 3_000_000));
    let cap = &seen[&b"cap"[..]];
    assert_eq!(cap.xattrs[&b"security.capability"[..]], b"\x01\n\x00=x");
    assert_eq!(cap.mtime, (1, 500_000_000));
}

#[test]
fn long_names_of_both_kinds_are_kept() {
    let (long, target) = (format!("d/{}", "n".repeat(250)), "t".repeat(4000));
    let with_end = |text: &str| [text.as_bytes(), b"\0"].concat();
    let layer = Layer::new()
        .entry("././@LongLink", tar::EntryType::GNULongName, &with_end(&long), |_| {})
        .entry("././@LongLink", tar::EntryType::GNULongLink, &with_end(&target), |_| {})
        .symlink("short", "short")
        .pax(&[("path", b"pax-path"), ("linkpath", b"pax-target")])
        .symlink("short", "short");
    let seen = unpack(vec![layer.bytes()]).unwrap();
    assert_eq!(seen[long.as_bytes()].body, target.as_bytes());
    assert_eq!(seen[&b"pax-path"[..]].body, b"pax-target");
}

#[test]
fn old_gnu_sparse_files_are_unfolded() {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(6);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.set_real_size(100_000);
    for (slot, (offset, len)) in gnu.sparse.iter_mut().zip([(0_u64, 3_u64), (50_000, 3), (100_000, 0)]) {
        slot.offset.copy_from_slice(format!("{offset:011o}\0").as_bytes());
        slot.numbytes.copy_from_slice(format!("{len:011o}\0").as_bytes());
    }
    header.set_cksum();
    let mut layer = header.as_bytes().to_vec();
    layer.extend_from_slice(b"abcdef");
    layer.resize(1024 + 1024, 0);
    let seen = unpack(vec![layer]).unwrap();
    let body = &seen[&b"sparse"[..]].body;
    assert_eq!(body.len(), 100_000);
    assert_eq!((&body[..3], &body[50_000..50_003]), (&b"abc"[..], &b"def"[..]));
}

#[test]
fn several_images_are_told_apart_by_name_and_digest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("images");
    let mut layout = Layout::new(&path);
    let one = layout.image(&[(demo().remove(0), Packed::Gzip)], &json!({ "Cmd": ["one"] }));
    let two = layout.image(&[(demo().remove(0), Packed::Gzip)], &json!({ "Cmd": ["two"] }));
    let digest = one["digest"].as_str().unwrap().to_owned();
    layout.list(one, "reg.io/one:1");
    layout.list(two, "reg.io/two:1");
    let open = |suffix: &str| Source::open(format!("{}{suffix}", path.display()));
    assert_eq!(open(":one:1").unwrap().config().cmd, ["one"]);
    assert_eq!(open(":reg.io/two:1").unwrap().config().cmd, ["two"]);
    assert_eq!(open(&format!("@{digest}")).unwrap().config().cmd, ["one"]);
    assert_eq!(open(&format!("@{}", &digest[7..17])).unwrap().config().cmd, ["one"]);
    let error = open("").unwrap_err();
    assert_eq!(error.to_string(), format!("{} holds 2 images", path.display()));
    let choices = format!("choose one of {0}:reg.io/one:1, {0}:reg.io/two:1", path.display());
    assert_eq!(error.help().unwrap(), choices);
    let error = open(":three").unwrap_err();
    assert_eq!(error.to_string(), format!("{} holds no image three", path.display()));
    assert_eq!(error.help().unwrap(), choices);
    assert!(matches!(open(":1").unwrap_err(), Error::SeveralImages { .. }));
    docker_archive(&dir.path().join("d.tar"), &[("a:1", demo()), ("b:1", demo())]);
    let docker = |suffix: &str| Source::open(format!("{}/d.tar{suffix}", dir.path().display()));
    assert_eq!(docker(":b:1").unwrap().config().cmd, ["run", "b:1"]);
    assert!(matches!(docker("").unwrap_err(), Error::SeveralImages { .. }));
}

#[test]
fn the_platform_of_this_host_is_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(dir.path());
    let layers = [(demo().remove(0), Packed::Gzip)];
    let platform = |mut manifest: serde_json::Value, architecture: &str, os: &str| {
        manifest["platform"] = json!({ "architecture": architecture, "os": os });
        manifest
    };
    let arm = platform(layout.image_for("arm64", &layers, &json!({})), "arm64", "linux");
    let amd = platform(layout.image(&layers, &json!({ "Cmd": ["amd"] })), "amd64", "linux");
    let note = platform(layout.blob(b"{}", "x"), "unknown", "unknown");
    let index = json!({ "schemaVersion": 2, "manifests": [arm, amd, note] });
    let index = layout.blob(index.to_string().as_bytes(), "application/vnd.oci.image.index.v1+json");
    layout.list(index, "multi");
    assert_eq!(Source::open(dir.path()).unwrap().config().cmd, ["amd"]);

    let other = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(other.path());
    layout.list(layout.image_for("arm64", &layers, &json!({})), "arm");
    let error = Source::open(other.path()).unwrap_err();
    assert_eq!(error.to_string(), "the image is for linux/arm64, this host runs linux/amd64");
}
