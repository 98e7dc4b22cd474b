//! The building of an image as a bar; as a line per phase where there is no terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use mvm_runtime::image::{Phase, Progress};
use mvm_runtime::timeline::{Open, Timeline, Track};

use crate::say;

/// Shows how far the building of an image is. Nothing is shown for an image that is there already.
#[derive(Debug, Default)]
pub(crate) struct Bar(Option<ProgressBar>);

impl Progress for Bar {
    fn begin(&mut self, phase: Phase, total: Option<u64>) {
        let what = named(phase);
        if !std::io::stderr().is_terminal() {
            say(&format!("mvm: {what}"));
            return;
        }
        let bar = self.0.get_or_insert_with(|| ProgressBar::new(0));
        let template = if total.is_some() {
            "{msg:<28} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}"
        } else {
            "{msg:<28} {spinner} {bytes}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_length(total.unwrap_or(0));
        bar.set_position(0);
        bar.set_message(what);
    }

    fn advance(&mut self, done: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(done);
        }
    }
}

/// What people call it.
fn named(phase: Phase) -> String {
    match phase {
        Phase::Waiting => "waiting for another mvm that makes the same image".to_owned(),
        Phase::Fetch { number, count } => format!("fetching layer {number} of {count}"),
        Phase::Layer { number, count } => format!("layer {number} of {count}"),
        Phase::Files => "reading files".to_owned(),
        Phase::Finishing => "finishing the image".to_owned(),
    }
}

/// Shows how far the building of an image is, and writes its phases down.
#[derive(Debug)]
pub(super) struct Noted<'a> {
    bar: Bar,
    timeline: &'a Timeline,
    phase: Option<Open>,
}

impl<'a> Noted<'a> {
    pub(super) fn new(timeline: &'a Timeline) -> Self {
        Self { bar: Bar::default(), timeline, phase: None }
    }
}

impl Progress for Noted<'_> {
    fn begin(&mut self, phase: Phase, total: Option<u64>) {
        // The one before ends first: they are one after the other, not one in the other.
        self.phase = None;
        self.phase = Some(self.timeline.begin(Track::Host, named(phase)));
        self.bar.begin(phase, total);
    }

    fn advance(&mut self, done: u64) {
        self.bar.advance(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
