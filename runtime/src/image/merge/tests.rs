//! Entries that come in every order, and entries that mean harm.

use super::*;
use crate::erofs::Content;

fn file() -> Node {
    Node { meta: Meta::default(), kind: Kind::File(Content::EMPTY) }
}

fn link(target: &str) -> Node {
    Node { meta: Meta::default(), kind: Kind::Symlink(target.as_bytes().into()) }
}

fn directory() -> Node {
    Node::directory(Meta::implied_directory())
}

fn paths(merger: &Merger) -> Vec<String> {
    let mut paths = Vec::new();
    let mut pending = vec![(Tree::ROOT, String::new())];
    while let Some((id, path)) = pending.pop() {
        for (name, dirent) in merger.tree[id].children().into_iter().flatten() {
            let path = format!("{path}/{}", name.escape_ascii());
            paths.push(path.clone());
            pending.push((dirent.node, path));
        }
    }
    paths.sort();
    paths
}

#[test]
fn dots_cannot_leave_the_root() {
    let mut merger = Merger::new();
    for path in ["../../a", "/b", "x/../../c", "./d", "..", "/"] {
        let node = if path.ends_with(['.', '/']) { directory() } else { file() };
        merger.insert(path.as_bytes(), node).unwrap();
    }
    assert_eq!(paths(&merger), ["/a", "/b", "/c", "/d"]);
}

#[test]
fn links_are_followed_inside_the_tree_only() {
    let mut merger = Merger::new();
    merger.insert(b"up", link("../../../../etc")).unwrap();
    merger.insert(b"abs", link("/etc/./x/..")).unwrap();
    merger.insert(b"up/one", file()).unwrap();
    merger.insert(b"abs/two", file()).unwrap();
    assert_eq!(paths(&merger), ["/abs", "/etc", "/etc/one", "/etc/two", "/etc/x", "/up"]);
}

#[test]
fn a_loop_of_links_is_refused() {
    let mut merger = Merger::new();
    merger.insert(b"a", link("b")).unwrap();
    merger.insert(b"b", link("a")).unwrap();
    let error = merger.insert(b"a/x", file()).unwrap_err();
    assert_eq!(error.to_string(), "cannot place a/x: too many symbolic links on the way");
}

#[test]
fn an_entry_replaces_a_link_and_does_not_write_through_it() {
    let mut merger = Merger::new();
    merger.insert(b"target", file()).unwrap();
    merger.insert(b"link", link("target")).unwrap();
    merger.insert(b"link", file()).unwrap();
    let (link, target) = (merger.find(b"link").unwrap(), merger.find(b"target").unwrap());
    assert!(matches!(merger.tree[link.unwrap()].kind, Kind::File(_)));
    assert_ne!(link, target);
}

#[test]
fn a_whiteout_hides_lower_layers_only() {
    let mut merger = Merger::new();
    for path in ["d/low", "d/both", "gone/deep/er", "file"] {
        merger.insert(path.as_bytes(), file()).unwrap();
    }
    merger.next_layer();
    merger.insert(b"d/both", file()).unwrap();
    merger.insert(b"gone/new", file()).unwrap();
    for name in ["d/low", "d/both", "gone", "file", "never/there"] {
        let (parent, name) = name.rsplit_once('/').unwrap_or(("", name));
        merger.whiteout(b"", parent.as_bytes(), name.as_bytes()).unwrap();
    }
    assert_eq!(paths(&merger), ["/d", "/d/both", "/gone", "/gone/new"]);
}

#[test]
fn an_opaque_directory_keeps_what_its_own_layer_brings_before_and_after() {
    let mut merger = Merger::new();
    merger.insert(b"d/low", file()).unwrap();
    merger.insert(b"d/sub/low", file()).unwrap();
    merger.next_layer();
    merger.insert(b"d/sub/new", file()).unwrap();
    merger.opaque(b"d/.wh..wh..opq", b"d").unwrap();
    merger.insert(b"d/after", file()).unwrap();
    assert_eq!(paths(&merger), ["/d", "/d/after", "/d/sub", "/d/sub/new"]);
}

#[test]
fn a_whiteout_of_dots_is_refused() {
    let mut merger = Merger::new();
    for name in [&b""[..], b".", b".."] {
        assert!(merger.whiteout(b"w", b"", name).is_err());
    }
}

#[test]
fn a_file_takes_the_place_of_a_directory_and_back() {
    let mut merger = Merger::new();
    merger.insert(b"x/inner", file()).unwrap();
    merger.next_layer();
    merger.insert(b"x", file()).unwrap();
    assert_eq!(paths(&merger), ["/x"]);
    assert!(merger.insert(b"x/y", file()).is_err(), "a file is not silently made a directory");
    merger.insert(b"x", directory()).unwrap();
    merger.insert(b"x/y", file()).unwrap();
    assert_eq!(paths(&merger), ["/x", "/x/y"]);
}

#[test]
fn a_hard_link_needs_a_file() {
    let mut merger = Merger::new();
    merger.insert(b"d/f", file()).unwrap();
    merger.hard_link(b"g", b"/d/f").unwrap();
    assert_eq!(merger.find(b"g").unwrap(), merger.find(b"d/f").unwrap());
    assert!(merger.hard_link(b"h", b"d").is_err());
    assert!(merger.hard_link(b"h", b"nothing").is_err());
    assert!(merger.hard_link(b"h", b"../../../etc/passwd").is_err());
}

#[test]
fn over_long_names_and_paths_are_refused() {
    let mut merger = Merger::new();
    merger.insert(&[b'n'; 255], file()).unwrap();
    assert!(merger.insert(&[b'n'; 256], file()).is_err());
    let long = "d/".repeat(2047) + "f";
    merger.insert(long.as_bytes(), file()).unwrap();
    assert!(merger.insert("d/".repeat(2049).as_bytes(), directory()).is_err());
    merger.insert(b"l", link(&"n".repeat(300))).unwrap();
    assert!(merger.insert(b"l/x", file()).is_err(), "a link's target makes no over-long name");
}

#[test]
fn a_tree_of_links_cannot_keep_us_busy_for_long() {
    let mut merger = Merger::new();
    // Forty links, each a long way round to the next.
    for index in 0..40 {
        let round = "d/../".repeat(800);
        let target = if index == 39 { format!("{round}end") } else { format!("{round}l{}", index + 1) };
        merger.insert(format!("l{index}").as_bytes(), link(&target)).unwrap();
    }
    merger.insert(b"d", directory()).unwrap();
    merger.insert(b"end", directory()).unwrap();
    merger.insert(b"l0/f", file()).unwrap();
    merger.lookups = MAX_LOOKUPS - 1000;
    let error = merger.insert(b"l0/g", file()).unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
}

#[test]
fn what_lies_behind_the_end_of_a_way_counts_as_well() {
    let mut merger = Merger::new();
    // The last link leads nowhere: of all the targets only the first names are looked at.
    for index in 0..40 {
        merger
            .insert(format!("l{index}").as_bytes(), link(&format!("l{}{}", index + 1, "/a".repeat(2000))))
            .unwrap();
    }
    let before = merger.lookups;
    assert_eq!(merger.find(b"l0/x").unwrap(), None);
    assert!(merger.lookups - before >= 40 * 2000, "{}", merger.lookups - before);
    merger.lookups = MAX_LOOKUPS - 1000;
    assert!(matches!(merger.find(b"l0/x").unwrap_err(), Error::Limit { .. }));
}
