//! Finding what is in the store by what people call it, and giving names away.

use std::fs::File;

use super::{Cached, Image, Store, read_record, remove_entry};
use crate::image::error::{Error, Result};
use crate::image::name::full_name;

/// What became of a removed name.
#[derive(Clone, Debug)]
pub struct Removed {
    /// What had it.
    pub cached: Cached,
    /// Whether the file system itself is gone; it stays if it has other names.
    pub whole: bool,
}

/// Fewest digits of a key or digest that name something.
const FEWEST_DIGITS: usize = 4;

impl Store {
    /// Removes an image: its name if that is what is given and there are others, else the file system with all its
    /// names. Machines that use it keep it.
    pub fn remove(&self, wanted: &str) -> Result<Removed> {
        let found = self.one(wanted)?;
        let _lock = self.lock(&found.key, &mut ())?;
        let is_meant = |image: &&Image| image.name.as_deref().is_some_and(|name| is_called(name, wanted));
        let (named, others): (Vec<&Image>, Vec<&Image>) = found.images.iter().partition(is_meant);
        let whole = named.is_empty() || others.is_empty();
        if whole {
            remove_entry(self, &found.key)?;
        } else {
            let images = others.into_iter().cloned().collect();
            self.replace_images(&found.key, images)?;
        }
        Ok(Removed { cached: found, whole })
    }

    /// The one thing in the store that is meant: by its name, or its digest or key or the beginning of one.
    pub(super) fn one(&self, wanted: &str) -> Result<Cached> {
        let list = self.list()?;
        let digits = wanted.strip_prefix("sha256:").unwrap_or(wanted);
        let long_enough = digits.len() >= FEWEST_DIGITS;
        let full = full_name(wanted).ok();
        let ways: [&dyn Fn(&Cached) -> bool; 3] = [
            &|cached| any_name(cached, |name| name == wanted || full.as_deref() == Some(name)),
            &|cached| any_name(cached, |name| is_called(name, wanted)),
            &|cached| {
                let digests = cached.images.iter().filter_map(|image| image.digest.as_deref());
                let mut digests = digests.filter_map(|digest| digest.strip_prefix("sha256:"));
                long_enough && (cached.key.starts_with(digits) || digests.any(|it| it.starts_with(digits)))
            },
        ];
        for fits in ways {
            let mut fitting = list.iter().filter(|cached| fits(cached));
            match (fitting.next(), fitting.count()) {
                (Some(only), 0) => return Ok(only.clone()),
                (Some(_), others) => {
                    return Err(Error::Ambiguous { wanted: wanted.to_owned(), count: others + 1 });
                }
                (None, _) => {}
            }
        }
        Err(Error::NotCached { wanted: wanted.to_owned() })
    }

    /// Takes a name from everything but `key`: it has moved there.
    pub(super) fn take_name(&self, name: &str, key: &str) -> Result<()> {
        for cached in self.list()?.into_iter().filter(|cached| cached.key != key) {
            if !any_name(&cached, |other| other == name) {
                continue;
            }
            let _lock = self.lock(&cached.key, &mut ())?;
            let images = cached.images.into_iter().map(|image| match image.name.as_deref() {
                Some(other) if other == name => Image { name: None, ..image },
                _ => image,
            });
            self.replace_images(&cached.key, images.collect())?;
        }
        Ok(())
    }

    /// Changes the names of a file system, whose lock is held; it was not used by that.
    fn replace_images(&self, key: &str, images: Vec<Image>) -> Result<()> {
        let path = self.path(key, "json");
        let used = path.metadata().and_then(|metadata| metadata.modified());
        let mut record = read_record(&path)?;
        record.images = images;
        self.replace_record(key, &record)?;
        let restored = used.and_then(|used| File::options().append(true).open(&path)?.set_modified(used));
        if let Err(error) = restored {
            log::debug!("cannot keep when {} was used: {error}", path.display());
        }
        Ok(())
    }
}

fn any_name(cached: &Cached, fits: impl Fn(&str) -> bool) -> bool {
    cached.images.iter().any(|image| image.name.as_deref().is_some_and(&fits))
}

/// Whether an image of this name is meant.
pub(super) fn is_called(name: &str, wanted: &str) -> bool {
    let same = || Some(full_name(name).ok()? == full_name(wanted).ok()?);
    name == wanted || same().unwrap_or(false)
}
