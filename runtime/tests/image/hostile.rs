//! Images that mean harm, and files that are no images.

use std::fs;

use proptest::prelude::*;

use mvm_runtime::image::{Error, Source, Store};
use serde_json::json;

use crate::support::images::{Layer, Layout, Packed, layout};
use crate::{build, demo, paths, refusal, unpack};

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
    fs::create_dir_all(path("bundle/rootfs")).unwrap();
    fs::write(path("bundle/config.json"), "{}").unwrap();
    let error = Source::open(path("bundle")).unwrap_err();
    assert!(error.to_string().ends_with("its root file system is in rootfs/"), "{error}");
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

#[test]
fn a_bomb_in_a_body_nobody_wants_is_stopped_as_well() {
    let notes = Layer::new().file(".wh..wh.plnk", &vec![0; 200 << 20]).bytes();
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(dir.path());
    layout.list(layout.image(&[(notes, Packed::Zstd)], &json!({})), "bomb");
    let error = build(dir.path(), &Source::open(dir.path()).unwrap()).unwrap_err();
    let Error::Layer { source, .. } = &error else { panic!("{error:?}") };
    assert!(matches!(**source, Error::Limit { .. }), "{source:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Headers with any bytes in them, their checksums made right again so that they are looked at.
    #[test]
    fn changed_headers_give_an_error_or_a_sound_file_system(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0..500_usize, any::<u8>()), 1..6),
    ) {
        let layer = Layer::new()
            .directory("d/")
            .pax(&[("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"v")])
            .file("d/f", &[1; 700])
            .hard_link("d/g", "d/f")
            .symlink("l", "d")
            .entry("././@LongLink", tar::EntryType::GNULongName, b"l/long-name\0", |_| {})
            .file("short", b"body")
            .device("c", tar::EntryType::Char, 1, 3)
            .file("d/.wh.f", b"");
        let mut bytes = layer.bytes();
        let records: Vec<usize> = (0..bytes.len() / 512).collect();
        for (record, at, byte) in changes {
            let start = record.get(&records) * 512;
            bytes[start + at] = byte;
            let header = &mut bytes[start..start + 512];
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        // Reading back asserts that what was made is sound.
        match unpack(vec![bytes]) {
            Ok(seen) => prop_assert!(seen.contains_key(&b""[..])),
            Err(error) => prop_assert!(matches!(error, Error::Layer { .. }), "{error:?}"),
        }
    }
}
