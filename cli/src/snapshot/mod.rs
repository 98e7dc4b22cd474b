//! `mvm snapshot`, `mvm restore` and `mvm fork`: machines that were saved with a container in them.

pub(crate) mod args;

use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

use mvm_runtime::container::state_dir;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::Job;
use mvm_runtime::snapshot::{self, Entry, Manifest, Memory, Snapshots};
use mvm_runtime::state::Home;
use mvm_runtime::timeline::Timeline;
use mvm_vmm::config::MachineId;
use serde::Serialize;

use self::args::{Create, Fork, Inspect, Ls, Restore, Rm, Snapshot};
use crate::complain;
use crate::life::{SOME_FAILED, json, print};
use crate::run::{From, Order, generated_id, leave_behind};
use crate::table::{ago, bytes, table};
use crate::words::Format;

/// Does what one of the commands says; its exit code.
pub(crate) fn snapshot(command: Snapshot) -> Result<u8, Failure> {
    let snapshots = Snapshots::of(&state_dir());
    match command {
        Snapshot::Create(options) => create(&snapshots, &options),
        Snapshot::Ls(options) => ls(&snapshots, &options),
        Snapshot::Inspect(options) => inspect(&snapshots, &options),
        Snapshot::Rm(options) => rm(&snapshots, &options),
    }
}

fn create(snapshots: &Snapshots, options: &Create) -> Result<u8, Failure> {
    let seen = Home::default_place().find(&options.container)?;
    let name = match &options.name {
        Some(name) => name.clone(),
        None => free_name(snapshots, &seen.record.name)?,
    };
    let made = snapshot::make(snapshots, &seen, &name, options.base.as_ref().map(MachineId::as_str))?;
    print(&format!("{}\n", made.manifest.name)).map(|()| 0)
}

/// The container's name with the first number behind it that makes it new.
fn free_name(snapshots: &Snapshots, container: &str) -> Result<MachineId, Failure> {
    let taken: BTreeSet<_> = snapshots.names()?.into_iter().map(String::from).collect();
    let mut names = (1_u32..).map(|number| format!("{container}-{number}"));
    let name = names.find(|name| !taken.contains(name)).unwrap_or_default();
    let name = name.parse().context(|| format!("cannot name the snapshot {name}"));
    name.map_err(|failure| failure.help("choose a name: --name NAME"))
}

/// A line of the list.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    container: String,
    container_id: String,
    image: String,
    cpus: u8,
    memory_mib: u64,
    disk_bytes: u64,
    base: Option<String>,
    created: u64,
}

impl Row {
    fn of(entry: &Entry) -> Self {
        let Manifest { name, container, created, run, .. } = &entry.manifest;
        Self {
            name: name.to_string(),
            container: container.name.clone(),
            container_id: container.id.clone(),
            image: run.job.image.clone(),
            cpus: run.machine.cpus.get(),
            memory_mib: run.machine.memory_mib.mib(),
            disk_bytes: entry.disk_bytes,
            base: run.machine.base.as_ref().map(|base| base.name.to_string()),
            created: *created,
        }
    }
}

fn ls(snapshots: &Snapshots, options: &Ls) -> Result<u8, Failure> {
    let (list, broken) = snapshots.list()?;
    broken.iter().for_each(complain);
    let rows: Vec<_> = list.iter().map(Row::of).collect();
    if options.quiet {
        print(&rows.iter().map(|row| format!("{}\n", row.name)).collect::<String>())?;
    } else if options.format == Format::Json {
        print(&json(&rows)?)?;
    } else {
        print(&listed(&rows))?;
    }
    Ok(if broken.is_empty() { 0 } else { SOME_FAILED })
}

/// A list for people.
fn listed(rows: &[Row]) -> String {
    let since =
        |seconds| ago((UNIX_EPOCH + Duration::from_secs(seconds)).elapsed().unwrap_or_default().as_secs());
    let cells = |row: &Row| {
        vec![
            row.name.clone(),
            row.container.clone(),
            row.image.clone(),
            row.cpus.to_string(),
            bytes(row.memory_mib.saturating_mul(1 << 20)),
            bytes(row.disk_bytes),
            row.base.clone().unwrap_or_else(|| "-".to_owned()),
            since(row.created),
        ]
    };
    let head = ["NAME", "CONTAINER", "IMAGE", "CPUS", "MEMORY", "SIZE", "BASE", "CREATED"];
    table(&head, &rows.iter().map(cells).collect::<Vec<_>>())
}

fn inspect(snapshots: &Snapshots, options: &Inspect) -> Result<u8, Failure> {
    let (mut found, mut code) = (Vec::new(), 0);
    for name in &options.names {
        match snapshots.get(name) {
            Ok(entry) => found.push(entry),
            Err(failure) => {
                complain(&failure);
                code = SOME_FAILED;
            }
        }
    }
    print(&json(&found)?).map(|()| code)
}

fn rm(snapshots: &Snapshots, options: &Rm) -> Result<u8, Failure> {
    // Of those that are named together, first what needs another.
    let needs = |name: &String| snapshots.get(name).is_ok_and(|it| it.manifest.run.machine.base.is_some());
    let (above, rest): (Vec<_>, Vec<_>) = options.names.iter().partition(|name| needs(name));
    let mut code = 0;
    for name in above.into_iter().chain(rest) {
        match snapshots.remove(name) {
            Ok(()) => print(&format!("{name}\n"))?,
            Err(failure) => {
                complain(&failure);
                code = SOME_FAILED;
            }
        }
    }
    Ok(code)
}

/// A container goes on from a snapshot.
pub(crate) fn restore(options: &Restore) -> Result<u8, Failure> {
    let entry = Snapshots::of(&state_dir()).get(&options.snapshot)?;
    entry.check()?;
    let mut order = order(&entry.manifest, options.name.as_ref(), generated_id()?);
    if let Some(from) = &mut order.from {
        from.memory = match &options.memory_source {
            Some(source) => Memory::Source(source.clone()),
            None if options.prefault => Memory::Beforehand,
            None => Memory::AsTouched,
        };
    }
    leave_behind(&order)?;
    print(&format!("{}\n", order.job.id)).map(|()| 0)
}

/// A second container goes on from where one is.
pub(crate) fn fork(options: &Fork) -> Result<u8, Failure> {
    let home = Home::default_place();
    let seen = home.find(&options.container)?;
    let id = generated_id()?;
    let name = options.name.as_ref().map_or_else(|| id.clone(), ToString::to_string);
    // What is wrong with the name is said before a machine is saved for it.
    if home.list()?.iter().any(|it| it.record.name == name || it.record.id == name) {
        return Err(Failure::new(format!("there is a container {name} already")).help("choose another name"));
    }
    let name: MachineId = name.parse().context(|| format!("{name:?} is no name"))?;
    let snapshots = Snapshots::of(&state_dir());
    let temporary = format!("fork-{id}").parse().context(|| "cannot name the snapshot".to_owned())?;
    let made = snapshot::make(&snapshots, &seen, &temporary, None)?;
    let mut order = order(&made.manifest, Some(&name), id);
    order.job.net.publish.clear();
    let left = leave_behind(&order);
    // Its machine has open what it needs.
    let removed = snapshots.remove(temporary.as_str());
    left.and(removed)?;
    print(&format!("{}\n", order.job.id)).map(|()| 0)
}

/// What the owner of the new container is told. Its host is called as the container is, unless that one was called
/// otherwise.
fn order(manifest: &Manifest, name: Option<&MachineId>, id: String) -> Order {
    let saved = &manifest.run.job;
    let name = name.map_or_else(|| saved.name.clone(), ToString::to_string);
    let renamed = saved.spec.hostname().as_deref() == Some(&saved.name) && name != saved.name;
    let hostname = renamed.then(|| name.clone());
    let mut spec = saved.spec.clone();
    if let Some(hostname) = &hostname {
        spec.set_hostname(Some(hostname.clone()));
    }
    let job = Job { id, name, spec, ..saved.clone() };
    Order {
        job,
        from: Some(From { snapshot: manifest.name.to_string(), hostname, memory: Memory::default() }),
        timeline: Timeline::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(hostname: &str) -> Manifest {
        let machine = serde_json::json!({
            "cpus": 1, "memory_mib": 128, "contents": "", "plugged": false, "devices": [], "cards": [], "disks": [],
            "root": "main", "protocol": {"major": 3, "minor": 1}, "agent_version": "", "kernel_release": "",
            "memory_bytes": 0, "state_bytes": 0, "held_ms": 0,
        });
        let net = serde_json::json!({"choice": "none", "publish": [], "dns": [], "mtu": null});
        let job = serde_json::json!({
            "id": "old", "name": "web", "labels": {"a": "b"}, "image": "image", "rootfs": "/r.erofs",
            "spec": {"ociVersion": "1.0.2", "hostname": hostname}, "restart": "always", "remove": false, "cpus": 1,
            "memory_mib": 128, "net": net, "stdin": false, "stats": false,
        });
        let manifest = serde_json::json!({
            "version": 1, "name": "before", "created": 0, "container": {"id": "old", "name": "web"},
            "processor": "", "vmm_sha256": "", "run": {"job": job, "process": 1, "machine": machine},
        });
        serde_json::from_value(manifest).unwrap()
    }

    #[test]
    fn a_list_says_what_each_is_above() {
        let row = |name: &str, base: Option<&str>| Row {
            name: name.to_owned(),
            container: "web".to_owned(),
            container_id: "old".to_owned(),
            image: "image".to_owned(),
            cpus: 1,
            memory_mib: 128,
            disk_bytes: 4096,
            base: base.map(str::to_owned),
            created: 0,
        };
        let text = listed(&[row("later", Some("full")), row("full", None)]);
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[0].starts_with("NAME   CONTAINER  IMAGE  CPUS  MEMORY   SIZE   BASE  CREATED"),
            "{text}"
        );
        assert!(lines[1].starts_with("later  web        image  1     128 MiB  4 KiB  full  "), "{text}");
        assert!(lines[2].starts_with("full   web        image  1     128 MiB  4 KiB  -     "), "{text}");
    }

    fn ordered(hostname: &str, name: Option<&str>) -> (String, Option<String>, Option<String>) {
        let name = name.map(|name| name.parse().unwrap());
        let Order { job, from, .. } = order(&manifest(hostname), name.as_ref(), "new".to_owned());
        assert_eq!((job.id.as_str(), job.labels["a"].as_str()), ("new", "b"));
        (job.name, job.spec.hostname().clone(), from.unwrap().hostname)
    }

    #[test]
    fn a_container_that_goes_on_under_another_name_has_that_for_its_host_unless_it_had_one_of_its_own() {
        let text = |it: &str| Some(it.to_owned());
        assert_eq!(ordered("web", None), ("web".to_owned(), text("web"), None));
        assert_eq!(ordered("web", Some("copy")), ("copy".to_owned(), text("copy"), text("copy")));
        assert_eq!(ordered("own", Some("copy")), ("copy".to_owned(), text("own"), None));
    }
}
