//! Names of images in the words of registries: `busybox` is `docker.io/library/busybox:latest`.

use super::error::{Error, Result};

/// The registry of names that name none.
const REGISTRY: &str = "docker.io";
/// Where that registry has the names of one word.
const LIBRARY: &str = "library";
const TAG: &str = "latest";
/// Longest name; registries allow less.
const MAX_NAME: usize = 512;

/// A name with everything in it that people leave out.
///
/// # Errors
/// It is no name: a path, or with characters that no registry allows.
pub fn full_name(text: &str) -> Result<String> {
    let refuse = |reason| Error::Name { name: text.escape_debug().to_string(), reason };
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    // A colon after the last slash begins a tag, one before belongs to a port.
    let (path, tag) = match rest.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')) {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    let is_registry = |name: &str| name.contains(['.', ':']) || name == "localhost";
    let (registry, repository) = match path.split_once('/') {
        Some((registry, repository)) if is_registry(registry) => (registry, repository.to_owned()),
        Some(_) => (REGISTRY, path.to_owned()),
        None => (REGISTRY, format!("{LIBRARY}/{path}")),
    };
    if text.len() > MAX_NAME {
        return Err(refuse("it is too long"));
    }
    if !repository.split('/').all(is_component) {
        return Err(refuse("between its slashes are lower-case letters and digits, and . _ - inside"));
    }
    let begins_well = registry.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '[');
    let plain = registry.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".:-[]".contains(&byte));
    if !begins_well || !plain || registry.contains("..") {
        return Err(refuse("its registry is no host name"));
    }
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(refuse("a tag has letters, digits, and . _ - after the first"));
    }
    if digest.is_some_and(|digest| digest.parse::<super::digest::Digest>().is_err()) {
        return Err(refuse("what follows the @ is no digest"));
    }
    let tag = tag.or(if digest.is_none() { Some(TAG) } else { None });
    let tag = tag.map(|tag| format!(":{tag}")).unwrap_or_default();
    let digest = digest.map(|digest| format!("@{digest}")).unwrap_or_default();
    Ok(format!("{registry}/{repository}{tag}{digest}"))
}

fn is_component(component: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = [component.bytes().next(), component.bytes().next_back()];
    ends.into_iter().all(|byte| byte.is_some_and(plain))
        && component.bytes().all(|byte| plain(byte) || b"._-".contains(&byte))
        && !component.contains("..")
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || b".-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_filled_in() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("me/tool", "docker.io/me/tool:latest".to_owned()),
            ("quay.io/a/b/c:x", "quay.io/a/b/c:x".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x:1", "localhost:5000/x:1".to_owned()),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest".to_owned()),
            (&format!("x@{digest}"), format!("docker.io/library/x@{digest}")),
            (&format!("x:1@{digest}"), format!("docker.io/library/x:1@{digest}")),
        ] {
            assert_eq!(full_name(text).unwrap(), full);
            assert_eq!(full_name(&full).unwrap(), full, "a full name stays what it is");
        }
    }

    #[test]
    fn paths_and_nonsense_are_no_names() {
        for text in [
            "",
            "/",
            "/etc",
            "./x",
            "../x",
            "x/",
            "x//y",
            "Upper",
            "x:",
            "x:-a",
            "x@sha256:0",
            "a b",
            "x:a b",
            "ho st.com/x",
            "x\n",
            "a..b/c",
        ] {
            assert!(full_name(text).is_err(), "{text:?}");
        }
        assert!(full_name(&"a".repeat(600)).is_err());
    }
}
