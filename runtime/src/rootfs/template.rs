//! Paths in mounts that name other mounts of the same list: `{{ mount 0 }}/upper`, `{{ overlay 1 3 }}`.

use std::path::{Path, PathBuf};

use crate::failure::{Context, Failure};

/// One of the paths that an option lists.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// A path of the host.
    Path(PathBuf),
    /// A path below another mount of the list.
    Mount {
        /// Which one, from 0.
        index: usize,
        /// Where in it, without a slash in front; empty for all of it.
        below: String,
    },
    /// Several mounts of the list, one after the other, forwards or backwards.
    Overlay {
        /// The first one.
        first: usize,
        /// The last one.
        last: usize,
    },
}

/// Splits a list of paths at its colons.
pub(super) fn pieces(text: &str) -> Result<Vec<Piece>, Failure> {
    text.split(':').map(piece).collect()
}

fn piece(text: &str) -> Result<Piece, Failure> {
    let unknown = || Failure::new(format!("{text:?} is neither an absolute path nor a known template"));
    let Some((action, rest)) = text.strip_prefix("{{").and_then(|text| text.split_once("}}")) else {
        let path = Path::new(text);
        return if path.is_absolute() && !text.contains("{{") {
            Ok(Piece::Path(path.into()))
        } else {
            Err(unknown())
        };
    };
    let mut words = action.split_whitespace();
    let name = words.next();
    let numbers: Vec<usize> = words
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context(|| format!("cannot read the numbers in {text:?}"))?;
    match (name, numbers.as_slice(), rest) {
        (Some("mount"), [index], "") => Ok(Piece::Mount { index: *index, below: String::new() }),
        (Some("mount"), [index], rest) => {
            let below = rest.strip_prefix('/').filter(|below| !below.contains("{{")).ok_or_else(unknown)?;
            Ok(Piece::Mount { index: *index, below: below.to_owned() })
        }
        (Some("overlay"), [first, last], "") => Ok(Piece::Overlay { first: *first, last: *last }),
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_templates_are_told_apart() {
        assert_eq!(
            pieces("/a/b:{{ mount 0 }}/upper:{{mount 12}}:{{ overlay 3 1 }}").unwrap(),
            [
                Piece::Path("/a/b".into()),
                Piece::Mount { index: 0, below: "upper".into() },
                Piece::Mount { index: 12, below: String::new() },
                Piece::Overlay { first: 3, last: 1 },
            ]
        );
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for text in [
            "",
            "relative",
            "{{ mount }}",
            "{{ mount x }}",
            "{{ mount -1 }}",
            "{{ source 0 }}",
            "{{ mount 0 }}x",
        ] {
            assert!(pieces(text).is_err(), "{text}");
        }
        for text in [
            "{{ overlay 1 }}",
            "{{ overlay 1 2 }}/a",
            "/a{{ mount 0 }}",
            "{{ mount 0",
            "{{ mount 0 }}/{{ x }}",
        ] {
            assert!(pieces(text).is_err(), "{text}");
        }
    }
}
