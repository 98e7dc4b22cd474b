//! Mounts as each snapshotter words them.

use std::fs;

use super::*;

fn mount(kind: &str, source: &str, options: &[&str]) -> RootfsMount {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    RootfsMount { kind: kind.to_owned(), source: source.to_owned(), target: String::new(), options }
}

fn committed(path: &str) -> Layer {
    Layer::Committed(path.into())
}

fn image(path: &str) -> Layer {
    Layer::Image(path.into(), None)
}

fn refusal(mounts: &[RootfsMount]) -> String {
    understand(mounts).unwrap_err().report()
}

#[test]
fn an_overlay_has_committed_layers_and_writes_beside_its_upper_directory() {
    let dir = tempfile::tempdir().unwrap();
    let fs = dir.path().join("snapshots/9/fs");
    fs::create_dir_all(&fs).unwrap();
    let upper = format!("upperdir={}", fs.display());
    let options = ["index=off", "workdir=/s/9/work", &upper, "lowerdir=/s/2/fs:/s/1/fs"];
    let mounts = [mount("overlay", "overlay", &options)];
    let beside = Writes::Beside(dir.path().join("snapshots/9/mvm-upper-fs.ext4"));
    let layers = vec![committed("/s/2/fs"), committed("/s/1/fs")];
    assert_eq!(understand(&mounts).unwrap(), Parts { layers: layers.clone(), writes: beside.clone() });

    fs::write(fs.join("written before"), b"").unwrap();
    let layers = [vec![Layer::Changing(fs)], layers].concat();
    assert_eq!(understand(&mounts).unwrap(), Parts { layers, writes: beside });
}

#[test]
fn a_view_is_an_overlay_without_upper_directory_or_a_read_only_bind() {
    let overlay = [mount("overlay", "overlay", &["lowerdir=/s/2/fs:/s/1/fs"])];
    let layers = vec![committed("/s/2/fs"), committed("/s/1/fs")];
    assert_eq!(understand(&overlay).unwrap(), Parts { layers, writes: Writes::View });
    for path in ["/c/snapshots/1/fs", "/native/snapshots/12"] {
        let bind = [mount("bind", path, &["ro", "rbind"])];
        let parts = Parts { layers: vec![committed(path)], writes: Writes::View };
        assert_eq!(understand(&bind).unwrap(), parts);
    }
}

#[test]
fn a_directory_that_is_no_snapshot_may_change_even_if_it_is_bound_read_only() {
    for path in ["/etc/config", "/data/fs", "/snapshots/x", "/snapshots", "/snapshots/1/other"] {
        let bind = [mount("bind", path, &["ro", "rbind"])];
        let parts = Parts { layers: vec![Layer::Root(path.into())], writes: Writes::View };
        assert_eq!(understand(&bind).unwrap(), parts);
    }
}

#[test]
fn a_writable_bind_keeps_its_writes_beside_a_snapshot_or_apart() {
    let overlayfs = [mount("bind", "/s/1/fs", &["rw", "rbind"])];
    assert_eq!(
        understand(&overlayfs).unwrap(),
        Parts {
            layers: vec![Layer::Root("/s/1/fs".into())],
            writes: Writes::Beside("/s/1/mvm-upper-fs.ext4".into())
        }
    );
    let native = [mount("bind", "/native/snapshots/7", &["rbind", "rw"])];
    assert_eq!(
        understand(&native).unwrap(),
        Parts {
            layers: vec![Layer::Root("/native/snapshots/7".into())],
            writes: Writes::For("/native/snapshots/7".into())
        }
    );
}

#[test]
fn a_block_file_is_the_whole_root_and_read_only_a_layer() {
    let rw = [mount("ext4", "/blockfile/3", &["loop", "rw"])];
    let whole = Parts { layers: Vec::new(), writes: Writes::Whole("/blockfile/3".into()) };
    assert_eq!(understand(&rw).unwrap(), whole);
    let mapper = [mount("ext4", "/dev/mapper/pool-snap-3", &["discard"])];
    let writes = Writes::Whole("/dev/mapper/pool-snap-3".into());
    assert_eq!(understand(&mapper).unwrap(), Parts { layers: Vec::new(), writes });
    let ro = [mount("ext4", "/blockfile/3", &["loop", "ro"])];
    let layers = vec![Layer::Ext4("/blockfile/3".into())];
    assert_eq!(understand(&ro).unwrap(), Parts { layers, writes: Writes::View });
}

#[test]
fn an_image_beside_a_lower_directory_is_used_instead_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("4");
    fs::create_dir_all(snapshot.join("fs")).unwrap();
    fs::write(snapshot.join("layer.erofs"), b"").unwrap();
    let fs = snapshot.join("fs");
    let mounts = [mount("overlay", "overlay", &[&format!("lowerdir={}:/s/1/fs", fs.display())])];
    let layers = vec![Layer::Image(snapshot.join("layer.erofs"), Some(fs)), committed("/s/1/fs")];
    assert_eq!(understand(&mounts).unwrap().layers, layers);
}

/// What containerd 2.2 and later send for an image of two layers with a block device for writes.
#[test]
fn templates_name_the_mounts_before_the_overlay() {
    let overlay = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        "lowerdir={{ overlay 1 2 }}",
    ];
    let mounts = [
        mount("ext4", "/e/9/rwlayer.img", &["rw", "loop"]),
        mount("erofs", "/e/2/layer.erofs", &["ro", "loop"]),
        mount("erofs", "/e/1/layer.erofs", &["ro", "loop"]),
        mount("format/mkdir/overlay", "overlay", &overlay),
    ];
    let layers = vec![image("/e/2/layer.erofs"), image("/e/1/layer.erofs")];
    let writes = Writes::Disk("/e/9/rwlayer.img".into(), None);
    assert_eq!(understand(&mounts).unwrap(), Parts { layers: layers.clone(), writes });

    // Where containerd leaves the making of the file system to the runtime.
    let mut made = mounts.clone();
    made[0].kind = "mkfs/ext4".to_owned();
    made[0].options.push("X-containerd.mkfs.size=67108864".to_owned());
    let writes = Writes::Disk("/e/9/rwlayer.img".into(), Some(64 << 20));
    assert_eq!(understand(&made).unwrap(), Parts { layers, writes });

    let mut backwards = mounts.clone();
    backwards[3].options[4] = "lowerdir={{ overlay 2 1 }}".to_owned();
    let layers = vec![image("/e/1/layer.erofs"), image("/e/2/layer.erofs")];
    assert_eq!(understand(&backwards).unwrap().layers, layers);

    let mut beyond = mounts;
    beyond[3].options[4] = "lowerdir={{ overlay 1 3 }}".to_owned();
    assert!(refusal(&beyond).contains("mount 3 is no layer"));
}

#[test]
fn an_index_with_devices_stands_for_the_layers_it_indexes() {
    let mounts = [
        mount(
            "erofs",
            "/e/2/fsmeta.erofs",
            &["ro", "loop", "device=/e/1/layer.erofs", "device=/e/2/layer.erofs"],
        ),
        mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]),
    ];
    let layers = vec![image("/e/2/layer.erofs"), image("/e/1/layer.erofs")];
    assert_eq!(understand(&mounts).unwrap(), Parts { layers, writes: Writes::View });
}

#[test]
fn a_root_without_layers_is_the_upper_directory_of_a_disk() {
    let mounts = [
        mount("ext4", "/e/9/rwlayer.img", &["rw", "loop"]),
        mount(
            "format/mkdir/bind",
            "{{ mount 0 }}/upper",
            &["X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw", "rbind"],
        ),
    ];
    let writes = Writes::Disk("/e/9/rwlayer.img".into(), None);
    assert_eq!(understand(&mounts).unwrap(), Parts { layers: Vec::new(), writes });
}

#[test]
fn what_cannot_be_used_is_named() {
    assert!(refusal(&[]).contains("there are no mounts"));
    let zfs = refusal(&[mount("zfs", "tank/1", &[])]);
    assert!(zfs.contains("cannot use the mount of zfs tank/1") && zfs.contains("of type zfs"), "{zfs}");
    assert!(refusal(&[mount("overlay", "overlay", &[])]).contains("no lowerdir"));
    let user = mount("overlay", "overlay", &["userxattr", "lowerdir=/a"]);
    assert!(refusal(&[user]).contains("userxattr"));
    let relative = mount("overlay", "overlay", &["lowerdir=a:b"]);
    assert!(refusal(&[relative]).contains("neither an absolute path"));
    let below = RootfsMount { target: "/data".into(), ..mount("bind", "/a", &["ro"]) };
    assert!(refusal(&[below]).contains("mounted at /data"));
    let gone = mount("overlay", "overlay", &["lowerdir=/a", "upperdir=/no/such/fs"]);
    assert!(refusal(&[gone]).contains("cannot read directory /no/such/fs"));
    let mounted = [mount("overlay", "overlay", &["lowerdir=/a"]), mount("bind", "{{ mount 0 }}", &[])];
    assert!(refusal(&mounted).contains("only the last mount"));
}
