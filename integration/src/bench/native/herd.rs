//! Thousands of machines at once: whether the last starts as the first did, and what they cost while they do nothing.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use super::keeper::Keeper;
use super::ms;
use super::subject::{Running, Setup, Subject};
use crate::bench::Figure;
use crate::bench::stats::median;
use mvm_runtime::state::ProcessId;
use mvm_runtime::usage::{free, processor_time, settled};

/// Machines at once.
const MACHINES: usize = 3500;
/// Starts at either end whose medians are compared.
const SPAN: usize = 100;
/// Free memory of the host that is not touched before, in kB.
const UNTOUCHED: i64 = 512 << 10;
/// How long the herd is watched.
const WATCH: Duration = Duration::from_secs(10);

pub(super) fn figures(setup: &Setup) -> io::Result<Vec<Figure>> {
    // Each machine has a file, which the keeper holds.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    touch()?;
    let keeper = Keeper::new()?;
    let before = settled()?;
    let mut herd = Vec::with_capacity(MACHINES);
    let mut times = Vec::with_capacity(MACHINES);
    let began = Instant::now();
    for _ in 0..MACHINES {
        let mut running = Subject::Mvm.start(setup)?;
        running.give_up().map_or(Ok(()), |report| keeper.keep(&report))?;
        times.push(ms(running.own_ns.unwrap_or(running.seen_ns)));
        herd.push(running);
    }
    let started_s = began.elapsed().as_secs_f64();
    let memory_kb = (before - settled()?) as f64 / MACHINES as f64;
    let (alive, idle) = watch(&herd)?;
    let pids: Vec<_> = herd.iter().map(Running::pid).collect();
    let began = Instant::now();
    herd.into_iter().try_for_each(|one| one.end().map(drop))?;
    let ended_s = began.elapsed().as_secs_f64();
    keeper.end()?;
    let left = pids.iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).count();
    if left > 0 {
        return Err(io::Error::other(format!("{left} machines are left")));
    }

    let (first, last) = (median(&times[..SPAN]), median(&times[times.len() - SPAN..]));
    let rows = vec![json!({"start_ms": times, "started_s": started_s, "ended_s": ended_s,
        "memavailable_kb_each": memory_kb})];
    Ok(figures_of(alive, (first, last), idle, (started_s, ended_s, memory_kb), &rows))
}

/// Has the host's free memory be there. If the host is a virtual machine itself, a page costs its first user many times
/// what it costs the next; that is not the start of a machine.
fn touch() -> io::Result<()> {
    let bytes = (free()? - UNTOUCHED).max(0) << 10;
    std::hint::black_box(vec![1_u8; usize::try_from(bytes).map_err(io::Error::other)?]);
    Ok(())
}

fn figures_of(
    alive: usize,
    (first, last): (f64, f64),
    idle: f64,
    (started_s, ended_s, memory_kb): (f64, f64, f64),
    rows: &[Value],
) -> Vec<Figure> {
    let guests = "with a halted flat guest of 128 MiB";
    let count = Figure::new(
        "native.herd_count",
        alive as f64,
        "",
        &format!("machines {guests} alive at once, started one after the other; all gone after their end"),
    );
    let over = Figure::new(
        "native.herd_start_p50_last_over_first",
        last / first,
        "x",
        &format!(
            "spawn to first guest instruction, median of the last {SPAN} of the herd over that of the first; the host's free \
             memory was touched before"
        ),
    );
    let cpu = Figure::new(
        "native.herd_idle_cpu_percent_per_1000",
        idle,
        "%",
        &format!(
            "processor time of all machines of the herd in {} s, as a share of one CPU, for 1000 of them",
            WATCH.as_secs()
        ),
    );
    vec![
        count
            .peer("started_s", started_s)
            .peer("ended_s", ended_s)
            .peer("memory_kb", memory_kb)
            .raw(rows.to_vec()),
        over.peer("first_ms", first).peer("last_ms", last).raw(rows.to_vec()),
        cpu.raw([json!({"machines": alive, "percent_of_a_cpu": idle * alive as f64 / 1000.0})]),
    ]
}

/// How many machines live, and the share of a CPU in percent that a thousand of them use.
fn watch(herd: &[Running]) -> io::Result<(usize, f64)> {
    let used =
        || herd.iter().map(|one| processor_time(one.pid().unsigned_abs())).sum::<io::Result<Duration>>();
    let (start, before) = (Instant::now(), used()?);
    thread::sleep(WATCH);
    let (time, after) = (start.elapsed(), used()?);
    let share = after.saturating_sub(before).as_secs_f64() / time.as_secs_f64() * 100.0;
    let alive = herd.iter().filter(|one| ProcessId::of(one.pid()).is_some()).count();
    Ok((alive, share * 1000.0 / alive as f64))
}
