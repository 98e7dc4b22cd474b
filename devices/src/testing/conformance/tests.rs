//! The tables against the tests there are.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use super::{Row, Verdict, parse, read};

/// The tests in this program that are run, by its own word.
fn tests() -> BTreeSet<String> {
    let list = |more: &[&str]| -> BTreeSet<String> {
        let program = std::env::current_exe().unwrap();
        let output = Command::new(program).arg("--list").args(more).output().unwrap();
        let list = String::from_utf8(output.stdout).unwrap();
        list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
    };
    &list(&[]) - &list(&["--ignored"])
}

fn rows() -> Vec<Row> {
    let tables = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance")).unwrap();
    assert!(tables.len() > 5 && tables.values().all(|rows| !rows.is_empty()), "{:?}", tables.keys());
    tables.into_values().flatten().collect()
}

#[test]
fn every_row_names_tests_that_there_are_or_says_why_it_does_not_apply() {
    let tests = tests();
    assert!(tests.len() > 100);
    let missing: Vec<_> = rows()
        .into_iter()
        .filter_map(|row| match row.verdict(&tests) {
            Verdict::Missing(why) => Some((row.id, why)),
            Verdict::Checked | Verdict::NotApplicable => None,
        })
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_test_that_is_called_after_a_row_stands_in_it() {
    let rows = rows();
    for test in tests() {
        let name = test.rsplit("::").next().unwrap();
        // `c_001_c_002_…` as well as `c101_…`; a number alone belongs to no row.
        let name = name.replace("_c_", "_c").replace("c_", "c");
        for word in name.split('_') {
            let Some(number) = word.strip_prefix('c').filter(|n| n.len() == 3 && n.parse::<u16>().is_ok())
            else {
                continue;
            };
            let id = format!("C-{number}");
            let row = rows.iter().find(|row| row.id == id).unwrap_or_else(|| panic!("{test}: no row {id}"));
            assert!(row.tests.contains(&test) || row.not_applicable.is_some(), "{id} does not name {test}");
        }
    }
}

#[test]
fn a_table_is_read_as_it_stands() {
    let table = "# of\n[C-1]\nsection = \"2.1\"\nrule = \"does a, b\"\ntests = [\n  \"a::b\",\n  \"c\",\n]\n\n\
                 [C-2]\nsection = \"2\"\nrule = \"no\"\nnot_applicable = \"off\"\n[C-3]\ntests = [\"d\", \"e\"]\n";
    let rows = parse(table).unwrap();
    assert_eq!(rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["C-1", "C-2", "C-3"]);
    assert_eq!((rows[0].rule.as_str(), &rows[0].tests[..]), ("does a, b", &["a::b".into(), "c".into()][..]));
    assert_eq!((rows[1].section.as_str(), rows[1].not_applicable.as_deref()), ("2", Some("off")));
    assert_eq!(rows[2].tests, ["d", "e"]);
}

#[test]
fn what_is_no_table_is_refused_with_its_line() {
    for (line, table) in [
        (1, "section = \"2\""),
        (2, "[a]\nsection = 2"),
        (2, "[a]\nsection: \"2\""),
        (2, "[a]\ntest = [\"b\"]"),
        (2, "[a]\ntests = \"b\""),
        (3, "[a]\ntests = [\n b,\n]"),
        (3, "[a]\nrule = \"b\"\nrule = \"c\""),
        (2, "[a]\nrule = \"b\" # \"c\""),
    ] {
        let error = parse(table).unwrap_err();
        assert!(error.starts_with(&format!("line {line} ")), "{table}: {error}");
    }
    assert!(parse("[a]\ntests = [\n\"b\",").is_err());
}

#[test]
fn a_row_is_checked_does_not_apply_or_is_missing() {
    let passed: BTreeSet<String> = ["a".to_owned(), "b".to_owned()].into();
    let row = |tests: &[&str], why: Option<&str>| Row {
        id: "C-1".into(),
        section: "2".into(),
        rule: "does".into(),
        tests: tests.iter().map(|test| (*test).to_owned()).collect(),
        not_applicable: why.map(str::to_owned),
    };
    assert_eq!(row(&["a", "b"], None).verdict(&passed), Verdict::Checked);
    assert_eq!(row(&[], Some("off")).verdict(&passed), Verdict::NotApplicable);
    let nothing = Row { rule: String::new(), ..row(&["a"], None) };
    for bad in [row(&[], None), row(&["a", "c"], None), row(&["a"], Some("off")), row(&[], Some("")), nothing]
    {
        assert!(matches!(bad.verdict(&passed), Verdict::Missing(_)), "{bad:?}");
    }
}
