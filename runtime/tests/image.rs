//! Images of every format, well-formed and hostile, through the store to the file system.

#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mvm_runtime::image::{Error, Format, Phase, Progress, Rootfs, Source, Store};
use serde_json::json;
use support::erofs_reader::{Seen, list};
use support::images::{Layer, Layout, Packed, docker_archive, gzip, layout};

type Listing = BTreeMap<Vec<u8>, Seen>;

/// Builds the image and reads it back.
fn build(dir: &Path, source: &Source) -> Result<(Rootfs, Listing), Error> {
    let rootfs = Store::open(dir.join("store")).unwrap().rootfs(source, &mut ())?;
    let listing = list(&fs::read(&rootfs.path).unwrap());
    Ok((rootfs, listing))
}

/// The file system of one image made of these layers.
fn unpack(layers: Vec<Vec<u8>>) -> Result<Listing, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = layout(&dir.path().join("image"), layers);
    let result = build(dir.path(), &Source::open(path)?).map(|(_, listing)| listing);
    if result.is_err() {
        let left: Vec<_> =
            fs::read_dir(dir.path().join("store")).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.iter().all(|path| path.extension().unwrap() == "lock"), "left behind: {left:?}");
    }
    result
}

fn paths(listing: &Listing) -> Vec<String> {
    listing.keys().map(|path| path.escape_ascii().to_string()).collect()
}

fn refusal(layers: Vec<Vec<u8>>) -> String {
    let mut error: &dyn std::error::Error = &unpack(layers).unwrap_err();
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn demo() -> Vec<Vec<u8>> {
    let base = Layer::new()
        .directory("bin/")
        .file("bin/busybox", &[7; 10_000])
        .hard_link("bin/sh", "bin/busybox")
        .symlink("sbin", "bin")
        .directory("etc/")
        .file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")
        .file("etc/old", b"old")
        .directory("var/cache/")
        .file("var/cache/low", b"low");
    let top = Layer::new()
        .file("etc/.wh.old", b"")
        .file("var/cache/.wh..wh..opq", b"")
        .file("var/cache/new", b"new")
        .file("sbin/init", b"#!/bin/sh\n");
    vec![base.bytes(), top.bytes()]
}

const DEMO_PATHS: [&str; 11] = [
    "",
    "bin",
    "bin/busybox",
    "bin/init",
    "bin/sh",
    "etc",
    "etc/passwd",
    "sbin",
    "var",
    "var/cache",
    "var/cache/new",
];

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
fn no_entry_leaves_the_root() {
    let layer = Layer::new()
        .file("../../../up", b"1")
        .file("/absolute", b"2")
        .symlink("out", "../../../../../outside")
        .file("out/inside", b"3")
        .symlink("abs", "/outside")
        .file("abs/also", b"4");
    let seen = unpack(vec![layer.bytes()]).unwrap();
    assert_eq!(
        paths(&seen),
        ["", "abs", "absolute", "out", "outside", "outside/also", "outside/inside", "up"]
    );
}

#[test]
fn a_hard_link_out_of_the_image_is_refused() {
    let text = refusal(vec![Layer::new().hard_link("passwd", "../../../../etc/passwd").bytes()]);
    assert_eq!(text, "cannot place passwd: the file it is a hard link to does not exist");
}

#[test]
fn a_loop_of_links_is_refused() {
    let layer = Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b"");
    assert_eq!(refusal(vec![layer.bytes()]), "cannot place a/x: too many symbolic links on the way");
}

#[test]
fn a_pax_size_rules_over_the_header() {
    let body = [9_u8; 1024];
    let layer = Layer::new()
        .pax(&[("size", b"1024")])
        .entry("big", tar::EntryType::Regular, &body, |header| header.set_size(512))
        .file("next", b"n");
    let seen = unpack(vec![layer.bytes()]).unwrap();
    assert_eq!(seen[&b"big"[..]].body, body);
    assert_eq!(seen[&b"next"[..]].body, b"n");
}

#[test]
fn a_size_beyond_the_stream_is_refused() {
    for size in ["5000", "18446744073709551615", "9223372036854775807"] {
        let layer = Layer::new().pax(&[("size", size.as_bytes())]).file("f", b"short");
        let text = refusal(vec![layer.bytes()]);
        let expected = ["the layer ends in the middle of it", "absurd", "more than the limit"];
        assert!(expected.iter().any(|part| text.contains(part)), "{size}: {text}");
    }
}

#[test]
fn a_bomb_is_stopped_early() {
    let zeros = Layer::new().file("zeros", &vec![0; 200 << 20]).bytes();
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(dir.path());
    layout.list(layout.image(&[(zeros, Packed::Zstd)], &json!({})), "bomb");
    let error = build(dir.path(), &Source::open(dir.path()).unwrap()).unwrap_err();
    let Error::Layer { source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(source.to_string(), "bytes unpacked from one byte of a layer: more than the limit of 200");
}

#[test]
fn over_long_headers_are_refused_before_they_are_read() {
    let huge = vec![b'a'; 300 << 10];
    let name = Layer::new().entry("././@LongLink", tar::EntryType::GNULongName, &huge, |_| {}).file("f", b"");
    assert!(refusal(vec![name.bytes()]).contains("limit"));
    let pax = Layer::new().entry("pax", tar::EntryType::XHeader, &huge, |_| {}).file("f", b"");
    assert!(refusal(vec![pax.bytes()]).contains("limit"));
}

#[test]
fn damaged_tar_streams_are_refused() {
    let good = Layer::new().file("a", b"a").file("b", b"b").bytes();
    let mut wrong_sum = good.clone();
    wrong_sum[1024] ^= 1;
    assert_eq!(refusal(vec![wrong_sum]), "bad tar entry: its checksum is wrong");
    assert_eq!(refusal(vec![good[..1500].to_vec()]), "bad tar entry: the archive ends in the middle of it");
    let mut lone_zeros = good.clone();
    lone_zeros.splice(1024..1024, [0; 512]);
    assert_eq!(refusal(vec![lone_zeros]), "bad tar entry: a lone block of zeros");
    let unknown = Layer::new().entry("v", tar::EntryType::new(b'V'), b"", |_| {}).bytes();
    assert_eq!(refusal(vec![unknown]), "bad tar entry: type 'V' of v");
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
fn tampered_blobs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = layout(&dir.path().join("image"), demo());
    let blobs = path.join("blobs/sha256");
    let mut seen = 0;
    for entry in fs::read_dir(&blobs).unwrap() {
        let blob = entry.unwrap().path();
        let good = fs::read(&blob).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&blob, &bad).unwrap();
            let opened = Source::open(&path).and_then(|source| build(dir.path(), &source).map(drop));
            assert!(opened.is_err(), "{} changed at {at}", blob.display());
            assert!(Store::open(dir.path().join("store")).unwrap().list().unwrap().is_empty());
            seen += 1;
        }
        fs::write(&blob, &good[..good.len() - 1]).unwrap();
        assert!(Source::open(&path).and_then(|source| build(dir.path(), &source).map(drop)).is_err());
        fs::write(&blob, good).unwrap();
    }
    assert_eq!(seen, 12, "two layers, a configuration and a manifest");
    assert!(build(dir.path(), &Source::open(&path).unwrap()).is_ok());
}

#[test]
fn a_wrong_diff_id_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(dir.path());
    let manifest = layout.image(&[(demo().remove(0), Packed::Gzip)], &json!({}));
    let blob = |descriptor: &serde_json::Value| {
        let digest = descriptor["digest"].as_str().unwrap().replace(':', "/");
        fs::read_to_string(dir.path().join("blobs").join(digest)).unwrap()
    };
    let mut document: serde_json::Value = serde_json::from_str(&blob(&manifest)).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&blob(&document["config"])).unwrap();
    config["rootfs"]["diff_ids"][0] = json!(format!("sha256:{}", "0".repeat(64)));
    document["config"] =
        layout.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let manifest = layout.blob(document.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    layout.list(manifest, "x");
    let error = build(dir.path(), &Source::open(dir.path()).unwrap()).unwrap_err();
    let Error::Layer { source, .. } = error else { panic!("{error:?}") };
    assert!(matches!(*source, Error::Digest { .. }), "{source:?}");
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

#[test]
fn what_is_no_image_is_refused_with_what_was_tried() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("text"), "hello\n".repeat(1000)).unwrap();
    let error = Source::open(path("text")).unwrap_err();
    assert!(error.to_string().contains("neither a directory nor a tar archive"), "{error}");
    assert!(error.help().unwrap().contains("docker save"));
    fs::write(path("tar"), Layer::new().file("f", b"").bytes()).unwrap();
    let error = Source::open(path("tar")).unwrap_err();
    assert!(error.to_string().contains("without index.json (OCI) and without manifest.json"), "{error}");
    fs::create_dir(path("empty")).unwrap();
    assert!(matches!(Source::open(path("empty")).unwrap_err(), Error::EmptyRoot { .. }));
    assert!(matches!(Source::open("/").unwrap_err(), Error::HostRoot { .. }));
    assert!(matches!(Source::open("/proc/..").unwrap_err(), Error::HostRoot { .. }));
    assert!(matches!(Source::open(path("none")).unwrap_err(), Error::Open { .. }));
    for special in ["/dev/null", "/dev/zero"] {
        let error = Source::open(special).unwrap_err();
        assert!(matches!(error, Error::Open { .. }), "{special}: {error:?}");
    }
    let mut layout = Layout::new(&path("no-layers"));
    layout.list(layout.image(&[], &json!({})), "x");
    let error = Source::open(path("no-layers")).unwrap_err();
    assert!(error.to_string().contains("the image has no layers"), "{error}");
}

/// Remembers what it was told.
#[derive(Default)]
struct Told {
    phases: Vec<Phase>,
    bytes: u64,
}

impl Progress for Told {
    fn begin(&mut self, phase: Phase, _: Option<u64>) {
        self.phases.push(phase);
    }

    fn advance(&mut self, done: u64) {
        self.bytes = done;
    }
}

#[test]
fn the_second_use_builds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(layout(&dir.path().join("image"), demo())).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut told = Told::default();
    let first = store.rootfs(&source, &mut told).unwrap();
    let layer = |number| Phase::Layer { number, count: 2 };
    assert_eq!(told.phases, [layer(1), layer(2), Phase::Finishing]);
    assert!(told.bytes > 0 && first.built);
    let mut told = Told::default();
    let second = store.rootfs(&source, &mut told).unwrap();
    assert!(told.phases.is_empty() && !second.built);
    assert_eq!((first.key, first.bytes, first.config), (second.key, second.bytes, second.config));
}

#[test]
fn a_damaged_cache_is_noticed_and_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(layout(&dir.path().join("image"), demo())).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let path = store.rootfs(&source, &mut ()).unwrap().path;
    let good = fs::read(&path).unwrap();
    let mut damaged = good.clone();
    damaged[1030] ^= 1;
    for bad in [&good[..good.len() - 4096], &damaged, b""] {
        fs::write(&path, bad).unwrap();
        assert!(store.rootfs(&source, &mut ()).unwrap().built);
        assert_eq!(fs::read(&path).unwrap(), good);
    }
    fs::write(path.with_extension("json"), "{").unwrap();
    assert!(store.rootfs(&source, &mut ()).unwrap().built);
}

#[test]
fn two_that_come_together_build_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = layout(&dir.path().join("image"), demo());
    let store = Store::open(dir.path().join("store")).unwrap();
    let built: Vec<bool> = std::thread::scope(|scope| {
        let start = || store.rootfs(&Source::open(&path).unwrap(), &mut ()).unwrap().built;
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(built.iter().filter(|built| **built).count(), 1);
}

#[test]
fn a_listing_shows_what_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let one = Source::open(layout(&dir.path().join("one"), demo())).unwrap();
    docker_archive(&dir.path().join("d.tar"), &[("two:1", demo()[..1].to_vec())]);
    let two = Source::open(dir.path().join("d.tar")).unwrap();
    let rootfs = store.rootfs(&one, &mut ()).unwrap();
    store.rootfs(&two, &mut ()).unwrap();
    let listed = store.list().unwrap();
    assert_eq!(
        listed.iter().map(|cached| cached.name.as_deref().unwrap()).collect::<Vec<_>>(),
        ["two:1", "latest"]
    );
    assert!(listed.iter().all(|cached| cached.bytes > 0 && cached.disk_bytes > 0));
    assert_eq!(store.get("two:1").unwrap().config.cmd, ["run", "two:1"]);
    assert!(matches!(store.get("three").unwrap_err(), Error::NotCached { .. }));
    assert!(matches!(store.remove("").unwrap_err(), Error::NotCached { .. }));
    assert_eq!(store.remove(&rootfs.key[..12]).unwrap().key, rootfs.key);
    assert_eq!(rootfs.file.metadata().unwrap().len(), rootfs.bytes, "who has it open keeps it");
    assert_eq!(store.list().unwrap().len(), 1);
    let left: Vec<_> = fs::read_dir(dir.path().join("store")).unwrap().collect();
    assert_eq!(left.len(), 3, "image, record and lock of the other: {left:?}");
    assert!(store.rootfs(&one, &mut ()).unwrap().built);
}
