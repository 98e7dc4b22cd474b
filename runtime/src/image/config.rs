//! What an image says about how to run it (OCI image specification, `config.md`).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// The part of an image's configuration that a container is started from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Program and first arguments that stay when a user gives a command.
    #[serde(rename = "Entrypoint", default, deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// Command or further arguments that a user's command replaces.
    #[serde(rename = "Cmd", default, deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Environment, each `NAME=value`.
    #[serde(rename = "Env", default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    #[serde(rename = "WorkingDir", default, deserialize_with = "or_default")]
    pub cwd: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty means root. Names are those of the image's
    /// own `/etc/passwd`.
    #[serde(rename = "User", default, deserialize_with = "or_default")]
    pub user: String,
    /// Signal that asks the container to end, as `SIGTERM` or a number.
    #[serde(rename = "StopSignal", default)]
    pub stop_signal: Option<String>,
    /// Free-form labels.
    #[serde(rename = "Labels", default, deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// Ports the program listens on, as `80/tcp`.
    #[serde(rename = "ExposedPorts", default, deserialize_with = "keys", serialize_with = "as_keys")]
    pub exposed_ports: Vec<String>,
    /// Directories meant to outlive the container.
    #[serde(rename = "Volumes", default, deserialize_with = "keys", serialize_with = "as_keys")]
    pub volumes: Vec<String>,
}

/// Many writers spell "none" as `null`.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Sets are spelled as maps to empty objects.
fn keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let map = Option::<BTreeMap<String, serde::de::IgnoredAny>>::deserialize(deserializer)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

fn as_keys<S: serde::Serializer>(keys: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(keys.iter().map(|key| (key, serde_json::Map::new())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_with_nulls_is_an_empty_one() {
        let text = r#"{"Entrypoint":null,"Cmd":null,"Env":null,"WorkingDir":"","User":"","Labels":null,
            "ExposedPorts":null,"Volumes":null,"StopSignal":null,"OnBuild":[],"Healthcheck":{}}"#;
        assert_eq!(serde_json::from_str::<ImageConfig>(text).unwrap(), ImageConfig::default());
    }

    #[test]
    fn sets_are_spelled_as_maps_and_come_back() {
        let text = r#"{"ExposedPorts":{"80/tcp":{},"53/udp":{}},"Volumes":{"/data":{}},"Cmd":["a","b"]}"#;
        let config: ImageConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!(config.volumes, ["/data"]);
        let again = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ImageConfig>(&again).unwrap(), config);
    }
}
