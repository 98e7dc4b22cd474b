//! `mvm run`: a container in a machine of its own, on this terminal with its exit code as ours, or left behind.

mod own;
pub(crate) mod progress;

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead;
use std::path::Path;

use mvm_runtime::container::{NotRunnable, Overrides, Wishes, root_file_system, spec, state_dir};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::Refused;
use mvm_runtime::sandbox::MachineLauncher;
use mvm_runtime::state::{Home, Restart};

use self::own::{Audience, Job, Network};
use crate::args::Run;
use crate::stdio;

pub(crate) use self::own::left_behind;

/// Longest file of variables, in bytes.
const MAX_ENV_FILE: u64 = 1 << 20;

pub(crate) fn run(options: Run) -> Result<u8, Failure> {
    stdio::check_terminal(options.tty && !options.detach)?;
    if options.restart != Restart::No && !options.detach {
        return Err(Failure::new("cannot restart a container that is not detached").help("add --detach"));
    }
    let state = state_dir();
    let image = root_file_system(&options.image, &state, &mut progress::Bar::default())?;
    let id = generated_id()?;
    let name = options.name.as_ref().map_or_else(|| id.clone(), ToString::to_string);
    // What is wrong with the command is said before a machine is booted for it.
    let mut spec = spec(&image.config, &wishes(&options, &name)?)?;
    spec.set_annotations(Some(annotations(&options)));
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
        net: Network {
            choice: options.net.to_string(),
            publish: options.publish.iter().map(ToString::to_string).collect(),
            dns: options.dns.clone(),
            mtu: options.mtu,
        },
        stdin: options.interactive,
        stats: options.stats,
    };
    if options.detach {
        own::leave_behind(&job)?;
        return crate::life::print(&format!("{}\n", job.id)).map(|()| 0);
    }
    let home = Home::default_place();
    own::own(&job, &home, &MachineLauncher::default(), Audience::Terminal(stdio::hold_signals()?), || ())
}

/// A failure that another process has reported, with the exit code it stands for.
#[derive(Debug, thiserror::Error)]
#[error("{report}")]
pub(crate) struct Reported {
    report: String,
    exit_code: u8,
}

impl Reported {
    fn failure(report: String, exit_code: u8) -> Failure {
        Failure::because("cannot run the container", Self { report, exit_code })
    }
}

/// The exit code a failure stands for, if it is about the container's program.
pub(crate) fn exit_code(failure: &Failure) -> Option<u8> {
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        if let Some(program) = error.downcast_ref::<NotRunnable>() {
            return Some(program.exit_code);
        }
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(refused.exit_code);
        }
        if let Some(reported) = error.downcast_ref::<Reported>() {
            return Some(reported.exit_code);
        }
        cause = error.source();
    }
    None
}

/// Twelve hex digits, as docker names a container.
fn generated_id() -> Result<String, Failure> {
    let mut bytes = [0; 6];
    mvm_devices::sys::random(&mut bytes).context(|| "cannot get random bytes".to_owned())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
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
    let file = std::fs::File::open(path).context(failed)?;
    let lines: Vec<String> = std::io::BufReader::new(std::io::Read::take(file, MAX_ENV_FILE))
        .lines()
        .collect::<Result<_, _>>()
        .context(failed)?;
    let lines = lines.into_iter().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    Ok(passed_on(&lines.collect::<Vec<_>>()))
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
    annotations
}
