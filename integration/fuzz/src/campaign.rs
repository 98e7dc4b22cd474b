//! One target after the other, each in a process of its own; a line for each, and one for all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mvm_fuzz::{MAX_INPUT, Target};

use super::{say, write_seeds};

/// Begins a line that says what was reached.
const REACHED: &str = "reached:";

/// Says, in the process of a target, that `name` was reached `n` times.
#[cfg(feature = "libfuzzer")]
pub(super) fn tell(name: &str, n: u64) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{REACHED} {name} {n}");
}

/// What came of a target.
#[derive(Debug, Default)]
struct Outcome {
    executions: u64,
    per_second: u64,
    edges: u64,
    features: u64,
    corpus: u64,
    reached: BTreeMap<String, u64>,
    /// Files that libFuzzer kept because something happened.
    kept: Vec<PathBuf>,
    failed: bool,
}

impl Outcome {
    /// Reads what libFuzzer and [`tell`] said.
    fn read(text: &str) -> Self {
        let mut outcome = Self::default();
        let number = |word: Option<&str>| word.and_then(|word| word.parse().ok());
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if let Some(rest) = line.strip_prefix(REACHED) {
                let mut words = rest.split_whitespace();
                if let (Some(name), Some(n)) = (words.next(), number(words.next())) {
                    outcome.reached.insert(name.to_owned(), n);
                }
            } else if line.starts_with("stat::number_of_executed_units:") {
                outcome.executions = number(words.nth(1)).unwrap_or(0);
            } else if line.starts_with("stat::average_exec_per_sec:") {
                outcome.per_second = number(words.nth(1)).unwrap_or(0);
            } else if line.starts_with('#') {
                let words: Vec<&str> = words.collect();
                let after = |key| words.iter().position(|word| *word == key).and_then(|at| words.get(at + 1));
                let field = |key| after(key).and_then(|word| word.split('/').next()?.parse().ok());
                outcome.edges = field("cov:").unwrap_or(outcome.edges);
                outcome.features = field("ft:").unwrap_or(outcome.features);
                outcome.corpus = field("corp:").unwrap_or(outcome.corpus);
            }
        }
        outcome
    }

    fn missing(&self, target: &Target) -> Vec<&'static str> {
        let reached = |name: &&str| self.reached.get(*name).is_some_and(|n| *n > 0);
        target.reaches.iter().copied().filter(|name| !reached(name)).collect()
    }
}

/// Fuzzes each target for so many seconds below `directory`, where corpora, what was said and crashes stay.
///
/// # Errors
/// A crash, or a counter that a target declares is still 0.
pub(super) fn run(targets: &[Target], directory: &Path, seconds: u32) -> Result<(), String> {
    say(&format!(
        "{:18} {:>10} {:>8} {:>7} {:>8} {:>6}  reached",
        "target", "executions", "per s", "edges", "features", "corpus"
    ))?;
    let (mut executions, mut unreached, mut crashes) = (0, 0, 0);
    for target in targets {
        let outcome = fuzz(target, directory, seconds)?;
        let counts: Vec<String> = outcome.reached.iter().map(|(name, n)| format!("{name} {n}")).collect();
        say(&format!(
            "{:18} {:>10} {:>8} {:>7} {:>8} {:>6}  {}",
            target.name,
            outcome.executions,
            outcome.per_second,
            outcome.edges,
            outcome.features,
            outcome.corpus,
            counts.join(", ")
        ))?;
        executions += outcome.executions;
        if outcome.failed {
            crashes += 1;
            let said = directory.join(format!("{}.log", target.name));
            say(&format!("  it crashed: {} says how", said.display()))?;
            for kept in &outcome.kept {
                say(&format!("  again: cargo run -p mvm-fuzz -- replay {} {}", target.name, kept.display()))?;
            }
        } else {
            for name in outcome.missing(target) {
                unreached += 1;
                say(&format!("  never reached: {name}"))?;
            }
        }
    }
    say(&format!(
        "fuzz: {} targets, {executions} executions, {unreached} unreached, {crashes} crashes",
        targets.len()
    ))?;
    if unreached + crashes == 0 {
        Ok(())
    } else {
        Err("there were crashes, or targets that get nowhere".to_owned())
    }
}

fn fuzz(target: &Target, directory: &Path, seconds: u32) -> Result<Outcome, String> {
    let failed = |error: std::io::Error| format!("cannot fuzz {}: {error}", target.name);
    let corpus = write_seeds(target, &directory.join("corpus"))?;
    let crashes = directory.join("crashes").join(target.name);
    std::fs::create_dir_all(&crashes).map_err(failed)?;
    let files = |directory: &Path| -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
    };
    let before = files(&crashes).map_err(failed)?;
    let Output { status, stderr, .. } = Command::new(std::env::current_exe().map_err(failed)?)
        .env("MVM_FUZZ_TARGET", target.name)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .args(["-print_final_stats=1", "-timeout=20", "-rss_limit_mb=2048"])
        .arg(corpus)
        .output()
        .map_err(failed)?;
    std::fs::write(directory.join(format!("{}.log", target.name)), &stderr).map_err(failed)?;
    let mut outcome = Outcome::read(&String::from_utf8_lossy(&stderr));
    outcome.failed = !status.success();
    outcome.kept = files(&crashes).map_err(failed)?;
    outcome.kept.retain(|path| !before.contains(path));
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let text = "#2\tINITED cov: 5 ft: 6 corp: 1/1b exec/s: 0 rss: 30Mb\n\
             #40\tNEW    cov: 12 ft: 34 corp: 7/99b lim: 4 exec/s: 0 rss: 30Mb L: 4/4 MS: 1 CopyPart-\n\
             reached: answered 9\n\
             stat::number_of_executed_units: 1234\nstat::average_exec_per_sec:     617\n";
        let outcome = Outcome::read(text);
        let Outcome { executions, per_second, edges, features, corpus, .. } = outcome;
        assert_eq!((executions, per_second, edges, features, corpus), (1234, 617, 12, 34, 7));
        let target = Target { reaches: &["answered", "refused"], ..mvm_fuzz::all()[0] };
        assert_eq!(outcome.missing(&target), ["refused"]);
    }
}
