//! Which rows of the table a run had no use for, by what strace(1) saw.

use std::fs;

use super::*;

/// Names rows that no thread of the machines whose calls are below `MVM_CALLS` made. A row may still have its reason: nobody
/// aborts in a test, and no host of ours swaps. `CONTRIBUTING.md` says how to get such a directory.
#[test]
#[ignore = "needs what strace saw"]
fn sec_13_rows_that_a_run_had_no_use_for() {
    let directory = std::env::var("MVM_CALLS").expect("MVM_CALLS names a directory");
    let traces = fs::read_dir(directory).unwrap().map(|entry| {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mut used = BTreeSet::new();
    for trace in traces {
        let Some(thread) = thread(&trace) else { continue };
        let calls = trace.lines().filter_map(|line| line.split_once('(').map(|(call, _)| call.to_owned()));
        used.extend(calls.map(|call| (format!("{thread:?}"), call)));
    }
    for row in CALLS {
        let call = row.reason.0.trim_start_matches("SYS_");
        let idle = row.threads.iter().map(|thread| format!("{thread:?}"));
        let idle: Vec<_> = idle.filter(|thread| !used.contains(&(thread.clone(), call.to_owned()))).collect();
        if !idle.is_empty() {
            println!("{call} of {}: {}", idle.join(", "), row.reason.1);
        }
    }
}

/// Whose trace it is: threads are named when they begin.
fn thread(trace: &str) -> Option<Thread> {
    let Some((_, named)) = trace.split_once("prctl(PR_SET_NAME, \"") else { return Some(Thread::Main) };
    let name = named.split('"').next().unwrap_or_default();
    match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "vcpu" => Some(Thread::Vcpu),
        "memory" => Some(Thread::Memory),
        "pause" | "detach" => Some(Thread::Main),
        name if name == "io" || name.starts_with("io-") => Some(Thread::Io),
        _ => None,
    }
}
