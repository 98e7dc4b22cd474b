//! Archives of `docker save`: `manifest.json` names configurations and layers by path.

use serde::Deserialize;

use super::blobs::Blobs;
use super::digest::Digest;
use super::error::{Error, Result};
use super::oci::{Resolved, configuration, is_printable, missing};
use super::reference::{Choice, Wanted};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// Finds the image `wanted` in an archive.
pub(super) fn resolve(blobs: &Blobs, wanted: Option<&Wanted>, choice: &Choice<'_>) -> Result<Resolved> {
    let images: Vec<Image> = blobs.json("manifest.json")?.ok_or_else(|| missing("manifest.json"))?;
    let mut named = Vec::new();
    for image in &images {
        let id = image.id().map(|digest| digest.to_string()).unwrap_or_default();
        match image.tags().as_slice() {
            [] => named.push((None, id)),
            tags => named.extend(tags.iter().map(|tag| (Some((*tag).to_owned()), id.clone()))),
        }
    }
    let fits = |image: &Image| {
        let id = image.id().map(|digest| digest.to_string()).unwrap_or_default();
        wanted.is_none_or(|wanted| wanted.fits(&image.tags(), &id))
    };
    let chosen = choice.only(images.into_iter().filter(fits).collect(), &named)?;
    // The configuration's name is its digest: without it nothing would vouch for the layers.
    let digest = chosen.id().ok_or_else(|| Error::Malformed {
        what: "manifest.json".to_owned(),
        reason: format!("configuration {:?} is not named by its digest", chosen.config),
    })?;
    let stored = chosen.layers.iter().flatten().map(|path| {
        let blob = blobs.open(path)?;
        Ok((blob.ok_or_else(|| missing(&format!("layer {path:?}")))?, None))
    });
    let stored: Vec<_> = stored.collect();
    let (config, layers) = configuration(blobs, &chosen.config, &digest, stored.into_iter())?;
    let name = chosen.tags().first().map(|tag| (*tag).to_owned());
    Ok(Resolved { name, digest: None, config, layers })
}

impl Image {
    fn tags(&self) -> Vec<&str> {
        self.repo_tags.iter().flatten().map(String::as_str).filter(|tag| is_printable(tag)).collect()
    }

    /// The image's id: `<hex>.json`, or a path of an image layout.
    fn id(&self) -> Option<Digest> {
        let name = self.config.rsplit('/').next()?;
        Digest::sha256(name.strip_suffix(".json").unwrap_or(name))
    }
}
