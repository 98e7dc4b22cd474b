//! Lists: containers, what is known of one, what they use.

use mvm_protocol::RootStats;
use mvm_runtime::failure::Failure;
use mvm_runtime::owner::{Client, Reply, Request};
use mvm_runtime::state::{Condition, Home, Record, Seen, now};
use serde::Serialize;

use super::args::{Inspect, Listing, Ps};
use super::{SOME_FAILED, json, print};
use crate::complain;
use crate::table::{ago, bytes, table};
use crate::words::Format;

/// Longest command that is listed, in characters.
const COMMAND_WIDTH: usize = 30;

/// A container as it is listed for programs.
#[derive(Serialize)]
struct Entry {
    #[serde(flatten)]
    record: Record,
    /// Its owner is there.
    owned: bool,
}

impl From<Seen> for Entry {
    fn from(seen: Seen) -> Self {
        Self { owned: seen.owned, record: seen.record }
    }
}

pub(super) fn ps(home: &Home, options: &Ps) -> Result<u8, Failure> {
    let mut seen = home.list()?;
    seen.retain(|it| (options.all || it.owned) && options.label.iter().all(|label| has(&it.record, label)));
    if options.quiet {
        let ids: Vec<_> = seen.iter().map(|it| format!("{}\n", it.record.id)).collect();
        print(&ids.concat())?;
    } else if options.format == Format::Json {
        print(&json(&seen.into_iter().map(Entry::from).collect::<Vec<_>>())?)?;
    } else {
        let rows: Vec<_> = seen.iter().map(row).collect();
        print(&table(&["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS"], &rows))?;
    }
    Ok(0)
}

fn has(record: &Record, label: &str) -> bool {
    match label.split_once('=') {
        Some((name, value)) => record.labels.get(name).is_some_and(|it| it == value),
        None => record.labels.contains_key(label),
    }
}

fn row(seen: &Seen) -> Vec<String> {
    let record = &seen.record;
    let mut command = record.command.join(" ");
    if command.chars().count() > COMMAND_WIDTH {
        command = command.chars().take(COMMAND_WIDTH - 1).chain(['…']).collect();
    }
    vec![
        record.id.clone(),
        record.name.clone(),
        record.image.clone(),
        command,
        ago(since(record.created)),
        status(seen),
        record.ports.join(", "),
    ]
}

/// How a container fares, in words.
fn status(seen: &Seen) -> String {
    match seen.record.condition {
        Condition::Exited { code, at } => format!("exited ({code}) {}", ago(since(at))),
        Condition::Lost { at } => format!("lost, seen {}", ago(since(at))),
        _ if !seen.owned => "lost; mvm gc".to_owned(),
        Condition::Starting => "starting".to_owned(),
        Condition::Running => "running".to_owned(),
        Condition::Paused => "paused".to_owned(),
    }
}

fn since(at: u64) -> u64 {
    now().saturating_sub(at)
}

pub(super) fn inspect(home: &Home, options: &Inspect) -> Result<u8, Failure> {
    let found: Result<Vec<_>, _> =
        options.names.names.iter().map(|name| home.find(name).map(Entry::from)).collect();
    print(&json(&found?)?)?;
    Ok(0)
}

/// A container's use of resources.
#[derive(Serialize)]
struct Use {
    id: String,
    name: String,
    /// CPU time in microseconds.
    cpu_us: u64,
    /// Memory of its processes and their files, in bytes.
    memory: u64,
    /// Most it may take, in bytes.
    memory_max: Option<u64>,
    processes: u64,
}

impl Use {
    fn new(record: &Record, stats: &RootStats) -> Self {
        let text = |name: &str| stats.files.iter().find(|(it, _)| it == name).map_or("", |(_, text)| text);
        let number = |name: &str| text(name).trim().parse().ok();
        let cpu = text("cpu.stat").lines().find_map(|line| line.strip_prefix("usage_usec "));
        Self {
            id: record.id.clone(),
            name: record.name.clone(),
            cpu_us: cpu.and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            memory: number("memory.current").unwrap_or(0),
            memory_max: number("memory.max"),
            processes: number("pids.current").unwrap_or(0),
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.name.clone(),
            format!("{}.{:02} s", self.cpu_us / 1_000_000, self.cpu_us / 10_000 % 100),
            bytes(self.memory),
            self.memory_max.map_or_else(|| "-".to_owned(), bytes),
            self.processes.to_string(),
        ]
    }
}

pub(super) fn stats(home: &Home, options: &Listing) -> Result<u8, Failure> {
    let seen: Vec<Seen> = if options.names.is_empty() {
        home.list()?.into_iter().filter(|it| it.owned).collect()
    } else {
        options.names.iter().map(|name| home.find(name)).collect::<Result<_, _>>()?
    };
    let (mut uses, mut code) = (Vec::new(), 0);
    for it in seen {
        match Client::connect(&it).and_then(|client| client.ask(&Request::Stats)) {
            Ok(Reply::Stats(stats)) => uses.push(Use::new(&it.record, &stats)),
            Ok(_) => {}
            Err(failure) => {
                complain(&failure);
                code = SOME_FAILED;
            }
        }
    }
    if options.format == Format::Json {
        print(&json(&uses)?)?;
    } else {
        let rows: Vec<_> = uses.iter().map(Use::row).collect();
        print(&table(&["ID", "NAME", "CPU TIME", "MEMORY", "LIMIT", "PROCESSES"], &rows))?;
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_is_read_from_the_cgroup_s_files_whatever_they_hold() {
        let file = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        let files = vec![
            file("cpu.stat", "usage_usec 1234567\nuser_usec 1\n"),
            file("memory.current", "1048576\n"),
            file("memory.max", "max\n"),
            file("pids.current", "nonsense"),
        ];
        let stats = RootStats { files, pids: vec![] };
        let row = Use::new(&Record { name: "web".into(), ..Record::default() }, &stats).row();
        assert_eq!(row[1..], ["web", "1.23 s", "1 MiB", "-", "0"]);
    }

    #[test]
    fn labels_are_compared_by_name_or_by_value() {
        let record = Record { labels: [("a".to_owned(), "1".to_owned())].into(), ..Record::default() };
        assert!(has(&record, "a") && has(&record, "a=1"));
        assert!(!has(&record, "a=2") && !has(&record, "b"));
    }
}
