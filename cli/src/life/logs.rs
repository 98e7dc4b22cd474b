//! What containers have written, and what has happened to them.

use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Line, read_log};
use mvm_runtime::state::events::{self, Event};
use mvm_runtime::state::{Home, LOG};

use super::args::{Events, Logs};
use super::print;
use super::watch::Watch;
use crate::words::Format;

pub(super) fn logs(home: &Home, options: &Logs) -> Result<u8, Failure> {
    let seen = home.find(&options.name)?;
    let path = seen.directory.join(LOG);
    let watch = Watch::new(&seen.directory)?;
    let mut last = None;
    loop {
        // Asked before reading, so that what an owner wrote last is read.
        let over = !options.follow || home.find(&seen.record.id).map_or(true, |it| !it.owned);
        let lines = read_log(&path).context(|| format!("cannot read {}", path.display()))?;
        let new = unseen(&lines, last.as_ref());
        let skip = match (&last, options.tail) {
            (None, Some(tail)) => new.len().saturating_sub(tail),
            _ => 0,
        };
        for line in new.iter().skip(skip) {
            show(line, options)?;
        }
        last = lines.last().cloned().or(last);
        if over {
            return Ok(0);
        }
        watch.wait()?;
    }
}

/// Lines after the last that was shown.
fn unseen<'a>(lines: &'a [Line], last: Option<&Line>) -> &'a [Line] {
    let shown = last.and_then(|last| lines.iter().rposition(|line| line == last));
    lines.get(shown.map_or(0, |at| at + 1)..).unwrap_or_default()
}

fn show(line: &Line, options: &Logs) -> Result<(), Failure> {
    if options.format == Format::Json {
        let text = serde_json::to_string(line).context(|| "cannot write JSON".to_owned())?;
        return print(&(text + "\n"));
    }
    let time = if options.timestamps { format!("{} ", time(line.at)) } else { String::new() };
    if line.stream == "stderr" {
        // A closed stderr is the user's wish.
        let _ = write!(std::io::stderr().lock(), "{time}{}", line.text);
        return Ok(());
    }
    print(&format!("{time}{}", line.text))
}

/// A time as RFC 3339 has it, to the millisecond.
fn time(ns: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_nanos(ns)).to_string()
}

pub(super) fn events(home: &Home, options: &Events) -> Result<u8, Failure> {
    let failed = || format!("cannot read {}", events::file(home).display());
    std::fs::create_dir_all(home.path()).context(failed)?;
    let watch = Watch::new(home.path())?;
    let (past, mut next) = events::read(home, 0).context(failed)?;
    if options.past {
        past.iter().try_for_each(|event| tell(event, options.format))?;
        return Ok(0);
    }
    loop {
        watch.wait()?;
        let (new, after) = events::read(home, next).context(failed)?;
        next = after;
        new.iter().try_for_each(|event| tell(event, options.format))?;
    }
}

fn tell(event: &Event, format: Format) -> Result<(), Failure> {
    let text = serde_json::to_value(event).context(|| "cannot write JSON".to_owned())?;
    if format == Format::Json {
        return print(&format!("{text}\n"));
    }
    let kind = text.get("kind").and_then(serde_json::Value::as_str).unwrap_or_default();
    let code = event.code.map_or_else(String::new, |code| format!(" ({code})"));
    let at = time(event.at.saturating_mul(1_000_000_000));
    print(&format!("{at} {kind}{code} {} {}\n", event.id, event.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_after_the_last_one_shown_are_new() {
        let line = |at| Line { at, stream: "stdout".into(), text: "x\n".into() };
        let lines = [line(1), line(2), line(3)];
        assert_eq!(unseen(&lines, None).len(), 3);
        assert_eq!(unseen(&lines, Some(&line(2))), [line(3)]);
        assert_eq!(unseen(&lines[2..], Some(&line(1))), [line(3)], "the log was put aside meanwhile");
    }
}
