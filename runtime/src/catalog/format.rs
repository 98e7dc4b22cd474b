//! Manifests: JSON that says its version.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::failure::{Context, Failure};

/// Which manifests are read.
#[derive(Debug)]
pub(crate) struct Format {
    /// What they are of, several of them.
    pub what: &'static str,
    /// The only version.
    pub version: u32,
    /// Longest text, in bytes.
    pub max_bytes: u64,
    /// What to do with one of another version.
    pub help: Option<&'static str>,
}

impl Format {
    /// The manifest at `path`.
    ///
    /// # Errors
    /// It is not there, too long, not understood, or of another version.
    pub(crate) fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<T, Failure> {
        let failed = || format!("cannot read {}", path.display());
        self.understand(File::open(path).context(failed)?, failed)
    }

    /// The manifest in `file`.
    ///
    /// # Errors
    /// It is too long, not understood, or of another version: `failed` is what could not be done then.
    pub(crate) fn understand<T: DeserializeOwned>(
        &self,
        file: File,
        failed: impl Fn() -> String,
    ) -> Result<T, Failure> {
        let mut text = Vec::new();
        file.take(self.max_bytes).read_to_end(&mut text).context(&failed)?;
        let value: serde_json::Value = serde_json::from_slice(&text).context(&failed)?;
        let version = value.get("version").and_then(serde_json::Value::as_u64);
        if version != Some(self.version.into()) {
            let why = format!("this build reads {} of version {} only", self.what, self.version);
            let mut why = Failure::new(why).refused();
            if let Some(help) = self.help {
                why = why.help(help);
            }
            return Err(Failure::because(failed(), why));
        }
        serde_json::from_value(value).context(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const FORMAT: Format = Format { what: "toys", version: 1, max_bytes: 64, help: Some("make it anew") };

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Toy {
        version: u32,
        name: String,
    }

    fn read(text: &str) -> Result<Toy, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifest.json");
        fs::write(&path, text).unwrap();
        FORMAT.read(&path).map_err(|failure| failure.report())
    }

    #[test]
    fn what_is_of_another_version_cut_too_long_or_made_up_is_an_error() {
        assert_eq!(read(r#"{"version":1,"name":"a"}"#), Ok(Toy { version: 1, name: "a".into() }));
        for text in [
            "",
            "{",
            "[]",
            r#"{"version":1}"#,
            r#"{"version":"1","name":"a"}"#,
            r#"{"version":1,"name":"a","more":1}"#,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        let other = read(r#"{"version":2,"name":"a"}"#).unwrap_err();
        assert!(other.contains("reads toys of version 1 only") && other.contains("make it anew"), "{other}");
        let long = format!(r#"{{"version":1,"name":"{}"}}"#, "a".repeat(64));
        assert!(read(&long).is_err());
        assert!(FORMAT.read::<Toy>(Path::new("/no/such/manifest")).is_err());
    }
}
