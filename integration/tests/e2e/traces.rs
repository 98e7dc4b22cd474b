//! Traces of starts: every stage is there, on its track and in its place, and together they are the whole.

use std::collections::BTreeMap;
use std::fs;
use std::process::Output;

use mvm_integration::vm::{image, scratch};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_trace_has_every_stage_of_a_machine_that_boots", boots),
    ("a_trace_has_every_stage_of_a_machine_made_of_a_template", clones),
    ("a_trace_of_a_detached_start_ends_when_its_process_runs", detached),
    ("a_start_that_fails_leaves_a_trace_of_what_there_was", fails),
];

/// Part of the whole that the stages of the host must add up to.
const WHOLE: f64 = 0.95;
/// No kernel boots in less, in microseconds.
const BOOT: f64 = 5000.0;
/// Rounding of times, in microseconds.
const ROUNDING: f64 = 0.002;

#[derive(Clone, Debug, Deserialize)]
struct Event {
    name: String,
    ph: String,
    pid: u32,
    tid: u32,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Value,
}

impl Event {
    fn end(&self) -> f64 {
        self.ts + self.dur
    }
}

struct Trace {
    events: Vec<Event>,
    other: Value,
}

/// Runs `mvm run --trace-file … ARGUMENTS` and reads what it wrote.
fn traced(name: &str, arguments: &[&str]) -> (Output, Trace) {
    let path = scratch().join(format!("{name}.trace.json"));
    let mut command = crate::mvm();
    command.args(["run", "--trace-file"]).arg(&path).args(arguments);
    let output = command.output().expect("it starts");
    let mut read: Value = serde_json::from_slice(&fs::read(&path).expect("a trace")).expect("JSON");
    let events = serde_json::from_value(read["traceEvents"].take()).expect("a list of events");
    (output, Trace { events, other: read["otherData"].take() })
}

impl Trace {
    /// Everything on the rows of the process that is called so, in order.
    fn of(&self, process: &str) -> Vec<&Event> {
        let named = |event: &&Event| event.ph == "M" && event.args["name"] == process;
        let pid = self.events.iter().find(named).unwrap_or_else(|| panic!("no {process}")).pid;
        self.events.iter().filter(|event| event.pid == pid && event.ph != "M").collect()
    }

    /// Whether these began in this order, whatever else did.
    fn assert_order(&self, process: &str, names: &[&str]) {
        let events = self.of(process);
        let mut began = events.iter().map(|event| event.name.as_str());
        for name in names {
            assert!(began.any(|it| it == *name), "{name:?} is not there, or not in its place: {events:#?}");
        }
        assert!(events.windows(2).all(|two| two[0].ts <= two[1].ts), "{events:#?}");
    }

    fn get(&self, name: &str) -> &Event {
        let found = self.events.iter().find(|event| event.name == name);
        found.unwrap_or_else(|| panic!("no {name:?}: {:#?}", self.events))
    }

    /// Stages of one row lie within or behind each other, and none of them goes on for longer than the host's.
    fn assert_sound(&self) {
        for event in self.events.iter().filter(|event| event.ph == "X") {
            let row =
                self.events.iter().filter(|it| it.ph == "X" && (it.pid, it.tid) == (event.pid, event.tid));
            for other in row.filter(|it| it.ts < event.ts) {
                let behind = other.end() <= event.ts + ROUNDING;
                let within = event.end() <= other.end() + ROUNDING;
                assert!(behind || within, "{event:?} overlaps {other:?}");
            }
        }
        let until = self.host().last().map_or(0.0, |event| event.end());
        let ended = self.events.iter().filter(|event| event.args["goes_on"].is_null());
        let last = ended.map(Event::end).fold(0.0, f64::max);
        assert!(last <= until + ROUNDING, "the host saw the end of it all: {last} and {until}");
    }

    /// The host's stages that lie in no other, in order.
    fn host(&self) -> Vec<&Event> {
        let mut outermost: Vec<&Event> = Vec::new();
        for event in self.of("mvm").into_iter().filter(|event| event.ph == "X") {
            if outermost.last().is_none_or(|last| event.ts + ROUNDING >= last.end()) {
                outermost.push(event);
            }
        }
        outermost
    }

    /// Time between the host's stages, in microseconds, by the stages it lies between.
    fn gaps(&self) -> BTreeMap<(String, String), f64> {
        let (mut gaps, mut before, mut until) = (BTreeMap::new(), "the beginning", 0.0);
        for event in self.host() {
            *gaps.entry((before.to_owned(), event.name.clone())).or_default() += (event.ts - until).max(0.0);
            (before, until) = (&event.name, event.end());
        }
        gaps
    }

    /// That the host's stages are the whole. Time that the host took from mvm between two stages is in one run; a stage
    /// that is missing is between the same two in each, so `again` tells what is mvm's.
    fn assert_whole(&self, again: impl FnOnce() -> Self) {
        let until = |trace: &Self| trace.host().last().map_or(0.0, |event| event.end());
        let missing =
            |gaps: &BTreeMap<_, f64>, whole: f64| gaps.values().sum::<f64>() > (1.0 - WHOLE) * whole;
        let gaps = self.gaps();
        if !missing(&gaps, until(self)) {
            return;
        }
        let again = again();
        let (others, whole) = (again.gaps(), until(self).min(until(&again)));
        let both: BTreeMap<_, _> =
            gaps.into_iter().filter_map(|(at, gap)| Some((at.clone(), gap.min(*others.get(&at)?)))).collect();
        assert!(!missing(&both, whole), "between these there is more, of {whole} us: {both:#?}");
    }
}

const PROCESS: [&str; 7] = [
    "execute program",
    "read configuration",
    "map memory and what is loaded into it",
    "give it to KVM",
    "make devices",
    "make CPUs",
    "run guest",
];

/// From the image to the end, with what lies between for this way of making a machine.
fn assert_host(trace: &Trace, between: &[&str]) {
    let before =
        ["find image", "make specification", "take container on", "plan machine", "create container"];
    let after = [
        "start its process",
        "run its process",
        "its process has ended",
        "tear down",
        "end machine",
        "clean up",
        "keep record",
    ];
    let disks = ["make disks", "find kernel and agent", "choose template"];
    let started = ["open its files", "spawn mvm-vmm", "wait for the agent's call", "greet agent"];
    let names = [&before[..], &disks, &between[..1], &started, &between[1..], &after].concat();
    trace.assert_order("mvm", &names);
    // Whoever waits for the process and whoever reads what it wrote are two: either may be first.
    let (first, run) = (trace.get("first byte of output"), trace.get("run its process"));
    assert!(first.ph == "i" && run.ts <= first.ts && first.ts <= run.end(), "{first:?} not in {run:?}");
}

fn boots() {
    let image = image().to_str().expect("text");
    let arguments = ["--template", "never", image, "--", "sh", "-c", "echo hello; exit 3"];
    let (output, trace) = traced("cold", &arguments);
    assert_eq!((output.status.code(), &*output.stdout), (Some(3), &b"hello\n"[..]), "{output:?}");
    trace.assert_sound();
    trace.assert_whole(|| traced("cold-again", &arguments).1);
    assert_host(&trace, &["boot machine"]);
    trace.assert_order("mvm-vmm", &PROCESS);
    let agent = ["boot until the agent calls", "identity is given", "configure guest", "set up container"];
    trace.assert_order("guest", &agent);
    trace
        .assert_order("guest", &["boot kernel", "make the agent's mounts", "dial the host", "start process"]);
    let (kernel, call) = (trace.get("boot kernel"), trace.get("boot until the agent calls"));
    assert!(kernel.dur > BOOT && kernel.end() <= call.end() + 1e6, "{kernel:?} of {call:?}");
    let doubt = kernel.args["detail"].as_str().expect("how sure it is");
    assert!(doubt.contains("by the guest's clock, ±"), "{doubt}");
    let guest = trace.get("run guest");
    let (run, ended) = (trace.get("run its process"), trace.get("end machine"));
    assert!(run.end() < guest.end() && guest.end() <= ended.end(), "{guest:?}");
    assert_eq!(trace.other["outcome"], json!({"exit_code": 3}));
}

fn clones() {
    let image = image().to_str().expect("text");
    let arguments = ["--template", "always", image, "--", "echo", "hello"];
    let (output, trace) = traced("clone", &arguments);
    assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"hello\n"[..]), "{output:?}");
    trace.assert_sound();
    trace.assert_whole(|| traced("clone-again", &arguments).1);
    assert_host(&trace, &["go on from template", "plug disks and cards in"]);
    trace.assert_order("mvm-vmm", &PROCESS);
    let agent = ["go on until the agent calls", "identity is given", "put clock right", "configure guest"];
    trace.assert_order("guest", &agent);
    trace.assert_order("guest", &["set up container", "start process"]);
    // What its clock says of a boot is that of the template.
    assert!(trace.events.iter().all(|event| event.name != "boot kernel"));
}

fn detached() {
    let image = image().to_str().expect("text");
    let run = |name: &str| traced(name, &["--detach", "--name", name, image, "--", "sleep", "1000"]);
    let remove = |name: &str| {
        let removed = crate::mvm().args(["rm", "--force", name]).output().expect("it starts");
        assert!(removed.status.success(), "{removed:?}");
    };
    let (output, trace) = run("traced");
    assert!(output.status.success(), "{output:?}");
    trace.assert_sound();
    let names =
        ["find image", "leave owner behind", "take container on", "create container", "start its process"];
    trace.assert_order("mvm", &names);
    assert_eq!(trace.get("run guest").args["goes_on"], json!(true));
    remove("traced");
    trace.assert_whole(|| {
        let (_, trace) = run("traced-again");
        remove("traced-again");
        trace
    });
}

fn fails() {
    let image = image().to_str().expect("text");
    let arguments = ["--template", "never", image, "--", "/no/such/program"];
    let (output, trace) = traced("fails", &arguments);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    trace.assert_sound();
    trace.assert_whole(|| traced("fails-again", &arguments).1);
    trace.assert_order("mvm", &["find image", "create container", "start its process", "tear down"]);
    let why = trace.other["outcome"]["failure"].as_str().expect("a failure");
    assert!(why.contains("/no/such/program"), "{why}");
    assert!(trace.events.iter().all(|event| event.name != "run its process"));
}
