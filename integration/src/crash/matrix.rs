//! Every change of every scenario, one run for each: the process is killed there, or the change fails, and afterwards
//! the host is asked whether anything is left.

use std::io::{self, Write, stderr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::picture::Picture;
use super::scenario::{NAME, RUN, Scenario};
use super::tracer::{Act, Order, Traced};
use super::world::{COLD, IMAGE, Place, mvm};

/// Longest any command may take, under a tracer on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);
/// A container that is there all the time.
const NEIGHBOUR: &str = "neighbour";

/// What came of all runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many there were.
    pub runs: usize,
    /// After how many something was left, or something of others was gone.
    pub leaks: usize,
    /// In how many a command hung, said the wrong thing or failed where it should not.
    pub wrong: usize,
}

/// One host, a program under test, and a container on it that must not notice anything.
#[derive(Debug)]
pub struct Matrix {
    program: PathBuf,
    neighbour: Value,
    before: Picture,
    /// What a whole run leaves of images, for good.
    images: Vec<PathBuf>,
    place: Place,
    /// What came of the runs so far.
    pub totals: Totals,
}

/// How a command ended and what it said.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Matrix {
    /// Starts the neighbour.
    ///
    /// # Errors
    /// It does not start.
    pub fn new(program: PathBuf) -> Result<Self, String> {
        let mut matrix = Self {
            program,
            neighbour: Value::Null,
            before: Picture::default(),
            images: Vec::new(),
            place: Place::Cold,
            totals: Totals::default(),
        };
        matrix.must(RUN)?;
        matrix.images = cold();
        std::fs::remove_dir_all(COLD).map_err(text)?;
        matrix.place = Place::Disk;
        matrix.must(RUN)?;
        matrix.place = Place::Memory;

        // What the first of all containers makes for good is there before the first picture.
        matrix.must(RUN)?;
        matrix.must(&["run", "--net", "host-only", "--disk-size", "16M", IMAGE, "--", "true"])?;
        matrix.must(&["run", "--detach", "--name", NEIGHBOUR, "--net", "nat", IMAGE, "--", "sleep"])?;
        matrix.must(&["gc"])?;
        matrix.neighbour = matrix.listed(NEIGHBOUR)?.ok_or("the neighbour is not listed")?;
        matrix.before = Picture::take();
        Ok(matrix)
    }

    /// The changes that the scenario's victim makes if nobody disturbs it.
    ///
    /// # Errors
    /// The scenario does not work, or leaves something.
    pub fn changes(&mut self, scenario: &Scenario) -> Result<Vec<String>, String> {
        let (changes, problems) = self.once(scenario, None)?;
        match problems.is_empty() {
            true => Ok(changes),
            false => Err(format!("{} undisturbed: {}", scenario.name, problems.join("; "))),
        }
    }

    /// Disturbs the scenario's victim at its changes, each `step`th; all that went wrong, named.
    ///
    /// # Errors
    /// The scenario does not work by itself.
    pub fn sweep(
        &mut self,
        scenario: &Scenario,
        step: usize,
        act: impl Fn(&str) -> Option<Act>,
    ) -> Result<Vec<String>, String> {
        let changes = self.changes(scenario)?;
        let mut told = Vec::new();
        for (index, change) in changes.iter().enumerate().step_by(step) {
            let Some(act) = act(change) else { continue };
            self.totals.runs += 1;
            let (made, problems) = self.once(scenario, Some((index + 1, act)))?;
            let at = made.get(index).unwrap_or(change);
            let leaks = problems.iter().filter(|it| it.starts_with(['+', '-'])).count();
            self.totals.leaks += usize::from(leaks > 0);
            self.totals.wrong += usize::from(leaks < problems.len());
            if !problems.is_empty() {
                let line =
                    format!("{} {act:?} at {} ({at}): {}", scenario.name, index + 1, problems.join("; "));
                let _ = writeln!(stderr(), "{line}");
                told.push(line);
                // The next run begins on a clean host, or with what cannot be cleaned.
                self.before = Picture::take();
            }
        }
        Ok(told)
    }

    /// One run: the changes the victim made and what was wrong.
    fn once(
        &mut self,
        scenario: &Scenario,
        act: Option<(usize, Act)>,
    ) -> Result<(Vec<String>, Vec<String>), String> {
        self.place = scenario.place;
        for command in scenario.before {
            self.must(command)?;
        }
        if scenario.orphaned {
            self.orphan()?;
        }
        let out = tempfile::tempfile().map_err(text)?;
        let err = tempfile::tempfile().map_err(text)?;
        let mut command = mvm(&self.program, self.place, scenario.command);
        command.stdin(Stdio::null());
        command.stdout(out.try_clone().map_err(text)?).stderr(err.try_clone().map_err(text)?);
        let traced = Traced::start(command, Order { victim: scenario.victim, act });
        let mut problems = Vec::new();
        let code = traced.wait(PATIENCE).map_err(text)?;
        problems.extend(complaint(scenario.command, act, code, &read(err).map_err(text)?));
        if code == Some(0) {
            for command in scenario.after {
                let ended = self.run(command)?;
                problems.extend(complaint(command, act, ended.code, &ended.stderr));
                if ended.code != Some(0) {
                    break;
                }
            }
        }
        self.recover(&mut problems)?;
        problems.extend(self.before.await_return());
        // Whatever is followed is gone by now, or is what was complained of.
        let changes = if problems.is_empty() { traced.changes() } else { Vec::new() };
        Ok((changes, problems))
    }

    /// What a person would do: look, clean up, remove what is still there. Cleaning up twice is cleaning up once.
    fn recover(&mut self, problems: &mut Vec<String>) -> Result<(), String> {
        let mut check = |ok: bool, what: String| {
            if !ok {
                problems.push(what);
            }
        };
        if self.place != Place::Disk {
            let same = self.listed(NEIGHBOUR)?.as_ref() == Some(&self.neighbour);
            check(same, "the neighbour is listed otherwise".into());
        }
        let ended = self.run(&["gc"])?;
        check(ended.code == Some(0), format!("gc: {:?} {}", ended.code, ended.stderr));
        if let Some(left) = self.listed(NAME)? {
            let ended = self.run(&["rm", "--force", NAME])?;
            check(ended.code == Some(0), format!("rm of {left}: {:?} {}", ended.code, ended.stderr));
            check(self.listed(NAME)?.is_none(), "it is listed after it was removed".into());
        }
        let ended = self.run(&["gc"])?;
        let nothing = ended.code == Some(0) && ended.stderr.trim() == "nothing to clean up";
        check(nothing, format!("gc again: {:?} {}", ended.code, ended.stderr));
        if self.place == Place::Cold {
            // Whoever makes the image next sweeps what the one before has left.
            self.must(RUN)?;
            check(cold() == self.images, format!("+ images: {:?}", cold()));
            std::fs::remove_dir_all(COLD).map_err(text)?;
        }
        Ok(())
    }

    /// Kills the owner of the scenario's container.
    fn orphan(&self) -> Result<(), String> {
        let output = self.run(&["inspect", NAME])?;
        let found: Value = serde_json::from_str(&output.stdout).map_err(text)?;
        let owner = found[0]["owner"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let owner = nix::unistd::Pid::from_raw(owner.ok_or_else(|| format!("no owner in {found}"))?);
        nix::sys::signal::kill(owner, nix::sys::signal::Signal::SIGKILL).map_err(text)
    }

    /// A container as it is listed.
    fn listed(&self, name: &str) -> Result<Option<Value>, String> {
        let ended = self.run(&["ps", "--all", "--format", "json"])?;
        let list: Value = serde_json::from_str(&ended.stdout)
            .map_err(|error| format!("ps: {:?} {}: {error}", ended.code, ended.stderr))?;
        let mut found = list.as_array().and_then(|list| list.iter().find(|it| it["name"] == name)).cloned();
        // How long it has been there is no difference.
        if let Some(fields) = found.as_mut().and_then(Value::as_object_mut) {
            fields.retain(|key, _| !["age_s", "up_s", "memory", "cpu"].contains(&key.as_str()));
        }
        Ok(found)
    }

    fn must(&self, arguments: &[&str]) -> Result<(), String> {
        let ended = self.run(arguments)?;
        match ended.code {
            Some(0) => Ok(()),
            code => Err(format!("{} ended with {code:?}: {}", arguments.join(" "), ended.stderr)),
        }
    }

    /// Runs a command to its end, or for as long as anybody would wait.
    fn run(&self, arguments: &[&str]) -> Result<Ended, String> {
        let (out, err) = (tempfile::tempfile().map_err(text)?, tempfile::tempfile().map_err(text)?);
        let mut command: Command = mvm(&self.program, self.place, arguments);
        command.stdin(Stdio::null());
        command.stdout(out.try_clone().map_err(text)?).stderr(err.try_clone().map_err(text)?);
        let mut child = command.spawn().map_err(text)?;
        let end = Instant::now() + PATIENCE;
        let code = loop {
            match child.try_wait().map_err(text)? {
                Some(status) => break status.code(),
                None if Instant::now() > end => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        Ok(Ended { code, stdout: read(out).map_err(text)?, stderr: read(err).map_err(text)? })
    }
}

/// What is wrong with how a command ended: it ends in time, with one error that says what is wrong or none.
fn complaint(command: &[&str], act: Option<(usize, Act)>, code: Option<i32>, said: &str) -> Option<String> {
    let what = command.first().unwrap_or(&"");
    match code {
        None => Some(format!("{what} hangs")),
        Some(0) => None,
        Some(code) if act.is_none() => Some(format!("{what} ended with {code}: {said}")),
        Some(137) if matches!(act, Some((_, Act::Kill))) => None,
        Some(101 | 134) => Some(format!("{what} panicked: {said}")),
        // What could not be cleaned up is told under the container's name.
        Some(_) if said.contains("mvm: ") || command == ["gc"] && said.contains("because:") => None,
        Some(code) => Some(format!("{what} ended with {code} and no error: {said}")),
    }
}

/// What there is of images that are made anew.
fn cold() -> Vec<PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![PathBuf::from(COLD)]);
    while let Some(dir) = left.pop() {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let entries: Vec<_> = entries.collect();
        left.extend(entries.iter().filter(|path| path.is_dir()).cloned());
        found.extend(entries);
    }
    found.sort();
    found
}

/// How a change fails, by its kind: what a full disk, a full table or a broken device says.
#[must_use]
pub fn faults(change: &str) -> Option<Act> {
    let kind = change.split(' ').next().unwrap_or_default();
    Some(Act::Fail(match kind {
        // A process that wants to end, or to end another, cannot be refused that.
        "exit" | "kill" | "talk" => return None,
        "fork" => libc::EAGAIN,
        "create" | "bind" => libc::EMFILE,
        "memfd_create" | "netlink" => libc::ENOMEM,
        "write" | "mkdir" | "allocate" | "truncate" => libc::ENOSPC,
        _ => libc::EIO,
    }))
}

fn read(mut file: std::fs::File) -> io::Result<String> {
    use std::io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
