//! Guests that are hostile, and one that is not.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::*;

/// A guest that says of each path what it is told to, in the order of asking for a path; the last for ever.
#[derive(Default)]
struct Told {
    said: BTreeMap<String, Vec<Got>>,
    asked: BTreeMap<String, Cell<usize>>,
}

impl Guest for Told {
    fn get(&self, path: &str, _: u64) -> Result<Got, Failure> {
        let path = path.trim_end_matches('/');
        let said = self.said.get(path).ok_or_else(|| Failure::new(format!("/{path} is not there")))?;
        let at = self.asked[path].get();
        self.asked[path].set(at + 1);
        Ok(said[at.min(said.len() - 1)].clone())
    }
}

impl Told {
    fn say(mut self, path: &str, contents: &[GotContent]) -> Self {
        let got = |content: &GotContent| Got {
            mode: 0o7777,
            uid: 0,
            gid: 0,
            size: u64::MAX,
            content: content.clone(),
        };
        self.said.insert(path.to_owned(), contents.iter().map(got).collect());
        self.asked.insert(path.to_owned(), Cell::new(0));
        self
    }

    fn directory(self, path: &str, names: &[&str]) -> Self {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        self.say(path, &[GotContent::Directory(names), GotContent::Directory(Vec::new())])
    }

    fn file(self, path: &str, text: &str) -> Self {
        self.say(path, &[GotContent::File(text.into()), GotContent::File(Vec::new())])
    }

    fn link(self, path: &str, target: &Path) -> Self {
        self.say(path, &[GotContent::Link(target.to_str().unwrap().to_owned())])
    }

    fn copy(self, from: &str, to: &Path) -> Result<(), Failure> {
        From::new(self, 1000).copy(from, to)
    }
}

/// A destination, and beside it a directory that nothing may be written into.
fn places() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
    fs::create_dir(&to).unwrap();
    fs::create_dir(&outside).unwrap();
    (dir, to, outside)
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

#[test]
fn a_tree_arrives_with_its_links_and_without_rights() {
    let (_dir, to, _) = places();
    let guest = Told::default().directory("etc", &["conf", "link", "deep"]).file("etc/conf", "text");
    let guest =
        guest.link("etc/link", Path::new("conf")).directory("etc/deep", &["x"]).file("etc/deep/x", "1");
    guest.copy("etc/", &to).unwrap();
    assert_eq!(fs::read_to_string(to.join("etc/link")).unwrap(), "text");
    assert_eq!(fs::read_to_string(to.join("etc/deep/x")).unwrap(), "1");
    assert_eq!(to.join("etc/conf").metadata().unwrap().permissions().mode() & 0o7777, 0o777);
}

#[test]
fn a_guest_s_names_lead_nowhere() {
    for good in ["a", "a b", "...", "ä"] {
        assert!(is_name(good), "{good}");
    }
    for bad in ["", ".", "..", "/", "a/b", "/a", "a/", "a\0b", "../outside/x"] {
        assert!(!is_name(bad), "{bad}");
        let (_dir, to, outside) = places();
        let path = join("d", bad);
        Told::default().directory("d", &[bad]).file(&path, "x").copy("d", &to).unwrap_err();
        assert!(is_empty(&to.join("d")) && is_empty(&outside), "{bad}");
    }
}

#[test]
fn nothing_is_written_through_a_link_of_the_same_copy() {
    let (_dir, to, outside) = places();
    let file = outside.join("file");
    // The same name twice: first a link, then a directory or a file.
    for (target, second) in [
        (&outside, GotContent::Directory(vec!["x".into()])),
        (&file, GotContent::File(b"x".to_vec())),
        (&outside, GotContent::Link("/".into())),
    ] {
        let link = GotContent::Link(target.to_str().unwrap().to_owned());
        let guest =
            Told::default().directory("d", &["a", "a"]).say("d/a", &[link, second]).file("d/a/x", "x");
        guest.copy("d", &to).unwrap_err();
        assert!(is_empty(&outside));
        fs::remove_dir_all(to.join("d")).unwrap();
    }
}

#[test]
fn nothing_is_written_through_a_link_of_an_earlier_copy() {
    let (_dir, to, outside) = places();
    Told::default().link("d", &outside).copy("d", &to).unwrap();
    Told::default().directory("d", &["x"]).file("d/x", "x").copy("d", &to).unwrap_err();
    assert!(is_empty(&outside));
    fs::remove_file(to.join("d")).unwrap();
    Told::default().link("d", &outside.join("file")).copy("d", &to).unwrap();
    Told::default().file("d", "x").copy("d", &to).unwrap_err();
    assert!(is_empty(&outside));
    // Within a tree that is there already as well.
    fs::create_dir(to.join("tree")).unwrap();
    symlink(&outside, to.join("tree/sub")).unwrap();
    let guest = Told::default().directory("tree", &["sub"]).directory("tree/sub", &["x"]);
    guest.file("tree/sub/x", "x").copy("tree", &to).unwrap_err();
    assert!(is_empty(&outside));
}

#[test]
fn a_guest_that_sends_without_end_is_stopped_at_the_bound_for_the_whole_copy() {
    let (_dir, to, _) = places();
    let endless = Told::default().say("f", &[GotContent::File(vec![b'x'; 300])]);
    let report = endless.copy("f", &to).unwrap_err().report();
    assert!(report.contains("more than 1000 B") && report.contains("--max-size"), "{report}");
    assert_eq!(to.join("f").metadata().unwrap().len(), 900);
    let names = ["a", "b", "c", "d"];
    let many = names.iter().fold(Told::default().directory("d", &names), |guest, name| {
        guest.file(&format!("d/{name}"), &"x".repeat(300))
    });
    many.copy("d", &to).unwrap_err();
    assert!(to.join("d/c").exists() && to.join("d/d").metadata().unwrap().len() == 0);
}

#[test]
fn a_directory_without_end_and_one_without_floor_are_ends_all_the_same() {
    let (_dir, to, _) = places();
    let same = GotContent::Directory(vec!["a".into()]);
    Told::default().say("d", std::slice::from_ref(&same)).file("d/a", "").copy("d", &to).unwrap_err();
    struct Bottomless;
    impl Guest for Bottomless {
        fn get(&self, _: &str, _: u64) -> Result<Got, Failure> {
            let content = GotContent::Directory(vec!["a".into()]);
            Ok(Got { mode: 0o755, uid: 0, gid: 0, size: 0, content })
        }
    }
    let report = From::new(Bottomless, 1).copy("bottomless", &to).unwrap_err().report();
    assert!(report.contains("directories deep"), "{report}");
}

#[test]
fn names_that_are_held_count_before_any_of_them_is_copied() {
    let (_dir, to, _) = places();
    struct Wide;
    impl Guest for Wide {
        fn get(&self, _: &str, _: u64) -> Result<Got, Failure> {
            let content = GotContent::Directory(vec!["a".into(); 400_000]);
            Ok(Got { mode: 0o755, uid: 0, gid: 0, size: 0, content })
        }
    }
    let report = From::new(Wide, 1).copy("wide", &to).unwrap_err().report();
    assert!(report.contains("more than 1000000 entries"), "{report}");
    assert!(to.join("wide/a/a").exists() && !to.join("wide/a/a/a").exists());
}
