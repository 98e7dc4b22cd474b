//! Images from registries (OCI distribution specification).
//!
//! What a registry sends is written into an image layout of ours, bounded by the sizes its documents announce, and
//! then taken in like any other layout: nothing is trusted but digests. A registry is spoken to by TLS, except on this
//! host's loopback address if that is asked for.

mod credentials;
mod fetch;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_client::Reference;
use oci_client::client::{Certificate, CertificateEncoding, Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;

pub use self::credentials::Credentials;
use self::fetch::Fetch;
use super::error::{Error, Result};
use super::name::full_name;
use super::progress::Progress;
use super::source::Source;
use super::store::{Rootfs, Store};

/// Longest wait for a connection.
const CONNECT_TIME: Duration = Duration::from_secs(20);
/// Longest silence of a registry that is sending.
const READ_TIME: Duration = Duration::from_secs(60);

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
    let auth = match &pull.credentials {
        Some(given) => Some(given.clone()),
        None => credentials::of_user(reference.resolve_registry())?,
    };
    let auth = auth.map_or(RegistryAuth::Anonymous, |it| RegistryAuth::Basic(it.username, it.password));
    let client = client(pull, reference.resolve_registry()).map_err(|error| error.of_image(&name))?;
    let directory = store.scratch()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let runtime = runtime.map_err(|source| Error::Read { what: "the network".to_owned(), source })?;
    let fetch = Fetch::new(client, reference, auth, directory.path())?;
    let layers = runtime.block_on(fetch.documents(&name)).map_err(|error| error.of_image(&name))?;
    // The layers' places are there, and empty: what they would become is known by then.
    let open = || Ok::<_, Error>(Source::open(directory.path())?.pulled(&name));
    if !store.has(&open()?.key()?) {
        runtime.block_on(fetch.layers(&layers, progress)).map_err(|error| error.of_image(&name))?;
    }
    store.rootfs(&open()?, progress)
}

fn client(pull: &Pull, registry: &str) -> Result<Client> {
    // Another part of the program may have chosen one already; any will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certificates = pull.ca_file.as_deref().map(certificate).transpose()?;
    Client::try_from(ClientConfig {
        protocol: protocol(registry, pull.insecure_http)?,
        extra_root_certificates: certificates.into_iter().collect(),
        connect_timeout: Some(CONNECT_TIME),
        read_timeout: Some(READ_TIME),
        user_agent: concat!("mvm/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    })
    .map_err(registry_error)
}

/// Without TLS anyone on the way could take part: nobody is on the way to this host.
fn protocol(registry: &str, insecure_http: bool) -> Result<ClientProtocol> {
    if !insecure_http {
        return Ok(ClientProtocol::Https);
    }
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    if host == "localhost" || address.is_ok_and(|address| address.is_loopback()) {
        return Ok(ClientProtocol::Http);
    }
    Err(Error::Insecure { registry: registry.to_owned() })
}

fn certificate(path: &Path) -> Result<Certificate> {
    let data = std::fs::read(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
    Ok(Certificate { encoding: CertificateEncoding::Pem, data })
}

fn registry_error(error: OciDistributionError) -> Error {
    match error {
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            Error::Unauthorized
        }
        other => Error::Registry(Box::new(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_spoken_to_without_tls() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3", "[::1]:5000"] {
            assert!(matches!(protocol(host, true), Ok(ClientProtocol::Http)), "{host}");
            assert!(matches!(protocol(host, false), Ok(ClientProtocol::Https)), "{host}");
        }
        for host in ["localhost.example.com", "10.0.0.1:5000", "example.com", "127.0.0.1.example.com:80"] {
            assert!(matches!(protocol(host, true), Err(Error::Insecure { .. })), "{host}");
        }
    }
}
