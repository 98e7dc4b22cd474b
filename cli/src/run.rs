//! `mvm run`: a container in a machine of its own, on this terminal with its exit code as ours, or left behind.

mod own;
pub(crate) mod progress;
mod trace;

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::Path;

use mvm_runtime::container::{Overrides, Wishes, root_file_system, spec, state_dir};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::net::Publish;
use mvm_runtime::owner::{Job, JobNetwork};
use mvm_runtime::sandbox::MachineLauncher;
use mvm_runtime::state::{Home, Restart};
use mvm_runtime::template::Maker;
use mvm_runtime::timeline::{Timeline, Track};

use self::own::Audience;
use self::trace::TraceFile;
use crate::args::Run;
use crate::stdio;

pub(crate) use self::own::{From, Order, leave_behind, left_behind};

/// Longest file of variables, in bytes.
const MAX_ENV_FILE: u64 = 1 << 20;

pub(crate) fn run(options: Run) -> Result<u8, Failure> {
    stdio::check_terminal(options.tty && !options.detach)?;
    if options.restart != Restart::No && !options.detach {
        return Err(Failure::new("cannot restart a container that is not detached").help("add --detach"));
    }
    let Some(path) = &options.trace_file else { return start(&options, &Timeline::default()) };
    let file = TraceFile::create(path)?;
    let timeline = Timeline::default();
    let result = start(&options, &timeline);
    if let Err(failure) = file.write(&timeline.stages(), &result) {
        // How the container ended is what the caller waits for.
        crate::complain(&failure);
    }
    result
}

fn start(options: &Run, timeline: &Timeline) -> Result<u8, Failure> {
    let stage = timeline.begin(Track::Host, "find image");
    let state = state_dir();
    let image = root_file_system(&options.image, &state, &mut progress::Noted::new(timeline))?;
    drop(stage);
    let stage = timeline.begin(Track::Host, "make specification");
    let id = generated_id()?;
    let name = options.name.as_ref().map_or_else(|| id.clone(), ToString::to_string);
    // What is wrong with the command is said before a machine is booted for it.
    let mut spec = spec(&image.config, &wishes(options, &name)?)?;
    spec.set_annotations(Some(annotations(options)));
    let job = Job {
        id,
        name,
        labels: labels(&options.label),
        image: options.image.clone(),
        rootfs: image.path.clone(),
        spec,
        restart: options.restart,
        remove: options.rm || !options.detach,
        cpus: options.shape.cpus.get(),
        memory_mib: options.shape.memory.mib(),
        net: JobNetwork {
            choice: options.net.to_string(),
            publish: options.publish.iter().map(Publish::as_given).collect(),
            dns: options.dns.clone(),
            mtu: options.mtu,
        },
        stdin: options.interactive,
        stats: options.stats,
    };
    drop(stage);
    let order = Order { job, from: None, timeline: timeline.clone() };
    if options.detach {
        let _stage = timeline.begin(Track::Host, "leave owner behind");
        leave_behind(&order)?;
        return crate::life::print(&format!("{}\n", order.job.id)).map(|()| 0);
    }
    let home = Home::default_place();
    own::own(&order, &home, &launcher(timeline), Audience::Terminal(stdio::hold_signals()?), || ())
}

/// Makes machines of this host. A missing template is made by a process of its own: this one may be gone soon.
fn launcher(timeline: &Timeline) -> MachineLauncher {
    let maker = std::env::current_exe().map_or(Maker::Thread, Maker::Program);
    MachineLauncher { maker, timeline: Some(timeline.clone()), ..MachineLauncher::default() }
}

/// Twelve hex digits, as docker names a container.
pub(crate) fn generated_id() -> Result<String, Failure> {
    mvm_runtime::hex::random::<6>()
}

/// Variables as given, or of our own environment where only the name is.
pub(crate) fn passed_on(variables: &[String]) -> Vec<String> {
    let value = |variable: &String| match variable.split_once('=') {
        Some(_) => Some(variable.clone()),
        None => std::env::var(variable).ok().map(|value| format!("{variable}={value}")),
    };
    variables.iter().filter_map(value).collect()
}

fn wishes(options: &Run, name: &str) -> Result<Wishes, Failure> {
    let mut env = Vec::new();
    for file in &options.env_file {
        env.extend(variables_in(file)?);
    }
    env.extend(passed_on(&options.env));
    Ok(Wishes {
        overrides: Overrides {
            entrypoint: options.entrypoint.clone(),
            command: options.command.clone(),
            env,
            cwd: options.workdir.clone(),
            user: options.user.clone(),
        },
        hostname: options.hostname.clone().unwrap_or_else(|| name.to_owned()),
        read_only: options.read_only,
        terminal: options.tty,
        pids: options.pids,
        volumes: options.volume.clone(),
        cap_add: options.cap_add.clone(),
        cap_drop: options.cap_drop.clone(),
        sysctls: options.tcp_profile.sysctls(),
    })
}

/// Variables of a file, one a line, as given or passed on; empty lines and those that begin with # are not.
fn variables_in(path: &Path) -> Result<Vec<String>, Failure> {
    let failed = || format!("cannot read variables from {}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).context(failed)?;
    let count = file.take(MAX_ENV_FILE + 1).read_to_string(&mut text).context(failed)?;
    if u64::try_from(count).unwrap_or(u64::MAX) > MAX_ENV_FILE {
        return Err(Failure::new(format!("{} has more than {MAX_ENV_FILE} bytes", path.display())));
    }
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    Ok(passed_on(&lines.map(str::to_owned).collect::<Vec<_>>()))
}

fn labels(given: &[String]) -> BTreeMap<String, String> {
    let pair = |label: &String| match label.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (label.clone(), String::new()),
    };
    given.iter().map(pair).collect()
}

/// How large its machine is, in the annotations that any engine would use.
fn annotations(options: &Run) -> HashMap<String, String> {
    let mut annotations = HashMap::from([
        ("io.mvm.vcpus".to_owned(), options.shape.cpus.get().to_string()),
        ("io.mvm.memory".to_owned(), options.shape.memory.mib().to_string()),
    ]);
    let size = options.disk_size.map_or_else(|| "0".to_owned(), |size| format!("{}M", size.mib()));
    annotations.insert("io.mvm.upper_size".to_owned(), size);
    if let Some(choice) = options.template {
        annotations.insert("io.mvm.template".to_owned(), choice.to_string());
    }
    if !options.limit.is_empty() {
        let limits: Vec<_> = options.limit.iter().map(ToString::to_string).collect();
        annotations.insert("io.mvm.limits".to_owned(), limits.join(","));
    }
    annotations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_variables_is_read_line_by_line_and_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        std::fs::write(&path, "# comment\nA=1\n\nB=x=y z\r\nPATH\nMVM_NO_SUCH_VARIABLE\n").unwrap();
        let path_here = format!("PATH={}", std::env::var("PATH").unwrap());
        assert_eq!(variables_in(&path).unwrap(), ["A=1", "B=x=y z", &path_here]);
        let most = usize::try_from(MAX_ENV_FILE).unwrap();
        std::fs::write(&path, format!("A={}", "x".repeat(most - 2))).unwrap();
        assert_eq!(variables_in(&path).unwrap().len(), 1);
        std::fs::write(&path, format!("A={}", "x".repeat(most - 1))).unwrap();
        assert!(variables_in(&path).unwrap_err().report().contains("more than"));
    }

    #[test]
    fn labels_have_values_or_none() {
        let labels = labels(&["a=1=2".to_owned(), "b".to_owned()]);
        assert_eq!(labels, [("a".to_owned(), "1=2".to_owned()), ("b".to_owned(), String::new())].into());
    }
}
