//! Images and their parts: archives, documents, layers, and the file system that is written of them.

use mvm_devices::testing::hostile::Reach;
use mvm_runtime::erofs::{BLOCK_SIZE, Content, Dirent, Kind, Meta, Mtime, Node, NodeId, Tree, Writer};
use mvm_runtime::fuzzing::image;
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::{BOTH, target, texts, told};
use crate::Target;

pub(super) const TARGETS: &[Target] = &[
    Target { most_mib: 64, ..target("layer", layer, layer_seeds, BOTH) },
    target("pax", pax, pax_seeds, BOTH),
    target("sparse", sparse, sparse_seeds, &["gnu", "pax", "refused"]),
    Target { most_mib: 64, ..target("archive", archive, archive_seeds, &["found", "unpacked", "refused"]) },
    Target { most_mib: 64, ..target("image_index", index, index_seeds, &["found", "refused"]) },
    Target { most_mib: 64, ..target("image_manifest", manifest, manifest_seeds, &["found", "refused"]) },
    Target { most_mib: 64, ..target("image_config", config, config_seeds, &["found", "refused"]) },
    target("erofs", erofs, erofs_seeds, &["written", "inodes"]),
];

fn layer(bytes: &[u8], reach: &mut Reach) {
    told(reach, image::layer(bytes));
}

/// An entry whose path is put into the header as it stands, `..` and all.
fn entry(kind: EntryType, path: &str, link: &str, body: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(body.len() as u64);
    header.set_cksum();
    let mut builder = Builder::new(Vec::new());
    builder.append(&header, body).expect("a vector takes all");
    let mut all = builder.into_inner().expect("a vector takes all");
    all.truncate(512 + body.len().next_multiple_of(512));
    all
}

fn ended(entries: &[Vec<u8>]) -> Vec<u8> {
    [&entries.concat()[..], &[0; 1024]].concat()
}

fn honest_layer() -> Vec<u8> {
    ended(&[
        entry(EntryType::Directory, "bin/", "", b""),
        entry(EntryType::Regular, "bin/sh", "", &[7; 700]),
        entry(EntryType::Symlink, "bin/ash", "sh", b""),
        entry(EntryType::Link, "bin/dash", "bin/sh", b""),
        entry(EntryType::Fifo, "run/pipe", "", b""),
    ])
}

fn layer_seeds() -> Vec<Vec<u8>> {
    let file = |path: &str| entry(EntryType::Regular, path, "", b"x");
    let pax = |text: &[u8]| entry(EntryType::XHeader, "pax", "", text);
    vec![
        honest_layer(),
        ended(&[]),
        // Links and names that lead out.
        ended(&[entry(EntryType::Link, "in", "../../etc/passwd", b"")]),
        ended(&[entry(EntryType::Symlink, "d", "/etc", b""), file("d/passwd")]),
        ended(&[
            entry(EntryType::Symlink, "a", "b", b""),
            entry(EntryType::Symlink, "b", "a", b""),
            file("a/x"),
        ]),
        ended(&[file("../../x"), file("/y"), file("a/../../z")]),
        // Devices, whiteouts, a directory in the place of a file and the reverse.
        ended(&[entry(EntryType::Block, "sda", "", b""), entry(EntryType::Char, "null", "", b"")]),
        ended(&[file("a/.wh.b"), file("a/.wh..wh..opq"), file(".wh.")]),
        ended(&[file("a"), entry(EntryType::Directory, "a/", "", b""), file("a/b"), file("a")]),
        // Sizes that contradict each other, a sparse file without bounds, a long name.
        ended(&[pax(b"12 size=999\n"), file("p")]),
        ended(&[
            pax(&[record("GNU.sparse.major", "1"), record("GNU.sparse.realsize", "99999999999")].concat()),
            file("s"),
        ]),
        ended(&[entry(EntryType::GNULongName, "././@LongLink", "", &[b'n'; 5000]), file("l")]),
        ended(&[pax(b"30 SCHILY.xattr.user.name=value\n"), file("x")]),
        honest_layer()[..900].to_vec(),
        vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3],
        vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0, 1, 0, 0],
        vec![b'x'; 600],
    ]
}

fn pax(bytes: &[u8], reach: &mut Reach) {
    told(reach, image::pax(bytes));
}

fn pax_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "12 path=a/b\n",
        "20 mtime=12.3456789\n13 mtime=-1\n",
        "12 size=999\n",
        "30 SCHILY.xattr.user.name=value\n",
        "36 SCHILY.xattr.trusted.overlay.x=y\n",
        "28 GNU.sparse.map=0,512,1024\n",
        "9999999999 path=a\n",
        "5 a\n",
        "11 path=\0a\n",
        "\0\0\0",
    ])
}

fn sparse(bytes: &[u8], reach: &mut Reach) {
    let (gnu, pax) = image::sparse_map(bytes);
    reach.add("gnu", gnu.into());
    reach.add("pax", pax.into());
    reach.add("refused", (!gnu && !pax).into());
}

/// A line of an extended header, which begins with its own length.
fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let digits = if rest.len() + 2 < 100 { 2 } else { 3 };
    format!("{}{rest}", rest.len() + digits).into_bytes()
}

fn sparse_seeds() -> Vec<Vec<u8>> {
    let mut old = entry(EntryType::GNUSparse, "s", "", b"");
    let mut put = |at: usize, text: &[u8]| old[at..at + text.len()].copy_from_slice(text);
    put(386, b"00000000000\0");
    put(398, b"00000001000\0");
    put(483, b"00000010000\0");
    let mut chained = old.clone();
    chained[482] = 1;
    let chained = [&chained[..], &[0; 512]].concat();
    let map = record("GNU.sparse.map", "0,512,1024,1");
    let size = record("GNU.sparse.size", "4096");
    let inside = [&size[..], &record("GNU.sparse.map", "0,512,1024,512")].concat();
    let before = [&size[..], &record("GNU.sparse.major", "1")].concat();
    let mut records = b"2\n0\n512\n1024\n512\n".to_vec();
    records.resize(512, 0);
    let mut endless = b"99999999999\n".to_vec();
    endless.resize(1024, b'1');
    // The map begins where the header ends: at the first zero, which is in the record's number then.
    let pair = |head: &[u8], tail: &[u8]| [head, &[0], tail].concat();
    vec![old, chained, map, inside, pair(&before, &records), pair(&before, &endless), vec![]]
}

fn found(reach: &mut Reach, (found, unpacked): (bool, bool)) {
    reach.add("found", found.into());
    reach.add("unpacked", unpacked.into());
    reach.add("refused", (!found).into());
}

fn archive(bytes: &[u8], reach: &mut Reach) {
    found(reach, image::archive(bytes));
}

/// Media types as registries spell them.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn descriptor(bytes: &[u8], media_type: &str) -> Value {
    json!({ "mediaType": media_type, "digest": image::digest(bytes), "size": bytes.len() })
}

fn path(bytes: &[u8]) -> String {
    format!("blobs/{}", image::digest(bytes).replace(':', "/"))
}

fn config_of(layer: &[u8]) -> Vec<u8> {
    let config = json!({
        "os": "linux", "architecture": "amd64",
        "config": { "Cmd": ["sh"], "Env": ["A=b"], "ExposedPorts": { "80/tcp": {} }, "Labels": null },
        "rootfs": { "type": "layers", "diff_ids": [image::digest(layer)] },
    });
    config.to_string().into_bytes()
}

fn manifest_of(config: &[u8], layer: &[u8]) -> Vec<u8> {
    let layers = [descriptor(layer, LAYER)];
    let manifest = json!({ "schemaVersion": 2, "config": descriptor(config, CONFIG), "layers": layers });
    manifest.to_string().into_bytes()
}

fn index_of(manifest: &[u8]) -> Vec<u8> {
    let manifests = [descriptor(manifest, MANIFEST)];
    json!({ "schemaVersion": 2, "manifests": manifests }).to_string().into_bytes()
}

fn archive_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<_> =
        files.iter().map(|(path, bytes)| entry(EntryType::Regular, path, "", bytes)).collect();
    ended(&entries)
}

fn archive_seeds() -> Vec<Vec<u8>> {
    let layer = honest_layer();
    let config = config_of(&layer);
    let manifest = manifest_of(&config, &layer);
    let index = ("index.json".to_owned(), index_of(&manifest));
    let blob = |bytes: &Vec<u8>| (path(bytes), bytes.clone());
    let oci = archive_of(&[index.clone(), blob(&manifest), blob(&config), blob(&layer)]);
    let name = format!("{}.json", image::digest(&config).trim_start_matches("sha256:"));
    let list = json!([{ "Config": name, "RepoTags": ["a:b"], "Layers": ["l/layer.tar"] }]);
    let list = ("manifest.json".to_owned(), list.to_string().into_bytes());
    let docker = [list.clone(), (name, config.clone()), ("l/layer.tar".to_owned(), layer)];
    let linked = [
        archive_of(&[list])[..1024].to_vec(),
        entry(EntryType::Symlink, "l/layer.tar", "../l/layer.tar", b""),
    ];
    vec![
        oci,
        archive_of(&docker),
        archive_of(&[index, blob(&manifest)]),
        ended(&linked),
        ended(&[]),
        vec![0x1f, 0x8b],
    ]
}

/// A layout whose files are these, the manifest under the digest that the index says.
fn layout(reach: &mut Reach, index: &[u8], manifest: &[u8], config: &[u8], layer: &[u8]) {
    let paths = [manifest, config, layer].map(path);
    let blobs = paths.iter().map(String::as_str).zip([manifest, config, layer]);
    let files: Vec<_> = std::iter::once(("index.json", index)).chain(blobs).collect();
    found(reach, image::layout(&files));
}

fn index(bytes: &[u8], reach: &mut Reach) {
    let layer = honest_layer();
    let config = config_of(&layer);
    layout(reach, bytes, &manifest_of(&config, &layer), &config, &layer);
}

fn index_seeds() -> Vec<Vec<u8>> {
    let layer = honest_layer();
    let manifest = manifest_of(&config_of(&layer), &layer);
    let mut two = descriptor(&manifest, MANIFEST);
    two["platform"] = json!({ "os": "linux", "architecture": "arm64", "variant": "v8" });
    let mut named = descriptor(&manifest, MANIFEST);
    named["annotations"] = json!({ "org.opencontainers.image.ref.name": "x" });
    named["platform"] = json!({ "os": "linux", "architecture": "amd64" });
    let both = json!({ "manifests": [two, named] }).to_string().into_bytes();
    let mut all = vec![index_of(&manifest), both];
    all.extend(texts(&[
        "{}",
        r#"{"manifests":[]}"#,
        r#"{"manifests":[{"digest":"sha256:../../x","size":1}]}"#,
        "[[[",
    ]));
    all
}

fn manifest(bytes: &[u8], reach: &mut Reach) {
    let layer = honest_layer();
    layout(reach, &index_of(bytes), bytes, &config_of(&layer), &layer);
}

fn manifest_seeds() -> Vec<Vec<u8>> {
    let layer = honest_layer();
    let config = config_of(&layer);
    let mut without: Value = serde_json::from_slice(&manifest_of(&config, &layer)).expect("ours");
    without["layers"] = json!([]);
    let itself = json!({ "manifests": [descriptor(b"x", MANIFEST)] });
    let mut all = vec![manifest_of(&config, &layer)];
    all.extend([without, itself].map(|value| value.to_string().into_bytes()));
    all.extend(texts(&["{}", r#"{"config":{},"layers":[{}]}"#, "null"]));
    all
}

fn config(bytes: &[u8], reach: &mut Reach) {
    let layer = honest_layer();
    let manifest = manifest_of(bytes, &layer);
    layout(reach, &index_of(&manifest), &manifest, bytes, &layer);
}

fn config_seeds() -> Vec<Vec<u8>> {
    let mut other: Value = serde_json::from_slice(&config_of(&honest_layer())).expect("ours");
    other["architecture"] = json!("arm64");
    let mut all = vec![config_of(&honest_layer()), other.to_string().into_bytes()];
    all.extend(texts(&["{}", r#"{"os":"linux","architecture":"amd64","rootfs":{}}"#, ""]));
    all
}

/// Four bytes a node: what it is, where it hangs, its name, its size.
fn erofs(bytes: &[u8], reach: &mut Reach) {
    let meta = |mode: u8| {
        let mut meta = Meta::implied_directory();
        meta.mode = 0o600 | u16::from(mode & 0o77);
        meta.mtime = Mtime { seconds: i64::from(mode) << 30, nanoseconds: u32::from(mode) };
        let _ = mode & 1 != 0 && meta.xattrs.set(b"user.x", &[mode; 9]);
        meta
    };
    let file = || tempfile::tempfile().expect("a file");
    let (mut tree, mut writer) = (Tree::new(meta(0)), Writer::new(file(), file()));
    let mut directories = vec![Tree::ROOT];
    for word in bytes.chunks_exact(4).take(500) {
        let (what, size) = (word[0], usize::from(word[3]) << (word[0] >> 5));
        let kind = match what % 7 {
            0 | 1 => {
                let body = vec![what; size];
                Kind::File(writer.append(&mut body.as_slice(), size as u64).expect("it is all there"))
            }
            2 => Kind::Symlink(vec![b's'; size.clamp(1, 4000)].into()),
            3 => Kind::CharDevice { major: size as u32, minor: u32::from(what) << 12 },
            4 => Kind::Fifo,
            5 => {
                let end = size as u64 + 10_000;
                let part = end - size as u64..end;
                let body = vec![what; size];
                let content = writer.append_sparse(&mut body.as_slice(), end, std::slice::from_ref(&part));
                Kind::File(content.unwrap_or(Content::EMPTY))
            }
            _ => Kind::Directory(Default::default()),
        };
        let parent = directories[usize::from(word[1]) % directories.len()];
        let is_directory = matches!(kind, Kind::Directory(_));
        let node = tree.add(Node { meta: meta(what), kind }).expect("they are few");
        hang(&mut tree, parent, node, word[2]);
        if is_directory {
            directories.push(node);
        }
    }
    let written = writer.finish(&tree, [9; 16]).expect("such a tree can be written");
    let bytes = written.file.metadata().expect("its length").len();
    assert_eq!(bytes, u64::from(written.superblock.blocks) * BLOCK_SIZE);
    let mut first = [0; BLOCK_SIZE as usize];
    std::os::unix::fs::FileExt::read_exact_at(&written.file, &mut first, 0).expect("a block");
    let decoded = mvm_runtime::erofs::Superblock::decode(&first).map(|it| (it.blocks, it.inodes));
    assert_eq!(decoded, Some((written.superblock.blocks, written.superblock.inodes)));
    reach.add("written", 1);
    reach.add("inodes", written.superblock.inodes);
}

/// Names a node, one of the same name going.
fn hang(tree: &mut Tree, parent: NodeId, node: NodeId, name: u8) {
    let name = vec![b'a' + name % 26; 1 + usize::from(name) % 250].into_boxed_slice();
    if let Some(names) = tree[parent].children_mut() {
        names.insert(name, Dirent { node, layer: 0 });
    }
}

fn erofs_seeds() -> Vec<Vec<u8>> {
    let all_kinds: Vec<u8> = (0..70).flat_map(|n| [n, n / 7, n * 3, n]).collect();
    let large: Vec<u8> = (0..20).flat_map(|n| [0xe0, 0, n, 255]).collect();
    let deep: Vec<u8> = (0..120).flat_map(|n| [6, n, n, 0]).collect();
    vec![vec![], all_kinds, large, deep]
}
