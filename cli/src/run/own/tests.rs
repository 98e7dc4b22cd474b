//! Containers whose machines are none: what their owner does, and what is left when it is killed.

mod crash;
mod fake;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use mvm_runtime::owner::{Client, Exec, JobNetwork, Request, read_log};
use mvm_runtime::snapshot::{self, Entry, Manifest};
use mvm_runtime::state::{Condition, LOG, Record, Restart};
use oci_spec::runtime::Spec;

use self::fake::FakeLauncher;
use super::*;

fn order(job: Job) -> Order {
    Order { job, from: None, timeline: Timeline::default() }
}

fn job(id: &str) -> Job {
    let net = JobNetwork { choice: "none".into(), publish: vec![], dns: vec![], mtu: None };
    Job {
        id: id.to_owned(),
        name: id.to_owned(),
        labels: BTreeMap::new(),
        image: "image".to_owned(),
        rootfs: "/nowhere".into(),
        spec: Spec::default(),
        restart: Restart::No,
        remove: false,
        cpus: 1,
        memory_mib: 128,
        net,
        stdin: false,
        stats: false,
    }
}

#[test]
fn a_container_s_output_is_in_its_log_and_its_exit_code_in_its_record() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let launcher = FakeLauncher::new(|stage| {
        if let fake::Stage::Runs(process) = stage {
            process.write("hello\n");
            process.exit(3);
        }
    });
    assert_eq!(own(&order(job("c")), &home, &launcher, Audience::Log, || ()).unwrap(), 3);
    let seen = home.find("c").unwrap();
    assert!(matches!(seen.record.condition, Condition::Exited { code: 3, .. }) && !seen.owned);
    assert_eq!(read_log(&seen.directory.join(LOG)).unwrap()[0].text, "hello\n");
    assert!(!seen.directory.join(SANDBOX).exists());
}

#[test]
fn a_container_that_fails_is_started_again_and_one_that_is_stopped_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let (starts, there) = (AtomicU32::new(0), home.clone());
    let launcher = FakeLauncher::new(move |stage| {
        if let fake::Stage::Runs(process) = stage {
            if starts.fetch_add(1, Ordering::SeqCst) < 2 {
                return process.exit(1);
            }
            let (home, process) = (there.clone(), process.clone());
            std::thread::spawn(move || {
                // It may not be running yet: then it is stopped as soon as it is.
                let stop = Request::Stop { grace_s: 60 };
                let asked = home.find("c").and_then(|seen| Client::connect(&seen)?.ask(&stop));
                if asked.is_err() {
                    // Nobody else ends it, and one start more is seen below.
                    process.exit(1);
                }
            });
        }
    });
    let job = Job { restart: Restart::Always, ..job("c") };
    // Either asked to end, or never told that it runs.
    let result = own(&order(job), &home, &launcher, Audience::Log, || ());
    assert!(matches!(result, Ok(143)) || result.is_err(), "{result:?}");
    let record = home.find("c").unwrap().record;
    assert_eq!(record.restarts, 2);
    assert!(record.condition.has_ended());
}

#[test]
fn a_container_whose_machine_is_being_ended_is_only_waited_for_by_whoever_stops_it() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let (signalled, signals) = mpsc::channel();
    let (signals, stopping, there) =
        (Arc::new(Mutex::new(signals)), Arc::new(Mutex::new(None)), home.clone());
    let (sent, stop) = (Arc::clone(&signals), Arc::clone(&stopping));
    let launcher = FakeLauncher::new(move |stage| match stage {
        fake::Stage::Runs(process) => process.exit(5),
        fake::Stage::Signal(signal) => signalled.send(signal).unwrap(),
        fake::Stage::Ends => {
            let seen = there.find("c").unwrap();
            let thread = std::thread::spawn(move || Client::connect(&seen).unwrap().stop(0));
            assert!(stop.lock().unwrap().replace(thread).is_none(), "it is ended once");
            assert_eq!(sent.lock().unwrap().recv(), Ok(Signal::SIGTERM as i32));
        }
        _ => {}
    });
    assert_eq!(own(&order(job("c")), &home, &launcher, Audience::Log, || ()).unwrap(), 5);
    stopping.lock().unwrap().take().unwrap().join().unwrap().unwrap();
    assert_eq!(signals.lock().unwrap().try_recv(), Err(mpsc::TryRecvError::Empty), "nor is it told again");
}

/// Has a container of this name run, saves it, and has it end; what became of saving it.
fn saved(home: &Home, snapshots: &Snapshots, id: &str, name: &str) -> Result<Entry, Failure> {
    saved_above(home, snapshots, (id, name), None)
}

fn saved_above(
    home: &Home,
    snapshots: &Snapshots,
    (id, name): (&str, &str),
    base: Option<&str>,
) -> Result<Entry, Failure> {
    let process = Arc::new(Mutex::new(None));
    let told = Arc::clone(&process);
    let launcher = FakeLauncher::new(move |stage| {
        if let fake::Stage::Runs(process) = stage {
            *told.lock().unwrap() = Some(process.clone());
        }
    });
    let mut made = Err(Failure::new("it never ran"));
    let runs = || {
        made = snapshot::make(snapshots, &home.find(id).unwrap(), &name.parse().unwrap(), base);
        process.lock().unwrap().take().unwrap().exit(4);
    };
    assert_eq!(own(&order(job(id)), home, &launcher, Audience::Log, runs).unwrap(), 4, "it goes on");
    made
}

#[test]
fn a_container_is_saved_while_it_runs_under_a_name_that_is_given_once() {
    let dir = tempfile::tempdir().unwrap();
    let (home, snapshots) = (Home::at(dir.path().join("run")), Snapshots::of(dir.path()));
    let entry = saved(&home, &snapshots, "c", "before").unwrap();
    assert_eq!(entry, snapshots.get("before").unwrap());
    let Manifest { container, run, vmm_sha256, .. } = &entry.manifest;
    assert_eq!((container.id.as_str(), run.process, &run.job), ("c", 1, &job("c")));
    assert_eq!(vmm_sha256.len(), 64);
    let again = saved(&home, &snapshots, "d", "before").unwrap_err().report();
    assert!(again.contains("there is a snapshot before already"), "{again}");
    let ended = snapshot::make(&snapshots, &home.find("c").unwrap(), &"after".parse().unwrap(), None);
    assert!(ended.unwrap_err().report().contains("is not running"));
}

#[test]
fn a_container_is_saved_above_a_snapshot_that_then_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (home, snapshots) = (Home::at(dir.path().join("run")), Snapshots::of(dir.path()));
    let none = saved_above(&home, &snapshots, ("a", "none"), Some("full")).unwrap_err().report();
    assert!(none.contains("there is no snapshot full"), "{none}");
    saved(&home, &snapshots, "c", "full").unwrap();
    let above = saved_above(&home, &snapshots, ("d", "above"), Some("full")).unwrap();
    assert_eq!(above.manifest.run.machine.base.unwrap().name.as_str(), "full");
    assert!(snapshots.remove("full").unwrap_err().report().contains("mvm snapshot rm above"));
}

#[test]
fn a_container_that_cannot_be_saved_goes_on_and_leaves_no_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (home, snapshots) = (Home::at(dir.path().join("run")), Snapshots::of(dir.path()));
    let report = saved(&home, &snapshots, fake::UNSAVABLE, "before").unwrap_err().report();
    assert!(
        report.contains("cannot save container unsavable") && report.contains("cannot do that"),
        "{report}"
    );
    assert_eq!(std::fs::read_dir(dir.path().join("snapshots")).unwrap().count(), 0);
}

#[test]
fn nobody_waits_for_an_exec_whose_client_went_away() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let first = Arc::new(Mutex::new(None));
    let (abandoned, is_abandoned) = mpsc::channel();
    let told = Arc::clone(&first);
    let launcher = FakeLauncher::new(move |stage| match stage {
        fake::Stage::Runs(process) => {
            told.lock().unwrap().get_or_insert_with(|| process.clone());
        }
        fake::Stage::Abandoned(process) => abandoned.send(process).unwrap(),
        _ => {}
    });
    let mut given_up = None;
    let runs = || {
        let client = Client::connect(&home.find("c").unwrap()).unwrap();
        drop(client.exec(Exec { args: vec!["sleep".into()], ..Exec::default() }).unwrap());
        given_up = is_abandoned.recv_timeout(Duration::from_secs(20)).ok();
        first.lock().unwrap().take().unwrap().exit(4);
    };
    assert_eq!(own(&order(job("c")), &home, &launcher, Audience::Log, runs).unwrap(), 4);
    assert_eq!(given_up, Some(2));
}

#[test]
fn a_container_that_never_ran_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let launcher = FakeLauncher::new(|stage| {
        if let fake::Stage::Machine = stage {
            panic!("a machine was started for a network that is none");
        }
    });
    let mut job = job("c");
    job.net.choice = "netns:/nonexistent".to_owned();
    own(&order(job), &home, &launcher, Audience::Log, || ()).unwrap_err();
    assert!(home.list().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("containers")).unwrap().count(), 0);
}
