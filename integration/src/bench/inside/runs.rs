//! `ctr run` of one image by several runtimes of the same containerd, in turn: until the container's first byte, and
//! until all of it is gone.

use std::io::{self, Read};
use std::process::Stdio;
use std::time::Instant;

use mvm_runtime::template::Choice;
use serde_json::{Value, json};

use crate::bench::stats::Pairs;
use crate::bench::{Figure, Wanted};
use crate::containerd::{BUSYBOX, Ctr, Runtime};

/// Rounds, each in the opposite order of the one before.
const ROUNDS: usize = 30;
/// Machines that boot take part in every third: an odd number, so that they too take turns.
const COLD_ROUNDS: usize = 3;
/// Ours, in a machine that boots.
const COLD: &str = "cold";
/// Ours, in a machine that goes on from a template.
const CLONE: &str = "clone";
/// The peer.
const RUNC: &str = "runc";

/// Who runs a container.
#[derive(Clone, Debug)]
struct Contestant {
    /// In rows.
    name: &'static str,
    runtime: Runtime,
    words: Vec<String>,
}

/// What one run took, in ms from the call of `ctr`.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// The first byte that the container printed was read.
    first_byte: f64,
    /// `ctr` had ended, the container's task and snapshot removed.
    whole: f64,
}

/// A figure: its name, whose runs, and what of them.
type Asked = (&'static str, &'static str, fn(&Run) -> f64);

const FIGURES: [Asked; 6] = [
    ("lab.ctr_run_over_runc_cold", COLD, |run| run.whole),
    ("lab.ctr_run_over_runc_clone", CLONE, |run| run.whole),
    ("lab.first_byte_over_runc_cold", COLD, |run| run.first_byte),
    ("lab.first_byte_over_runc_clone", CLONE, |run| run.first_byte),
    ("lab.ctr_run_over_runc_clone_wall", CLONE, |run| run.whole),
    ("lab.first_byte_over_runc_clone_wall", CLONE, |run| run.first_byte),
];

pub(super) fn figures(wanted: &Wanted, ctr: &Ctr, what: &str) -> io::Result<Vec<Figure>> {
    let asked: Vec<_> = FIGURES.into_iter().filter(|(id, ..)| wanted.has(id)).collect();
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let contestants = contestants(&asked);
    // The first converts the image, fills caches and makes the template; it is no part of a figure.
    let first = round(ctr, &contestants, 0)?;
    let rounds: Vec<_> =
        (1..=ROUNDS).map(|number| round(ctr, &contestants, number)).collect::<io::Result<_>>()?;
    let figure = |(id, who, part): Asked| {
        let mut pairs = Pairs::default();
        for runs in &rounds {
            let found = |who| runs.iter().find(|(name, _)| *name == who).map(|(_, run)| part(run));
            if let Some((ours, theirs)) = found(who).zip(found(RUNC)) {
                pairs.add(ours, theirs);
            }
        }
        let until =
            if id.contains("first_byte") { "to its first byte on `ctr`'s standard output" } else { "whole" };
        let machines = if who == COLD { "boot" } else { "go on from a warm template" };
        let how = format!(
            "`ctr run --rm` of busybox's `echo`, {until}: median of the ratios of {} pairs, one run at a time, each pair in \
             the opposite order of the one before (ours-runc-runc-ours); machines {machines}; {what}",
            pairs.len()
        );
        let mut figure = Figure::ratio(id, &pairs, ["mvm_ms", "runc_ms"], &how);
        figure.raw.push(json!({"first": row(&first)}));
        figure.raw.extend(rounds.iter().map(|runs| row(runs)));
        figure
    };
    Ok(asked.into_iter().map(figure).collect())
}

/// Ours as the figures ask, and runc.
fn contestants(asked: &[Asked]) -> Vec<Contestant> {
    let mut all = Vec::new();
    for (name, choice) in [(COLD, Choice::Never), (CLONE, Choice::Always)] {
        if asked.iter().any(|(_, who, _)| *who == name) {
            let words = vec!["--annotation".to_owned(), format!("io.mvm.template={choice}")];
            all.push(Contestant { name, runtime: Runtime::Mvm, words });
        }
    }
    all.push(Contestant { name: RUNC, runtime: Runtime::Runc, words: Vec::new() });
    all
}

/// Every contestant whose turn it is, once.
fn round(ctr: &Ctr, contestants: &[Contestant], number: usize) -> io::Result<Vec<(&'static str, Run)>> {
    let takes_part = |it: &&Contestant| it.name != COLD || number.is_multiple_of(COLD_ROUNDS);
    let mut order: Vec<_> = contestants.iter().filter(takes_part).collect();
    if number.is_multiple_of(2) {
        order.reverse();
    }
    order.into_iter().map(|it| Ok((it.name, it.run(ctr, number)?))).collect()
}

/// In the order in which they ran.
fn row(runs: &[(&str, Run)]) -> Value {
    let run =
        |(name, run): &(&str, Run)| json!({"who": name, "first_byte_ms": run.first_byte, "ms": run.whole});
    runs.iter().map(run).collect()
}

impl Contestant {
    fn run(&self, ctr: &Ctr, number: usize) -> io::Result<Run> {
        let id = format!("{}-{number}", self.name);
        let mut args = vec!["run", "--rm", "--runtime", self.runtime.id()];
        args.extend(self.words.iter().map(String::as_str));
        args.extend([BUSYBOX, &id, "echo", "here"]);
        let mut command = ctr.command(&args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let ms = |began: Instant| began.elapsed().as_secs_f64() * 1e3;
        let began = Instant::now();
        let mut child = command.spawn()?;
        let mut byte = [0];
        let read = child.stdout.as_mut().map_or(Ok(()), |stdout| stdout.read_exact(&mut byte));
        let first_byte = ms(began);
        let output = child.wait_with_output()?;
        let whole = ms(began);
        if output.status.success() && read.is_ok() {
            Ok(Run { first_byte, whole })
        } else {
            let said = String::from_utf8_lossy(&output.stderr);
            let why =
                format!("{}, first byte after {first_byte:.1} of {whole:.1} ms: {read:?}", output.status);
            Err(io::Error::other(format!("ctr {args:?}: {why}: {said}")))
        }
    }
}
