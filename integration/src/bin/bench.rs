//! `bench`: measures every figure, prints the table, writes the rows.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use mvm_integration::bench::{Figure, Part, Report, Wanted, emulated, inside, names, native};

/// Measure, print a table, and write everything to a file.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    /// Only these figures, separated by commas
    #[arg(long, value_name = "ID,…")]
    only: Option<String>,
    /// Where the rows go
    #[arg(long, value_name = "FILE", default_value = "target/bench/results.json")]
    out: PathBuf,
    /// Measure what belongs into the emulated host, which this is, and print JSON
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let wanted = match Wanted::parse(arguments.only.as_deref()) {
        Ok(wanted) => wanted,
        Err(text) => {
            say(&text);
            return ExitCode::from(2);
        }
    };
    if arguments.inside {
        return match inside::run(&wanted, &mut io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                say(&error.to_string());
                ExitCode::FAILURE
            }
        };
    }
    let mut report = Report::default();
    let mut complete = true;
    let mut part = |name: &str, wanted: &Wanted, figures: fn(&Wanted) -> io::Result<Vec<Figure>>| {
        if !wanted.list().is_empty() {
            say(&format!("measuring {name}*"));
            match figures(wanted) {
                Ok(figures) => report.0.extend(figures),
                Err(error) => {
                    say(&format!("{name}*: {error}"));
                    complete = false;
                }
            }
        }
    };
    part("native.", &wanted.of(Part::Native), native::figures);
    part("lab.", &wanted.of(Part::Machines), emulated::figures);
    part("templates and snapshots: lab.", &wanted.of(Part::Clones), emulated::figures);
    part("containerd: lab.", &wanted.of(Part::Engine), emulated::engine_figures);
    part("containerd by the wall clock: lab.", &wanted.of(Part::Wall), emulated::wall_figures);
    let missing: Vec<_> =
        names().filter(|id| wanted.has(id) && report.0.iter().all(|figure| figure.id != *id)).collect();
    if !missing.is_empty() {
        say(&format!("not measured: {missing:?}"));
        complete = false;
    }
    let written = write!(io::stdout(), "{}", report.table()).and_then(|()| report.write(&arguments.out));
    if let Err(error) = written {
        say(&format!("cannot write {}: {error}", arguments.out.display()));
        complete = false;
    }
    if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn say(text: &str) {
    // There is nobody left to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "bench: {text}");
}
