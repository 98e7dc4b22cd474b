//! A registry, spoken to over HTTP (OCI distribution specification). Each of its answers is read within a bound of
//! its own, and nobody is spoken to without TLS but this host.

use std::cell::RefCell;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use oci_spec::distribution::Reference;
use reqwest::header::{ACCEPT, AUTHORIZATION, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, Response, StatusCode, Url, redirect};
use serde::Deserialize;

use super::credentials::Credentials;
use crate::image::digest::Digest;
use crate::image::error::{Error, Result, printable};
use crate::image::limits::MAX_JSON_BYTES;

/// Longest wait for a connection.
const CONNECT_TIME: Duration = Duration::from_secs(20);
/// Longest silence of a registry that is sending.
const READ_TIME: Duration = Duration::from_secs(60);
/// Longest time for a document, from asking for it to its last byte.
const DOCUMENT_TIME: Duration = Duration::from_secs(300);
/// Longest answer about a token, in bytes.
const MAX_TOKEN_BYTES: u64 = 256 << 10;
/// Most that is read of a refusal, in bytes.
const MAX_REFUSAL_BYTES: u64 = 16 << 10;
/// How often one answer may send us elsewhere.
const MAX_REDIRECTS: usize = 5;
/// What a manifest or index may be.
const DOCUMENTS: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";
const ANYTHING: &str = "*/*";

/// One repository of a registry.
pub(super) struct Registry {
    http: Client,
    /// Whether this host may be spoken to without TLS.
    plain: bool,
    /// URL of the repository.
    base: String,
    /// What is asked for when a token is.
    scope: String,
    credentials: Option<Credentials>,
    /// What the registry wants to see with each request.
    authorization: RefCell<Option<String>>,
}

impl Registry {
    /// The repository of an image.
    ///
    /// # Errors
    /// It is not on this host and TLS is not to be spoken; or the authority's certificates cannot be read.
    pub(super) fn new(
        image: &Reference,
        credentials: Option<Credentials>,
        plain: bool,
        ca_file: Option<&Path>,
    ) -> Result<Self> {
        // Another part of the program may have chosen one already; any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (host, repository) = (image.resolve_registry(), image.repository());
        let scheme = if plain { "http" } else { "https" };
        let base = format!("{scheme}://{host}/v2/{repository}");
        if !Url::parse(&base).is_ok_and(|url| may_visit(&url, plain)) {
            return Err(Error::Insecure { registry: host.to_owned() });
        }
        let mut client = Client::builder()
            .connect_timeout(CONNECT_TIME)
            .read_timeout(READ_TIME)
            .user_agent(concat!("mvm/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::custom(move |attempt| {
                if attempt.previous().len() > MAX_REDIRECTS {
                    attempt.error("it sends us elsewhere again and again")
                } else if may_visit(attempt.url(), plain) {
                    attempt.follow()
                } else {
                    attempt.error("it sends us to where TLS is not spoken")
                }
            }));
        if let Some(path) = ca_file {
            let open = |source| Error::Open { path: path.to_owned(), source };
            let authorities = Certificate::from_pem_bundle(&std::fs::read(path).map_err(open)?);
            for authority in authorities.map_err(network)? {
                client = client.add_root_certificate(authority);
            }
        }
        Ok(Self {
            http: client.build().map_err(network)?,
            plain,
            base,
            scope: format!("repository:{repository}:pull"),
            credentials,
            authorization: RefCell::default(),
        })
    }

    /// A manifest or index by tag or digest: its bytes, which nobody has compared with a digest yet.
    pub(super) async fn document(&self, name: &str) -> Result<Vec<u8>> {
        let url = format!("{}/manifests/{name}", self.base);
        let response = self.get(&url, DOCUMENTS, Some(DOCUMENT_TIME)).await?;
        body(response, "bytes of an index or a manifest", MAX_JSON_BYTES).await
    }

    /// A blob, still to be read.
    pub(super) async fn blob(&self, digest: &Digest) -> Result<Response> {
        self.get(&format!("{}/blobs/{digest}", self.base), ANYTHING, None).await
    }

    /// Asks for something, and again with what the registry wants to see if it does.
    async fn get(&self, url: &str, accept: &str, time: Option<Duration>) -> Result<Response> {
        let mut response = self.ask(url, accept, time).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let authorization = self.authorize(&response).await?;
            self.authorization.replace(Some(authorization));
            response = self.ask(url, accept, time).await?;
        }
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }

    async fn ask(&self, url: &str, accept: &str, time: Option<Duration>) -> Result<Response> {
        let mut request = self.http.get(url).header(ACCEPT, accept);
        if let Some(time) = time {
            request = request.timeout(time);
        }
        if let Some(authorization) = &*self.authorization.borrow() {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(network)
    }

    /// What answers the registry's question who asks.
    async fn authorize(&self, refused: &Response) -> Result<String> {
        let challenges = refused.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|it| it.to_str().ok());
        let mut basic = None;
        for text in challenges {
            for challenge in http_auth::parse_challenges(text).map_err(|_| Error::Unauthorized)? {
                let value = |name: &str| {
                    let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.map(|(_, value)| value.to_unescaped())
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = value("realm")
                {
                    return self.token(&realm, value("service")).await;
                }
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    basic = self.basic();
                }
            }
        }
        basic.ok_or(Error::Unauthorized)
    }

    fn basic(&self) -> Option<String> {
        let Credentials { username, password } = self.credentials.as_ref()?;
        Some(format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}"))))
    }

    /// A token from where the registry says that it is given.
    async fn token(&self, realm: &str, service: Option<String>) -> Result<String> {
        let mut url = Url::parse(realm).map_err(|_| Error::Unauthorized)?;
        if !may_visit(&url, self.plain) {
            return Err(Error::Insecure { registry: url.host_str().unwrap_or_default().to_owned() });
        }
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        url.query_pairs_mut().append_pair("scope", &self.scope);
        let mut request = self.http.get(url).timeout(DOCUMENT_TIME);
        if let Some(basic) = self.basic() {
            request = request.header(AUTHORIZATION, basic);
        }
        let response = request.send().await.map_err(network)?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let answer = body(response, "bytes of a registry's token", MAX_TOKEN_BYTES).await?;
        let answer: Token = serde_json::from_slice(&answer).map_err(|_| Error::Unauthorized)?;
        let token = answer.token.or(answer.access_token).ok_or(Error::Unauthorized)?;
        Ok(format!("Bearer {token}"))
    }
}

/// What is said of a token; registries name it by one or both.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Without TLS anyone on the way could take part: nobody is on the way to this host.
fn may_visit(url: &Url, plain: bool) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    url.scheme() == "https" || (plain && url.scheme() == "http" && here)
}

/// The body of an answer, at most `limit` bytes of it.
async fn body(mut response: Response, what: &'static str, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(network)? {
        if u64::try_from(bytes.len().saturating_add(piece.len())).is_ok_and(|length| length > limit) {
            return Err(Error::Limit { what, limit });
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// What an answer that is no success says.
async fn refusal(response: Response) -> Error {
    let status = response.status();
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return Error::Unauthorized;
    }
    let said = body(response, "bytes of a refusal", MAX_REFUSAL_BYTES).await.unwrap_or_default();
    let said = if said.is_empty() { String::new() } else { format!(": {}", printable(&said)) };
    Error::Registry(format!("the registry answers {status}{said}").into())
}

pub(super) fn network(error: reqwest::Error) -> Error {
    Error::Registry(Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_spoken_to_without_tls() {
        let may = |url: &str, plain| may_visit(&Url::parse(url).unwrap(), plain);
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3", "[::1]:5000"] {
            assert!(may(&format!("http://{host}/v2/"), true), "{host}");
            assert!(!may(&format!("http://{host}/v2/"), false), "{host}");
            assert!(may(&format!("https://{host}/v2/"), false), "{host}");
        }
        for host in ["localhost.example.com", "10.0.0.1:5000", "example.com", "127.0.0.1.example.com:80"] {
            assert!(!may(&format!("http://{host}/v2/"), true), "{host}");
        }
        assert!(!may("file:///etc/passwd", true));
    }
}
