//! A timeline for people: a line a stage.

use std::fmt;

use mvm_vmm::status::now;

use super::{Timeline, Track};

impl fmt::Display for Timeline {
    /// When it began since the first did, how long it took, both in milliseconds, and what it was, indented by how
    /// deep it lies in others of its track. What goes on is counted until now.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stages, now) = (self.stages(), now());
        let zero = stages.first().map_or(0, |stage| stage.begin_ns);
        let ms = |ns: u64| ns as f64 / 1e6;
        let mut around: Vec<(Track, u64)> = Vec::new();
        for stage in &stages {
            let end = stage.end_ns.unwrap_or(now).max(stage.begin_ns);
            around.retain(|(_, until)| *until > stage.begin_ns);
            let depth = around.iter().filter(|(track, _)| *track == stage.track).count();
            around.push((stage.track, end));
            let took = match stage.is_moment() {
                true => String::new(),
                false => format!("{:+.2}", ms(end.saturating_sub(stage.begin_ns))),
            };
            let begun = ms(stage.begin_ns.saturating_sub(zero));
            write!(f, "{begun:>9.2} ms {took:>10}  {}{}", "  ".repeat(depth), whose(stage.track))?;
            write!(f, "{}", stage.name)?;
            match &stage.detail {
                Some(detail) => writeln!(f, " ({detail})")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

fn whose(track: Track) -> &'static str {
    match track {
        Track::Host => "",
        Track::Beside => "meanwhile: ",
        Track::Machine => "mvm-vmm: ",
        Track::Guest => "guest: ",
        Track::Agent => "agent: ",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_begin_the_time_it_took_and_what_it_lies_in() {
        let timeline = Timeline::default();
        const MS: u64 = 1_000_000;
        timeline.note(Track::Host, "create", (5 * MS, 9 * MS));
        timeline.note(Track::Host, "spawn", (6 * MS, 7 * MS));
        timeline.note(Track::Machine, "load", (6 * MS, 8 * MS + MS / 2));
        timeline.note(Track::Host, "called", (7 * MS, 7 * MS));
        timeline.note(Track::Host, "start", (9 * MS, 10 * MS));
        let text = timeline.to_string();
        let lines: Vec<_> = text.lines().collect();
        let wanted = [
            "     0.00 ms      +4.00  create",
            "     1.00 ms      +1.00    spawn",
            "     1.00 ms      +2.50  mvm-vmm: load",
            "     2.00 ms               called",
            "     4.00 ms      +1.00  start",
        ];
        assert_eq!(lines, wanted, "{text}");
    }
}
