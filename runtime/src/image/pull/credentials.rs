//! Who asks a registry: given, or found as docker keeps it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use crate::image::error::{Error, Result};
use crate::image::limits::MAX_JSON_BYTES;

/// A name and its password or token.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub username: String,
    /// The password.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Passwords do not belong into logs.
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Docker's own registry under the name its users log in with.
const DOCKER_LOGIN: &str = "https://index.docker.io/v1/";
const DOCKER: &str = "index.docker.io";
/// What a credential helper says as the name when the secret is a token for renewal.
const TOKEN: &str = "<token>";

/// `config.json` of docker, as far as it concerns us.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, Auth>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
}

/// What a credential helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// What the user's docker configuration has for a registry: `$DOCKER_CONFIG/config.json`, or that in `~/.docker`.
pub(super) fn of_user(registry: &str) -> Result<Option<Credentials>> {
    let directory = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
    let Some(path) = directory.or_else(home).map(|directory| directory.join("config.json")) else {
        return Ok(None);
    };
    match path.metadata() {
        Ok(metadata) if metadata.len() <= MAX_JSON_BYTES => {}
        Ok(_) => return Err(Error::Limit { what: "bytes of docker's configuration", limit: MAX_JSON_BYTES }),
        Err(_) => return Ok(None),
    }
    let bytes = std::fs::read(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
    let config: Config = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Json { what: path.display().to_string(), source })?;
    config.find(registry)
}

impl Config {
    fn find(&self, registry: &str) -> Result<Option<Credentials>> {
        let mut keys = vec![registry.to_owned(), format!("https://{registry}"), format!("http://{registry}")];
        if registry == DOCKER {
            keys.insert(0, DOCKER_LOGIN.to_owned());
            keys.push("docker.io".to_owned());
        }
        let helper = keys.iter().find_map(|key| Some((key, self.cred_helpers.get(key)?)));
        if let Some((key, helper)) = helper {
            return ask(helper, key);
        }
        let auth = keys.iter().find_map(|key| self.auths.get(key)).filter(|auth| !auth.auth.is_empty());
        if let Some(auth) = auth {
            return decode(&auth.auth).map(Some).ok_or_else(|| Error::Malformed {
                what: format!("docker's configuration for {registry}"),
                reason: "it is not base64 of NAME:PASSWORD".to_owned(),
            });
        }
        match &self.creds_store {
            Some(store) => ask(store, &keys[0]),
            None => Ok(None),
        }
    }
}

fn decode(auth: &str) -> Option<Credentials> {
    let text = String::from_utf8(BASE64_STANDARD.decode(auth).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Credentials { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() })
}

/// Asks `docker-credential-NAME`; one that has nothing for the registry fails, which is no error.
fn ask(helper: &str, key: &str) -> Result<Option<Credentials>> {
    let program = format!("docker-credential-{helper}");
    if helper.contains('/') {
        let reason = "the name of a credential helper has a slash".to_owned();
        return Err(Error::Malformed { what: "docker's configuration".to_owned(), reason });
    }
    let failed = |source| Error::Read { what: program.clone(), source };
    let mut command = Command::new(&program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it will not answer either.
        let _ = stdin.write_all(key.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        return Ok(None);
    }
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|source| Error::Json { what: format!("the answer of {program}"), source })?;
    if answer.username == TOKEN {
        let reason = "it gave a token for renewal, which is not supported: log in with a password".to_owned();
        return Err(Error::Malformed { what: program, reason });
    }
    Ok(Some(Credentials { username: answer.username, password: answer.secret }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(config: &str, registry: &str) -> Result<Option<Credentials>> {
        serde_json::from_str::<Config>(config).unwrap().find(registry)
    }

    fn credentials(username: &str, password: &str) -> Option<Credentials> {
        Some(Credentials { username: username.to_owned(), password: password.to_owned() })
    }

    #[test]
    fn a_login_is_found_by_its_registry() {
        // me:se:cret
        let config = r#"{"auths": {"reg:5000": {"auth": "bWU6c2U6Y3JldA=="}, "https://b": {"auth": "bWU6c2U6Y3JldA=="},
            "https://index.docker.io/v1/": {"auth": "YTpi"}, "empty": {}}}"#;
        assert_eq!(find(config, "reg:5000").unwrap(), credentials("me", "se:cret"));
        assert_eq!(find(config, "b").unwrap(), credentials("me", "se:cret"));
        assert_eq!(find(config, "index.docker.io").unwrap(), credentials("a", "b"));
        for unknown in ["reg", "reg:5001", "empty", "c"] {
            assert_eq!(find(config, unknown).unwrap(), None, "{unknown}");
        }
        assert_eq!(find("{}", "reg:5000").unwrap(), None);
    }

    #[test]
    fn nonsense_is_refused() {
        for auth in ["!", "YQ==", "/w=="] {
            assert!(find(&format!(r#"{{"auths": {{"r": {{"auth": "{auth}"}}}}}}"#), "r").is_err(), "{auth}");
        }
        assert!(find(r#"{"credHelpers": {"r": "../../bin/sh"}}"#, "r").is_err());
        assert!(find(r#"{"credHelpers": {"r": "no-such-helper-of-anyone"}}"#, "r").is_err());
    }

    #[test]
    fn passwords_are_not_printed() {
        assert!(!format!("{:?}", credentials("me", "secret")).contains("secret"));
    }
}
