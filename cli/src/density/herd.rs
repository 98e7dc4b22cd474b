//! The containers: started by the same program that a user calls, watched, and removed.

use std::collections::BTreeMap;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use mvm_runtime::container::Cost;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::state::{Home, ProcessId, Seen};
use mvm_runtime::template;
use mvm_runtime::usage::{KernelMemory, available, private_kib, processor_time, settled};
use nix::sys::signal::Signal;

use super::report::{Kernel, Memory, Report, Start};
use crate::terminal::block_signals;

/// Longest wait for processes that were ended to be gone: a host full of machines frees their memory for a while.
const DYING: Duration = Duration::from_secs(60);

/// What is to be started, and how.
pub(super) struct Herd {
    pub count: u32,
    pub parallel: u32,
    pub image: String,
    pub command: Vec<String>,
    pub memory_mib: u64,
    pub template: template::Choice,
    pub hold: Duration,
    pub home: Home,
}

/// Starts so far.
#[derive(Default)]
struct Progress {
    starts: Vec<Start>,
    /// How often each complaint was heard.
    failures: BTreeMap<String, u32>,
}

impl Herd {
    /// Starts all, watches them, and removes them whatever happened.
    pub(super) fn measure(&self) -> Result<Report, Failure> {
        // Removing must not be interrupted: nobody else knows what is to be removed.
        let signals = block_signals(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
            .context(|| "cannot hold signals back".to_owned())?;
        let stopped = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stopped);
        thread::spawn(move || {
            while signals.wait().is_ok() {
                seen.store(true, Ordering::Relaxed);
            }
        });
        self.warm()?;
        let failed = || "cannot tell the host's memory".to_owned();
        let before = Host::settled().context(failed)?;
        let began = Instant::now();
        let progress = self.start(&stopped);
        let started = began.elapsed();
        let mut report = Report::new(self.count, &progress.starts, progress.failures, started);
        let alive = self.alive()?;
        if !alive.is_empty() {
            report.memory = Some(memory(&alive, &before, &Host::settled().context(failed)?));
            report.idle_cpu_percent_per_1000 = self.watch(&alive, &stopped);
        }
        let began = Instant::now();
        let complaints = self.remove(&alive);
        report.teardown_s = began.elapsed().as_secs_f64();
        report.left = self.left(&alive)?;
        report.left.extend(complaints);
        report.kept_kib = Some(before.available.saturating_sub(settled().context(failed)?));
        report.stopped = stopped.load(Ordering::Relaxed);
        Ok(report)
    }

    /// Converts the image and makes the template: no part of any figure.
    fn warm(&self) -> Result<(), Failure> {
        let name = self.name(0);
        let output = self.run(&name)?;
        let removed = call(&["rm", "--force", &name])?;
        match (output.status.success(), removed.status.success()) {
            (true, true) => Ok(()),
            (false, _) => Err(Failure::because("cannot start a container", Failure::new(complaint(&output)))),
            (true, false) => {
                Err(Failure::because("cannot remove a container", Failure::new(complaint(&removed))))
            }
        }
    }

    fn name(&self, number: u32) -> String {
        format!("density-{}-{number}", std::process::id())
    }

    fn run(&self, name: &str) -> Result<Output, Failure> {
        let (memory, template) = (format!("{}M", self.memory_mib), self.template.to_string());
        let mut args = vec![
            "run",
            "--detach",
            "--net",
            "none",
            "--name",
            name,
            "--memory",
            &memory,
            "--template",
            &template,
        ];
        args.extend([self.image.as_str(), "--"]);
        args.extend(self.command.iter().map(String::as_str));
        call(&args)
    }

    /// Starts all from so many threads; each start is a line of the report.
    fn start(&self, stopped: &AtomicBool) -> Progress {
        let progress = Mutex::new(Progress::default());
        let next = AtomicU32::new(1);
        let bar = ProgressBar::new(self.count.into());
        let one = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number > self.count || stopped.load(Ordering::Relaxed) {
                    return;
                }
                let began = Instant::now();
                let result = self.run(&self.name(number));
                let ms = began.elapsed().as_secs_f64() * 1e3;
                let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                match result {
                    Ok(output) if output.status.success() => {
                        let available_kib = available().unwrap_or(0);
                        progress.starts.push(Start { number, ms, available_kib });
                    }
                    Ok(output) => *progress.failures.entry(complaint(&output)).or_default() += 1,
                    Err(failure) => *progress.failures.entry(failure.to_string()).or_default() += 1,
                }
                bar.inc(1);
            }
        };
        thread::scope(|scope| (0..self.parallel).for_each(|_| drop(scope.spawn(one))));
        bar.finish_and_clear();
        progress.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of ours that there are.
    fn alive(&self) -> Result<Vec<Seen>, Failure> {
        let prefix = format!("density-{}-", std::process::id());
        let mut all = self.home.list()?;
        all.retain(|seen| seen.record.name.starts_with(&prefix));
        Ok(all)
    }

    /// The share of one CPU in percent that a thousand of them use; `None` if nobody watched.
    fn watch(&self, alive: &[Seen], stopped: &AtomicBool) -> Option<f64> {
        if self.hold.is_zero() {
            return None;
        }
        let used = || -> Duration {
            processes(alive).filter_map(|it| processor_time(it.pid.unsigned_abs()).ok()).sum()
        };
        let (began, before) = (Instant::now(), used());
        while began.elapsed() < self.hold && !stopped.load(Ordering::Relaxed) {
            // In short pieces, so that who does not want to wait need not.
            thread::sleep(self.hold.saturating_sub(began.elapsed()).min(Duration::from_millis(200)));
        }
        let share = used().saturating_sub(before).as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
        Some(share * 1000.0 / alive.len() as f64)
    }

    /// Removes them, as many at a time as were started; what was complained of.
    fn remove(&self, all: &[Seen]) -> Vec<String> {
        let (next, complaints) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let one = || {
            while let Some(seen) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                let said = match call(&["rm", "--force", &seen.record.id]) {
                    Ok(output) if output.status.success() => continue,
                    Ok(output) => complaint(&output),
                    Err(failure) => failure.to_string(),
                };
                complaints.lock().unwrap_or_else(PoisonError::into_inner).push(said);
            }
        };
        thread::scope(|scope| (0..self.parallel).for_each(|_| drop(scope.spawn(one))));
        complaints.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there still is of them after their removal.
    fn left(&self, were: &[Seen]) -> Result<Vec<String>, Failure> {
        let mut left: Vec<_> =
            self.alive()?.into_iter().map(|seen| format!("container {}", seen.record.name)).collect();
        let deadline = Instant::now() + DYING;
        for process in processes(were) {
            if !process.await_end(deadline) {
                left.push(format!("process {}", process.pid));
            }
        }
        Ok(left)
    }
}

/// Machines and their owners.
fn processes(of: &[Seen]) -> impl Iterator<Item = ProcessId> {
    of.iter().flat_map(|seen| [Some(seen.record.owner), seen.record.machine]).flatten()
}

/// The host's memory at one time, in kB.
struct Host {
    available: i64,
    kernel: KernelMemory,
}

impl Host {
    /// Once it stands still.
    fn settled() -> std::io::Result<Self> {
        Ok(Self { available: settled()?, kernel: KernelMemory::now()? })
    }
}

fn memory(alive: &[Seen], before: &Host, now: &Host) -> Memory {
    let each = |kib: f64| kib / alive.len() as f64;
    let more =
        |part: fn(&KernelMemory) -> i64| each(part(&now.kernel).saturating_sub(part(&before.kernel)) as f64);
    let mut memory = Memory {
        taken_kib: each(before.available.saturating_sub(now.available) as f64),
        kernel: Kernel {
            stacks_kib: more(|kernel| kernel.stacks),
            page_tables_kib: more(|kernel| kernel.page_tables),
            slab_kib: more(|kernel| kernel.slab),
            percpu_kib: more(|kernel| kernel.percpu),
        },
        ..Memory::default()
    };
    for seen in alive {
        // What has ended meanwhile costs nothing any more.
        let machine = seen.record.machine.and_then(|it| Cost::of(it.pid, seen.record.memory_mib << 20).ok());
        let machine = machine.unwrap_or_default();
        memory.guest_private_kib += each(machine.guest_private_kib as f64);
        memory.guest_shared_kib += each(machine.guest_shared_kib as f64);
        memory.vmm_kib += each(machine.vmm_kib as f64);
        let own = seen.record.machine.and_then(|it| private_kib(it.pid).ok()).unwrap_or(0);
        memory.vmm_private_kib += each((own as f64 - machine.guest_private_kib as f64).max(0.0));
        memory.owner_kib += each(private_kib(seen.record.owner.pid).unwrap_or(0) as f64);
    }
    let known = memory.guest_private_kib + memory.vmm_kib + memory.owner_kib + memory.kernel.total_kib();
    memory.rest_kib = memory.taken_kib - known;
    memory
}

/// Calls this program as a user would.
fn call(args: &[&str]) -> Result<Output, Failure> {
    let program = std::env::current_exe().context(|| "cannot find this program".to_owned())?;
    let mut command = Command::new(&program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
    command.output().context(|| format!("cannot start {}", program.display()))
}

/// The failure it reported, its reasons behind it; progress comes before that.
fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let report = text.rfind("mvm: ").map_or(&*text, |at| &text[at + "mvm: ".len()..]);
    let lines: Vec<_> = report.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { format!("it ended with {}", output.status) } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn a_complaint_is_the_failure_with_its_reasons_and_not_the_progress_before_it() {
        let said = |text: &str| {
            let stderr = text.as_bytes().to_vec();
            complaint(&Output { status: ExitStatus::from_raw(125 << 8), stdout: Vec::new(), stderr })
        };
        let text = "mvm: reading files\nmvm: cannot start it\n  because: no room\n  help:    make some\n";
        assert_eq!(said(text), "cannot start it; because: no room; help:    make some");
        assert_eq!(said("gone\n"), "gone");
        assert_eq!(said(""), "it ended with exit status: 125");
    }
}
