//! Images from registries (OCI distribution specification).
//!
//! What a registry sends is written into an image layout of ours, bounded by the sizes its documents announce, and
//! then taken in like any other layout: nothing is trusted but digests. A registry is spoken to by TLS, except on this
//! host's loopback address if that is asked for, and each of its answers has a bound.

mod credentials;
mod fetch;
mod registry;

use std::path::PathBuf;

use oci_spec::distribution::Reference;

pub use self::credentials::Credentials;
use self::fetch::Fetch;
use self::registry::Registry;
use super::error::{Error, Result};
use super::name::full_name;
use super::progress::Progress;
use super::source::Source;
use super::store::{Rootfs, Store};

/// What to fetch, and how.
#[derive(Clone, Debug, Default)]
pub struct Pull {
    /// The image's name.
    pub name: String,
    /// Who asks; without it the user's docker configuration is looked into.
    pub credentials: Option<Credentials>,
    /// Speak HTTP without TLS: only with registries on this host.
    pub insecure_http: bool,
    /// Certificates of authorities besides the host's own, PEM.
    pub ca_file: Option<PathBuf>,
}

/// Fetches an image into a store, under its name. If the store has all its layers, they are not fetched.
///
/// # Errors
/// The name or the registry's answer is not understood, the registry refuses, or what it sends is not what its digests
/// say.
pub fn pull(store: &Store, pull: &Pull, progress: &mut dyn Progress) -> Result<Rootfs> {
    let name = full_name(&pull.name)?;
    let no_name = |_| Error::Name { name: name.clone(), reason: "no registry is asked like this" };
    let reference: Reference = name.parse().map_err(no_name)?;
    let credentials = match &pull.credentials {
        Some(given) => Some(given.clone()),
        None => credentials::of_user(reference.resolve_registry())?,
    };
    let registry = Registry::new(&reference, credentials, pull.insecure_http, pull.ca_file.as_deref())
        .map_err(|error| error.of_image(&name))?;
    let directory = store.scratch()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let runtime = runtime.map_err(|source| Error::Read { what: "the network".to_owned(), source })?;
    let fetch = Fetch::new(registry, reference, directory.path())?;
    let layers = runtime.block_on(fetch.documents(&name)).map_err(|error| error.of_image(&name))?;
    // The layers' places are there, and empty: what they would become is known by then.
    let open = || Ok::<_, Error>(Source::open(directory.path())?.pulled(&name));
    if !store.has(&open()?.key()?) {
        runtime.block_on(fetch.layers(&layers, progress)).map_err(|error| error.of_image(&name))?;
    }
    store.rootfs(&open()?, progress)
}
