//! Containers that are there: listing them, looking into them, ending and removing them.

pub(crate) mod args;
mod copy;
mod exec;
mod list;
mod logs;
mod watch;

use std::io::Write;

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Client, Request};
use mvm_runtime::state::{Home, Owned, Seen, collect, events};
use nix::sys::signal::Signal;

use self::args::{Life, Names};
use crate::args::Format;
use crate::{complain, say};

/// Some of several containers could not be served.
pub(crate) const SOME_FAILED: u8 = 1;

/// Does what one of the commands says; its exit code.
pub(crate) fn life(command: Life) -> Result<u8, Failure> {
    let home = Home::default_place();
    match command {
        Life::Ps(options) => list::ps(&home, &options),
        Life::Inspect(options) => list::inspect(&home, &options),
        Life::Stats(options) => list::stats(&home, &options),
        Life::Exec(options) => exec::exec(&home, *options),
        Life::Logs(options) => logs::logs(&home, &options),
        Life::Events(options) => logs::events(&home, &options),
        Life::Cp(options) => copy::cp(&home, &options),
        Life::Stop(options) => {
            let grace_s = options.time;
            each(&home, &options.names, |seen| ask(seen, &Request::Stop { grace_s }))
        }
        Life::Kill(options) => {
            let signal = options.signal as i32;
            each(&home, &options.names, |seen| ask(seen, &Request::Signal { signal, everyone: options.all }))
        }
        Life::Pause(names) => each(&home, &names, |seen| ask(seen, &Request::Pause)),
        Life::Unpause(names) => each(&home, &names, |seen| ask(seen, &Request::Resume)),
        Life::Rm(options) => each(&home, &options.names, |seen| remove(&home, seen, options.force)),
        Life::Gc(options) => gc(&home, options.format),
    }
}

/// Does `action` with each container and prints the names of those it worked for.
fn each(home: &Home, names: &Names, action: impl Fn(&Seen) -> Result<(), Failure>) -> Result<u8, Failure> {
    let mut code = 0;
    for name in &names.names {
        match home.find(name).and_then(|seen| action(&seen)) {
            Ok(()) => print(&format!("{name}\n"))?,
            Err(failure) => {
                complain(&failure);
                code = SOME_FAILED;
            }
        }
    }
    Ok(code)
}

fn ask(seen: &Seen, request: &Request) -> Result<(), Failure> {
    Client::connect(seen)?.ask(request).map(drop)
}

fn remove(home: &Home, seen: &Seen, force: bool) -> Result<(), Failure> {
    let name = &seen.record.name;
    if seen.owned {
        if !force {
            return Err(Failure::new(format!("container {name} is running"))
                .help(format!("stop it first: mvm stop {name}, or use --force")));
        }
        ask(seen, &Request::Stop { grace_s: 0 })?;
    }
    // Its owner goes away as soon as its machine has.
    let owned = loop {
        match Owned::take(&seen.directory) {
            Ok(Some(owned)) => break owned,
            Ok(None) if !seen.directory.exists() => return Ok(()), // its owner did it
            Ok(None) => watch::until_changed(&seen.directory)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Failure::because(format!("cannot remove container {name}"), error)),
        }
    };
    owned.ledger()?.settle()?;
    owned.remove().context(|| format!("cannot remove container {name}"))?;
    events::emit(home, &seen.record.id, name, events::Kind::Remove, None);
    Ok(())
}

fn gc(home: &Home, format: Format) -> Result<u8, Failure> {
    let cleaned = collect(home)?;
    if format == Format::Json {
        print(&json(&cleaned)?)?;
    } else {
        for it in &cleaned {
            let what = if it.removed { "removed" } else { "kept as lost" };
            say(&match &it.problem {
                None => format!("{}: {what}", it.id),
                Some(problem) => format!("{}: {problem}", it.id),
            });
        }
        if cleaned.is_empty() {
            say("nothing to clean up");
        }
    }
    Ok(if cleaned.iter().any(|it| it.problem.is_some()) { SOME_FAILED } else { 0 })
}

/// Prints to standard output; whoever closed it has read enough.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::because("cannot write the output", error))
        }
        _ => Ok(()),
    }
}

pub(crate) fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(value).context(|| "cannot write JSON".to_owned())?;
    Ok(text + "\n")
}

/// A signal by name, with or without `SIG`, or number.
pub(crate) fn signal(text: &str) -> Result<Signal, String> {
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let number = text.parse().ok().and_then(|number: i32| Signal::try_from(number).ok());
    number.or_else(|| name.parse().ok()).ok_or_else(|| format!("there is no signal {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["9", "KILL", "kill", "SIGKILL"] {
            assert_eq!(signal(text), Ok(Signal::SIGKILL), "{text}");
        }
        for text in ["", "0", "99", "SIG", "QUUX"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }
}
