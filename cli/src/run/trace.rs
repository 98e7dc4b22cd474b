//! `--trace-file`: the stages of a start in Chrome's trace event format, which chrome://tracing and Perfetto show.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::timeline::{Stage, Track};
use serde::Serialize;
use serde_json::{Value, json};

/// Every track, with the numbers and names of the process and the thread that stand for it.
const TRACKS: [(Track, Row); 5] = [
    (Track::Host, Row { pid: 1, process: "mvm", tid: 1, thread: "mvm run" }),
    (Track::Beside, Row { pid: 1, process: "mvm", tid: 2, thread: "beside it" }),
    (Track::Machine, Row { pid: 2, process: "mvm-vmm", tid: 1, thread: "the machine's process" }),
    (Track::Guest, Row { pid: 3, process: "guest", tid: 1, thread: "by the guest's clock" }),
    (Track::Agent, Row { pid: 3, process: "guest", tid: 2, thread: "agent, as the host sees it" }),
];

/// Where a track is drawn.
#[derive(Clone, Copy)]
struct Row {
    pid: u32,
    process: &'static str,
    tid: u32,
    thread: &'static str,
}

/// A file that can be written to.
#[derive(Debug)]
pub(super) struct TraceFile {
    path: PathBuf,
    file: File,
}

/// One event; times in microseconds.
#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    ph: char,
    pid: u32,
    tid: u32,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    /// How wide a moment is drawn: as high as its thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<char>,
    #[serde(skip_serializing_if = "Value::is_null")]
    args: Value,
}

impl TraceFile {
    /// Makes the file, or empties it: a trace that cannot be written is told before anything is started.
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        let file = File::create(path).context(|| format!("cannot write the trace {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes the stages of a start that came out like this. What goes on ends now.
    pub(super) fn write(mut self, stages: &[Stage], result: &Result<u8, Failure>) -> Result<(), Failure> {
        let text = serde_json::to_vec(&trace(stages, mvm_vmm::status::now(), result));
        let text = text.map_err(std::io::Error::from);
        let written = text.and_then(|text| self.file.write_all(&text));
        written.context(|| format!("cannot write the trace {}", self.path.display()))
    }
}

fn trace(stages: &[Stage], now: u64, result: &Result<u8, Failure>) -> Value {
    let zero = stages.iter().map(|stage| stage.begin_ns).min().unwrap_or(now);
    let names = TRACKS.iter().flat_map(|(_, row)| names(*row));
    let events = stages.iter().map(|stage| json!(event(stage, zero, now)));
    let outcome = match result {
        Ok(code) => json!({ "exit_code": code }),
        Err(failure) => json!({ "failure": failure.report() }),
    };
    json!({
        "traceEvents": names.chain(events).collect::<Vec<_>>(),
        "displayTimeUnit": "ms",
        "otherData": {
            "version": env!("CARGO_PKG_VERSION"),
            "clock": "CLOCK_MONOTONIC",
            "zero_ns": zero,
            "outcome": outcome,
        },
    })
}

/// What its process and its thread are called, and that they come in our order.
fn names(row: Row) -> [Value; 4] {
    let Row { pid, process, tid, thread } = row;
    let named =
        |what: &str, args: Value| json!({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": args});
    [
        named("process_name", json!({ "name": process })),
        named("process_sort_index", json!({ "sort_index": pid })),
        named("thread_name", json!({ "name": thread })),
        named("thread_sort_index", json!({ "sort_index": tid })),
    ]
}

fn event(stage: &Stage, zero: u64, now: u64) -> Event<'_> {
    let us = |ns: u64| ns as f64 / 1e3;
    let row = TRACKS.iter().find(|(track, _)| *track == stage.track).map_or(TRACKS[0].1, |(_, row)| *row);
    let end = stage.end_ns.unwrap_or(now);
    let moment = stage.is_moment();
    let mut args = serde_json::Map::new();
    args.extend(stage.detail.as_ref().map(|detail| ("detail".to_owned(), json!(detail))));
    args.extend(stage.end_ns.is_none().then(|| ("goes_on".to_owned(), json!(true))));
    Event {
        name: &stage.name,
        ph: if moment { 'i' } else { 'X' },
        pid: row.pid,
        tid: row.tid,
        ts: us(stage.begin_ns.saturating_sub(zero)),
        dur: (!moment).then(|| us(end.saturating_sub(stage.begin_ns))),
        s: moment.then_some('t'),
        args: if args.is_empty() { Value::Null } else { Value::Object(args) },
    }
}

#[cfg(test)]
mod tests {
    use mvm_runtime::timeline::Timeline;

    use super::*;

    fn drawn(timeline: &Timeline, result: Result<u8, Failure>) -> Value {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.json");
        std::fs::write(&path, "what was there before, and was longer than nothing").unwrap();
        TraceFile::create(&path).unwrap().write(&timeline.stages(), &result).unwrap();
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap()
    }

    fn events(trace: &Value, ph: &str) -> Vec<Value> {
        let all = trace["traceEvents"].as_array().unwrap().iter();
        all.filter(|event| event["ph"] == ph).cloned().collect()
    }

    #[test]
    fn a_stage_is_an_event_of_its_track_from_the_first_ones_begin() {
        let timeline = Timeline::default();
        timeline.note(Track::Host, "create container", (1_000_000, 3_500_250));
        timeline.note(Track::Guest, "boot kernel", (2_000_000, 3_000_000));
        timeline.note(Track::Host, "first byte of output", (3_000_000, 3_000_000));
        let trace = drawn(&timeline, Ok(42));
        let wanted = json!([
            {"name": "create container", "ph": "X", "pid": 1, "tid": 1, "ts": 0.0, "dur": 2500.25},
            {"name": "boot kernel", "ph": "X", "pid": 3, "tid": 1, "ts": 1000.0, "dur": 1000.0},
        ]);
        assert_eq!(Value::Array(events(&trace, "X")), wanted);
        let moment = json!([
            {"name": "first byte of output", "ph": "i", "pid": 1, "tid": 1, "ts": 2000.0, "s": "t"},
        ]);
        assert_eq!(Value::Array(events(&trace, "i")), moment);
        assert_eq!(trace["otherData"]["outcome"], json!({"exit_code": 42}));
        assert_eq!(trace["otherData"]["zero_ns"], 1_000_000);
    }

    #[test]
    fn every_track_has_names_and_numbers_of_its_own() {
        let trace = drawn(&Timeline::default(), Ok(0));
        let named = |what: &str| -> Vec<Value> {
            let all = events(&trace, "M").into_iter().filter(|event| event["name"] == what);
            all.map(|event| json!([event["pid"], event["tid"], event["args"]["name"]])).collect()
        };
        let threads = named("thread_name");
        assert_eq!(threads.len(), TRACKS.len());
        for (index, thread) in threads.iter().enumerate() {
            assert!(threads[..index].iter().all(|other| other[0] != thread[0] || other[1] != thread[1]));
        }
        assert!(named("process_name").contains(&json!([3, 2, "guest"])), "{trace}");
    }

    #[test]
    fn what_goes_on_when_the_trace_is_written_is_drawn_until_then_and_said_to() {
        let timeline = Timeline::default();
        let open = timeline.begin(Track::Machine, "run guest");
        open.detail("one of two");
        let trace = drawn(&timeline, Err(Failure::because("cannot start", Failure::new("no room"))));
        let event = &events(&trace, "X")[0];
        assert!(event["dur"].as_f64().unwrap() > 0.0, "{event}");
        assert_eq!(event["args"], json!({"detail": "one of two", "goes_on": true}));
        assert_eq!(trace["otherData"]["outcome"]["failure"], "cannot start\n  because: no room");
        drop(open);
    }

    #[test]
    fn a_trace_that_cannot_be_written_is_named() {
        let failure = TraceFile::create(Path::new("/no/such/directory/t.json")).unwrap_err();
        assert!(failure.report().starts_with("cannot write the trace /no/such/directory/t.json\n"));
    }
}
