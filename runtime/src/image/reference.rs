//! Which of several images is meant: `path:name`, `path@digest`.

use std::path::{Path, PathBuf};

use super::error::{Error, Result};

/// What follows the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A tag or a whole name.
    Name(String),
    /// A digest or the beginning of one.
    Digest(String),
}

impl Wanted {
    /// Whether an image of these names and this digest is meant. A tag alone, or a name without
    /// its registry, is enough.
    pub(super) fn fits(&self, names: &[&str], digest: &str) -> bool {
        match self {
            Self::Digest(wanted) => {
                let hex = digest.rsplit(':').next().unwrap_or_default();
                digest == wanted || (wanted.len() >= 8 && hex.starts_with(wanted.as_str()))
            }
            Self::Name(wanted) => names.iter().any(|name| {
                let rest = name.strip_suffix(wanted.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.ends_with(['/', ':']))
            }),
        }
    }

    pub(super) fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Digest(text) => text,
        }
    }
}

/// Splits what a person typed. A path that exists as it stands is a path; else the longest part
/// before a `:` or `@` that does.
pub(super) fn split(text: &Path) -> (PathBuf, Option<Wanted>) {
    let whole = || (text.to_owned(), None);
    let Some(string) = text.to_str() else { return whole() };
    if text.exists() {
        return whole();
    }
    for (at, mark) in string.rmatch_indices([':', '@']) {
        let (path, rest) = (&string[..at], &string[at + 1..]);
        if !path.is_empty() && !rest.is_empty() && Path::new(path).exists() {
            let rest = rest.to_owned();
            let wanted = if mark == "@" { Wanted::Digest(rest) } else { Wanted::Name(rest) };
            return (path.into(), Some(wanted));
        }
    }
    whole()
}

/// Picks the one image that is left, or says what there is.
pub(super) struct Choice<'a> {
    pub(super) path: &'a Path,
    pub(super) wanted: Option<&'a Wanted>,
}

impl Choice<'_> {
    /// The only one of `fitting`; `all` are names and digests of everything there is.
    pub(super) fn only<T>(&self, mut fitting: Vec<T>, all: &[(Option<String>, String)]) -> Result<T> {
        let none_fits = fitting.is_empty();
        if let (1, Some(only)) = (fitting.len(), fitting.pop()) {
            return Ok(only);
        }
        let path = self.path.to_owned();
        let label = |(name, digest): &(Option<String>, String)| name.as_ref().unwrap_or(digest).clone();
        let names = all.iter().map(label).collect();
        match self.wanted {
            Some(wanted) if none_fits => {
                Err(Error::NoSuchImage { path, wanted: wanted.text().to_owned(), names })
            }
            _ if all.is_empty() => Err(Error::Malformed {
                what: path.display().to_string(),
                reason: "it lists no images".to_owned(),
            }),
            _ => Err(Error::SeveralImages { path, names }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_or_the_end_of_a_name_is_enough() {
        let names = ["docker.io/library/busybox:1.36"];
        let fits = |wanted: &str| Wanted::Name(wanted.to_owned()).fits(&names, "");
        assert!(fits("docker.io/library/busybox:1.36"));
        assert!(fits("busybox:1.36"));
        assert!(fits("1.36"));
        assert!(!fits("box:1.36"));
        assert!(!fits("36"));
        assert!(!fits("busybox"));
    }

    #[test]
    fn a_digest_may_be_shortened_to_eight_digits() {
        let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
        let fits = |wanted: &str| Wanted::Digest(wanted.to_owned()).fits(&[], &digest);
        assert!(fits(&digest));
        assert!(fits("01234567"));
        assert!(!fits("0123456"));
        assert!(!fits("89abcdef"));
    }

    #[test]
    fn the_path_is_the_longest_part_that_exists() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("a:b");
        std::fs::create_dir(&base).unwrap();
        assert_eq!(split(&base), (base.clone(), None));
        let text = format!("{}:reg:5000/img:1", base.display());
        assert_eq!(split(Path::new(&text)), (base.clone(), Some(Wanted::Name("reg:5000/img:1".to_owned()))));
        let text = format!("{}@sha256:00", base.display());
        assert_eq!(split(Path::new(&text)), (base, Some(Wanted::Digest("sha256:00".to_owned()))));
        assert_eq!(split(Path::new("/no/such:x")), ("/no/such:x".into(), None));
    }
}
