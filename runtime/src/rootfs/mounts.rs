//! A snapshotter's mounts, understood instead of mounted.
//!
//! All but the last mount of a list are there for the last one to refer to, by templates such as `{{ mount 0 }}/upper`
//! and `{{ overlay 1 3 }}` (containerd 2.2 and later, types that begin with `format/`, `mkdir/` or `mkfs/`).

use std::path::{Path, PathBuf};

use super::template::{Piece, pieces};
use crate::failure::{Context, Failure};
use crate::sandbox::RootfsMount;

/// The file that a snapshot of the EROFS snapshotter has beside its directory.
const LAYER_IMAGE: &str = "layer.erofs";
/// How snapshotters call the directory of a snapshot inside the directory that goes away with it.
const SNAPSHOT_FS: &str = "fs";

/// What a root is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// Read-only layers, the topmost first.
    pub(super) layers: Vec<Layer>,
    /// Where writes belong.
    pub(super) writes: Writes,
}

/// One read-only layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// Directory of a committed snapshot: it does not change any more.
    Committed(PathBuf),
    /// Directory of an overlay that may have changed since it was last seen.
    Changing(PathBuf),
    /// A root directory.
    Root(PathBuf),
    /// An EROFS image, and the directory it is mounted at if there is one.
    Image(PathBuf, Option<PathBuf>),
    /// An ext4 image or device.
    Ext4(PathBuf),
}

/// Where writes belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Writes {
    /// Nowhere: this is a view.
    View,
    /// Onto a disk of ours at this path.
    Beside(PathBuf),
    /// Onto a disk of ours that belongs to this directory but cannot lie beside it.
    For(PathBuf),
    /// Onto the snapshotter's ext4 disk, made with a size in bytes if it is not there yet.
    Disk(PathBuf, Option<u64>),
    /// The snapshotter's ext4 disk is all of the root.
    Whole(PathBuf),
}

/// Something that a later mount refers to.
enum Active {
    Images(Vec<Layer>),
    Ext4 { path: PathBuf, make: Option<u64>, read_only: bool },
}

/// Understands a list of mounts.
pub(super) fn understand(mounts: &[RootfsMount]) -> Result<Parts, Failure> {
    let Some((last, others)) = mounts.split_last() else {
        return Err(Failure::new("there are no mounts"));
    };
    let mut active: Vec<Active> = Vec::new();
    for mount in others {
        let made = self::active(mount).context(|| describe(mount))?;
        active.push(made);
    }
    root(last, &active).context(|| describe(last))
}

fn describe(mount: &RootfsMount) -> String {
    format!("cannot use the mount of {} {}", mount.kind, mount.source)
}

/// The file system's type without what containerd is to do before it is mounted.
fn kind(mount: &RootfsMount) -> &str {
    let mut kind = mount.kind.as_str();
    while let Some(rest) = ["format/", "mkdir/", "mkfs/"].iter().find_map(|prefix| kind.strip_prefix(prefix))
    {
        kind = rest;
    }
    kind
}

fn active(mount: &RootfsMount) -> Result<Active, Failure> {
    match kind(mount) {
        "erofs" => Ok(Active::Images(images(mount)?)),
        "ext4" => {
            let size = value(mount, "X-containerd.mkfs.size=");
            let size = size.map(|size| size.parse().context(|| format!("cannot read the size {size}")));
            let (path, read_only) = (absolute(&mount.source)?, has(mount, "ro"));
            Ok(Active::Ext4 { path, make: size.transpose()?, read_only })
        }
        _ => Err(Failure::new("of this type there can be only the last mount of a root")),
    }
}

fn root(mount: &RootfsMount, active: &[Active]) -> Result<Parts, Failure> {
    if !mount.target.is_empty() && mount.target != "/" {
        return Err(Failure::new(format!("it is mounted at {}, not at the root", mount.target)));
    }
    match kind(mount) {
        "overlay" => overlay(mount, active),
        "erofs" => Ok(Parts { layers: images(mount)?, writes: Writes::View }),
        "ext4" => {
            let path = absolute(&mount.source)?;
            Ok(match has(mount, "ro") {
                true => Parts { layers: vec![Layer::Ext4(path)], writes: Writes::View },
                false => Parts { layers: Vec::new(), writes: Writes::Whole(path) },
            })
        }
        "bind" => bind(mount, active),
        _ if has(mount, "bind") || has(mount, "rbind") => bind(mount, active),
        other => Err(Failure::new(format!("no machine can use a file system of type {other}"))
            .help("use the overlayfs, native, blockfile, devmapper or erofs snapshotter")),
    }
}

fn bind(mount: &RootfsMount, active: &[Active]) -> Result<Parts, Failure> {
    let mut source = pieces(&mount.source)?;
    let read_only = has(mount, "ro");
    match (source.pop(), source.is_empty()) {
        (Some(Piece::Path(path)), true) if read_only => {
            // Only of a snapshot it is sure that nothing changes it.
            let layer = if is_snapshot(&path) { committed(path) } else { Layer::Root(path) };
            Ok(Parts { layers: vec![layer], writes: Writes::View })
        }
        (Some(Piece::Path(path)), true) => {
            let writes = match path.file_name() == Some(SNAPSHOT_FS.as_ref()) {
                true => Writes::Beside(upper_disk(&path)?),
                false => Writes::For(path.clone()),
            };
            Ok(Parts { layers: vec![Layer::Root(path)], writes })
        }
        (Some(Piece::Mount { index, below }), true) => match active.get(index) {
            Some(Active::Images(layers)) if below.is_empty() => {
                Ok(Parts { layers: layers.clone(), writes: Writes::View })
            }
            Some(Active::Ext4 { path, make, .. }) if below == "upper" && !read_only => {
                Ok(Parts { layers: Vec::new(), writes: Writes::Disk(path.clone(), *make) })
            }
            _ => Err(unknown(&mount.source)),
        },
        _ => Err(unknown(&mount.source)),
    }
}

fn overlay(mount: &RootfsMount, active: &[Active]) -> Result<Parts, Failure> {
    if has(mount, "userxattr") {
        return Err(Failure::new("its notes are kept for one user's name space (userxattr)"));
    }
    let lower = value(mount, "lowerdir=").ok_or_else(|| Failure::new("it has no lowerdir"))?;
    let mut layers = Vec::new();
    for piece in pieces(lower)? {
        match piece {
            Piece::Path(path) => layers.push(committed(path)),
            Piece::Mount { index, below } if below.is_empty() => layers.extend(of_images(active, index)?),
            Piece::Mount { .. } => return Err(unknown(lower)),
            Piece::Overlay { first, last } => {
                let mut range = (first.min(last)..=first.max(last))
                    .map(|index| of_images(active, index))
                    .collect::<Result<Vec<_>, _>>()?;
                if first > last {
                    range.reverse();
                }
                layers.extend(range.into_iter().flatten());
            }
        }
    }
    let writes = match value(mount, "upperdir=") {
        None => Writes::View,
        Some(upper) => overlay_upper(upper, active, &mut layers)?,
    };
    Ok(Parts { layers, writes })
}

/// Where an overlay's writes go. What its upper directory holds already becomes one more layer.
fn overlay_upper(text: &str, active: &[Active], layers: &mut Vec<Layer>) -> Result<Writes, Failure> {
    let mut upper = pieces(text)?;
    match (upper.pop(), upper.is_empty()) {
        (Some(Piece::Path(path)), true) => {
            let mut entries =
                path.read_dir().context(|| format!("cannot read directory {}", path.display()))?;
            let disk = upper_disk(&path)?;
            if entries.next().is_some() {
                layers.insert(0, Layer::Changing(path));
            }
            Ok(Writes::Beside(disk))
        }
        (Some(Piece::Mount { index, below }), true) if below == "upper" => match active.get(index) {
            Some(Active::Ext4 { path, make, read_only: false }) => Ok(Writes::Disk(path.clone(), *make)),
            _ => Err(unknown(text)),
        },
        _ => Err(unknown(text)),
    }
}

fn of_images(active: &[Active], index: usize) -> Result<Vec<Layer>, Failure> {
    match active.get(index) {
        Some(Active::Images(layers)) => Ok(layers.clone()),
        _ => Err(Failure::new(format!("mount {index} is no layer"))),
    }
}

/// The layers of an EROFS mount, the topmost first. One with devices is an index of theirs, each a whole layer,
/// the lowest first.
fn images(mount: &RootfsMount) -> Result<Vec<Layer>, Failure> {
    let devices = mount.options.iter().filter_map(|option| option.strip_prefix("device="));
    let mut layers = devices.map(image).collect::<Result<Vec<_>, _>>()?;
    layers.reverse();
    if layers.is_empty() {
        layers.push(image(&mount.source)?);
    }
    Ok(layers)
}

fn image(path: &str) -> Result<Layer, Failure> {
    Ok(Layer::Image(absolute(path)?, None))
}

/// A committed directory, or the image it is the mount of.
fn committed(path: PathBuf) -> Layer {
    let image = path.parent().map(|parent| parent.join(LAYER_IMAGE));
    match image.filter(|image| path.file_name() == Some(SNAPSHOT_FS.as_ref()) && image.is_file()) {
        Some(image) => Layer::Image(image, Some(path)),
        None => Layer::Committed(path),
    }
}

/// Whether a directory is where snapshotters keep a snapshot: `snapshots/7` or `snapshots/7/fs`.
fn is_snapshot(path: &Path) -> bool {
    let directory = if path.file_name() == Some(SNAPSHOT_FS.as_ref()) { path.parent() } else { Some(path) };
    let is_number = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    directory.is_some_and(|directory| {
        let parent = directory.parent().and_then(Path::file_name);
        let name = directory.file_name().and_then(|name| name.to_str());
        parent == Some("snapshots".as_ref()) && name.is_some_and(is_number)
    })
}

/// The disk of writes beside a snapshot's directory: `mvm-upper-fs.ext4`.
///
/// # Errors
/// There is nothing beside it: it is the root.
pub fn upper_disk(directory: &Path) -> Result<PathBuf, Failure> {
    let place = directory.parent().zip(directory.file_name());
    let (parent, name) =
        place.ok_or_else(|| Failure::new("the root directory cannot take a container's writes"))?;
    Ok(parent.join(format!("mvm-upper-{}.ext4", name.to_string_lossy())))
}

fn absolute(path: &str) -> Result<PathBuf, Failure> {
    let path = Path::new(path);
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    Err(Failure::new(format!("{} is not an absolute path", path.display())))
}

fn has(mount: &RootfsMount, option: &str) -> bool {
    mount.options.iter().any(|it| it == option)
}

fn value<'a>(mount: &'a RootfsMount, prefix: &str) -> Option<&'a str> {
    mount.options.iter().find_map(|option| option.strip_prefix(prefix))
}

fn unknown(text: &str) -> Failure {
    Failure::new(format!("{text} is not understood"))
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
