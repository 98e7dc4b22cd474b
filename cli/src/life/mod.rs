//! Containers that are there: listing them, looking into them, ending and removing them.

pub(crate) mod args;
mod copy;
mod exec;
mod list;
mod logs;
mod watch;

use std::io::{ErrorKind, Write};

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::net::sweep;
use mvm_runtime::owner::{Client, Request};
use mvm_runtime::state::{Home, Owned, Seen, collect, events};
use nix::sys::signal::Signal;

use self::args::{Life, Names};
use crate::words::Format;
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
            each(&home, &options.names, |seen| stop(seen, grace_s))
        }
        Life::Kill(options) => {
            let signal = options.signal as i32;
            each(&home, &options.names, |seen| ask(seen, &Request::Signal { signal, everyone: options.all }))
        }
        Life::Pause(names) => each(&home, &names, |seen| ask(seen, &Request::Pause)),
        Life::Unpause(names) => each(&home, &names, |seen| ask(seen, &Request::Resume)),
        Life::Update(options) => {
            let request = Request::Limit(options.limit);
            each(&home, &options.names, |seen| ask(seen, &request))
        }
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

fn stop(seen: &Seen, grace_s: u32) -> Result<(), Failure> {
    if !seen.owned {
        return Err(seen.record.not_running());
    }
    end(seen, grace_s).map(drop)
}

/// Has a container end, and takes over what its owner leaves: nothing, if it is to be removed then.
fn end(seen: &Seen, grace_s: u32) -> Result<Option<Owned>, Failure> {
    let failed = || format!("cannot take over container {}", seen.record.name);
    loop {
        if let Some(owner) = Client::reach(seen)? {
            owner.stop(grace_s)?;
            // It has said so before it has gone. Whoever is told next that it has ended finds it gone.
            return Owned::wait(&seen.directory).context(failed);
        }
        // It has not begun to listen, or does no more.
        match Owned::take(&seen.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Ok(None) => watch::until_changed(&seen.directory)?,
            owned => return owned.context(failed),
        }
    }
}

fn remove(home: &Home, seen: &Seen, force: bool) -> Result<(), Failure> {
    let name = &seen.record.name;
    let failed = || format!("cannot remove container {name}");
    let owned = if !seen.owned || seen.record.is_over() {
        Owned::wait(&seen.directory).context(failed)?
    } else if force {
        end(seen, 0)?
    } else {
        return Err(Failure::new(format!("container {name} is running"))
            .help(format!("stop it first: mvm stop {name}, or use --force")));
    };
    let Some(owned) = owned else { return Ok(()) }; // its owner did it
    owned.ledger()?.settle()?;
    owned.remove().context(failed)?;
    events::emit(home, &seen.record.id, name, events::Kind::Remove, None);
    Ok(())
}

fn gc(home: &Home, format: Format) -> Result<u8, Failure> {
    let cleaned = collect(home)?;
    if nix::unistd::geteuid().is_root() {
        // Bridges and rules are the host's, not a home's: what no machine's lease calls for any more goes.
        sweep()?;
        mvm_vmm::launch::sweep();
    }
    if format == Format::Json {
        print(&json(&cleaned)?)?;
    } else {
        for it in &cleaned {
            let what = if it.removed { "removed" } else { "cleaned up; its record is kept" };
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
    // JSON leaves those as they are that a terminal obeys as well as it does ESC.
    let mut shown = String::with_capacity(text.len() + 1);
    for character in text.chars() {
        match character {
            '\u{7f}'..='\u{9f}' => shown.push_str(&format!("\\u{:04x}", u32::from(character))),
            other => shown.push(other),
        }
    }
    Ok(shown + "\n")
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
    use mvm_runtime::state::{Condition, Record};

    use super::*;

    /// A container that this process owns, as others see it, in a home of its own.
    fn owned(record: Record) -> (tempfile::TempDir, Home, Owned, Seen) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let owned = home.admit(&Record { id: "id".into(), name: "web".into(), ..record }).unwrap();
        let seen = home.find("web").unwrap();
        assert!(seen.owned);
        (dir, home, owned, seen)
    }

    #[test]
    fn a_container_whose_owner_no_longer_listens_but_is_there_is_waited_for() {
        let (_dir, home, owned, seen) = owned(Record::default());
        let refused = remove(&home, &seen, false).unwrap_err().report();
        assert!(refused.contains("container web is running"), "{refused}");
        std::thread::scope(|scope| {
            let removed = scope.spawn(|| remove(&home, &seen, true));
            let stopped = scope.spawn(|| stop(&seen, 0));
            drop(owned);
            removed.join().unwrap().unwrap();
            stopped.join().unwrap().unwrap();
        });
        assert!(home.find("web").is_err());
    }

    #[test]
    fn a_container_that_is_over_is_removed_without_force_as_soon_as_its_owner_has_gone() {
        let over = Record { condition: Condition::Exited { code: 0, at: 1 }, ..Record::default() };
        let (_dir, home, owned, seen) = owned(over);
        std::thread::scope(|scope| {
            let removed = scope.spawn(|| remove(&home, &seen, false));
            drop(owned);
            removed.join().unwrap().unwrap();
        });
        assert!(home.find("web").is_err());
        assert!(stop(&Seen { owned: false, ..seen }, 0).unwrap_err().report().contains("is not running"));
    }

    #[test]
    fn json_is_the_same_and_has_nothing_that_a_terminal_obeys() {
        let names = ["\u{1b}[2J", "\u{9b}2J\u{7f}", "ä\n"];
        let text = json(&names).unwrap();
        assert!(!text.chars().any(|it| it.is_control() && it != '\n'), "{text:?}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).unwrap(), names);
    }

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
