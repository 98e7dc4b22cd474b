//! Layers become disks: images as they are, directories as cached images, too many as one.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use mvm_protocol::{DiskFilesystem, Lower};

use super::Request;
use super::mounts::Layer;
use super::serial::Serials;
use crate::failure::{Context, Failure};
use crate::image::{Keep, Progress, Rootfs, Source, Stability, Store};
use crate::machine::Disk;

/// Most bytes of cached layers on the host, unless the cache is pruned for less: the least recently used go first.
pub const CACHE_BYTES: u64 = 20 << 30;
/// Most disks for layers that cannot be merged because they exist as images only.
const IMAGE_DISKS: usize = 20;

/// Where images of layers are kept below the state directory, for all machines.
pub fn cache(state: &Path) -> Result<Store, Failure> {
    let path = state.join("layers");
    Store::open(&path)
        .context(|| format!("cannot use {} for layers", path.display()))
        .map_err(|failure| failure.help("run as root, or name another directory in MVM_STATE"))
}

/// Layers as disks.
pub(super) struct Laid {
    pub(super) disks: Vec<Disk>,
    pub(super) lower: Vec<Lower>,
    /// Images from a cache; they stay as long as these do.
    pub(super) held: Vec<Rootfs>,
}

/// Makes disks of layers.
pub(super) fn lay(
    layers: Vec<Layer>,
    request: &Request<'_>,
    state: &Path,
    serials: &mut Serials,
    progress: &mut dyn Progress,
) -> Result<Laid, Failure> {
    let layers = merge(layers, request.layer_disks)?;
    let mut builder = Builder { shared: None, own: None, state, directory: request.directory, built: false };
    let mut laid = Laid { disks: Vec::new(), lower: Vec::new(), held: Vec::new() };
    for layer in layers {
        let (path, filesystem) = match layer {
            Merged::One(Layer::Image(path, _)) => (path, DiskFilesystem::Erofs),
            Merged::One(Layer::Ext4(path)) => (path, DiskFilesystem::Ext4),
            other => {
                let image = builder.image(other, progress)?;
                let path = image.path.clone();
                laid.held.push(image);
                (path, DiskFilesystem::Erofs)
            }
        };
        check(&path)?;
        let serial = serials.next();
        laid.disks.push(Disk { path, read_only: true, serial: serial.clone(), throwaway: false });
        laid.lower.push(Lower::Disk { serial, filesystem });
    }
    builder.finish();
    Ok(laid)
}

/// A layer, or committed ones that become one image.
#[derive(Debug, PartialEq, Eq)]
enum Merged {
    One(Layer),
    /// The topmost first.
    Directories(Vec<PathBuf>),
}

/// Merges the committed layers if there are more layers than disks for them.
fn merge(layers: Vec<Layer>, disks: usize) -> Result<Vec<Merged>, Failure> {
    if layers.len() <= disks.max(1) {
        return Ok(layers.into_iter().map(Merged::One).collect());
    }
    let count = layers.len();
    let directory = |layer: &Layer| match layer {
        Layer::Committed(path) | Layer::Image(_, Some(path)) => Some(path.clone()),
        _ => None,
    };
    // The one that can still change lies on top of those that cannot.
    let fixed = layers.iter().position(|layer| directory(layer).is_some()).unwrap_or(count);
    let (top, below) = layers.split_at(fixed);
    if let Some(directories) =
        below.iter().map(directory).collect::<Option<Vec<_>>>().filter(|it| !it.is_empty())
    {
        let top = top.iter().cloned().map(Merged::One);
        return Ok(top.chain([Merged::Directories(directories)]).collect());
    }
    if count <= IMAGE_DISKS {
        return Ok(layers.into_iter().map(Merged::One).collect());
    }
    Err(Failure::new(format!("the root has {count} layers as images, a machine takes {IMAGE_DISKS}"))
        .help("use the overlayfs snapshotter, whose layers can be merged"))
}

/// Builds images of directories, or finds them.
struct Builder<'a> {
    shared: Option<Store>,
    /// For what is this container's alone.
    own: Option<Store>,
    state: &'a Path,
    directory: &'a Path,
    built: bool,
}

impl Builder<'_> {
    fn image(&mut self, layer: Merged, progress: &mut dyn Progress) -> Result<Rootfs, Failure> {
        let (source, path) = match layer {
            Merged::Directories(paths) => {
                let path = paths.first().cloned().unwrap_or_default();
                (Source::overlay(paths, Stability::Committed), path)
            }
            Merged::One(Layer::Committed(path)) => (Source::layer(path.clone(), Stability::Committed), path),
            Merged::One(Layer::Changing(path)) => (Source::layer(path.clone(), Stability::Changing), path),
            // Images are used as they are and never come here.
            Merged::One(Layer::Root(path) | Layer::Image(path, _) | Layer::Ext4(path)) => {
                (Source::directory(path.clone()), path)
            }
        };
        let what = || format!("cannot make an image of {}", path.display());
        let source = source.context(what)?;
        let shared = source.stability() == Some(Stability::Committed);
        let store = if shared { self.shared()? } else { self.own()? };
        let image = store.rootfs(&source, progress).context(what)?;
        self.built |= shared && image.built;
        Ok(image)
    }

    fn shared(&mut self) -> Result<&Store, Failure> {
        let store = self.shared.take().map_or_else(|| cache(self.state), Ok)?;
        Ok(self.shared.insert(store))
    }

    fn own(&mut self) -> Result<&Store, Failure> {
        let path = self.directory.join("layers");
        let open = || Store::open(&path).context(|| format!("cannot use {} for layers", path.display()));
        let store = self.own.take().map_or_else(open, Ok)?;
        Ok(self.own.insert(store))
    }

    /// Makes room for what came in.
    fn finish(self) {
        let keep = Keep { bytes: Some(CACHE_BYTES), only_with_origin: true, ..Keep::default() };
        if let Some(Err(error)) = self.shared.filter(|_| self.built).map(|store| store.prune(&keep)) {
            log::warn!("cannot make room in the cache of layers: {error}");
        }
    }
}

/// An empty directory of the container's own, for a root of which everything is to be written.
pub(super) fn empty(directory: &Path) -> Result<Layer, Failure> {
    let path = directory.join("empty");
    let made = DirBuilder::new().recursive(true).mode(0o755).create(&path);
    made.context(|| format!("cannot make directory {}", path.display()))?;
    Ok(Layer::Root(path))
}

/// Only files and block devices are disks.
pub(super) fn check(path: &Path) -> Result<(), Failure> {
    let metadata = fs::metadata(path).context(|| format!("cannot open {}", path.display()))?;
    if metadata.is_file() || metadata.file_type().is_block_device() {
        return Ok(());
    }
    Err(Failure::new(format!("{} is neither a file nor a block device", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed(count: usize) -> Vec<Layer> {
        (0..count).map(|index| Layer::Committed(format!("/s/{index}/fs").into())).collect()
    }

    #[test]
    fn as_many_layers_as_disks_stay_apart() {
        let merged = merge(committed(8), 8).unwrap();
        assert_eq!(merged, committed(8).into_iter().map(Merged::One).collect::<Vec<_>>());
    }

    #[test]
    fn more_layers_become_one_below_the_one_that_changes() {
        let mut layers = committed(100);
        layers.insert(0, Layer::Changing("/s/upper".into()));
        let merged = merge(layers, 8).unwrap();
        let below: Vec<PathBuf> = (0..100).map(|index| format!("/s/{index}/fs").into()).collect();
        assert_eq!(merged, [Merged::One(Layer::Changing("/s/upper".into())), Merged::Directories(below)]);
    }

    #[test]
    fn images_are_merged_by_their_mounts_or_not_at_all() {
        let image = |index: usize, mount: bool| {
            Layer::Image(
                format!("/s/{index}/layer.erofs").into(),
                mount.then(|| format!("/s/{index}/fs").into()),
            )
        };
        let mounted = merge((0..30).map(|index| image(index, true)).collect(), 8).unwrap();
        assert_eq!(mounted.len(), 1);
        assert_eq!(merge((0..20).map(|index| image(index, false)).collect(), 8).unwrap().len(), 20);
        let refused = merge((0..21).map(|index| image(index, false)).collect(), 8).unwrap_err();
        assert_eq!(refused.to_string(), "the root has 21 layers as images, a machine takes 20");
    }
}
