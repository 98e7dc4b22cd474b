//! What a test is given: a daemon, a runtime, containers that do not outlive it.

use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Failed;
use mvm_integration::containerd::leaks::Picture;
use mvm_integration::containerd::{BUSYBOX, Ctr, Daemon, Event, Output, Runtime};
use mvm_integration::witness::watched;
use nix::unistd::Pid;

/// A test and its name.
pub(crate) type Test = (&'static str, fn(&Context));

/// What a test is given.
pub(crate) struct Context {
    pub(crate) daemon: &'static Daemon,
    pub(crate) runtime: Runtime,
    pub(crate) ctr: Ctr,
}

/// A container that runs in the background.
pub(crate) struct Task<'a> {
    pub(crate) id: String,
    context: &'a Context,
}

impl Context {
    pub(crate) fn new(daemon: &'static Daemon, runtime: Runtime) -> Self {
        Self { daemon, runtime, ctr: daemon.ctr("default") }
    }

    /// Runs the test of this name, cleans up, and compares the host with what it was.
    pub(crate) fn run(&self, name: &str, test: fn(&Self)) -> Result<(), Failed> {
        let before = Picture::take(&self.daemon.dir);
        let result = watched(name, || test(self));
        let mut left = self.containers();
        left.iter().for_each(|id| self.remove(id));
        left.extend(crate::pods::sweep(self));
        if let Err(payload) = result {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            return Err(text.unwrap_or_default().into());
        }
        if !left.is_empty() {
            return Err(format!("containers are left: {left:?}").into());
        }
        before.still_holds(&self.daemon.dir).map_err(|left| format!("left behind:\n{left}").into())
    }

    /// A name that no container has.
    pub(crate) fn id(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        format!("{}-{}", self.runtime.name(), NUMBER.fetch_add(1, Ordering::Relaxed))
    }

    /// `ctr run --rm` of busybox with these flags.
    pub(crate) fn ctr_run(&self, flags: &[&str], command: &[&str]) -> Output {
        let id = self.id();
        self.ctr.call(
            &[&["run", "--rm", "--runtime", self.runtime.id()], flags, &[BUSYBOX, &id], command].concat(),
        )
    }

    /// What a shell in a container prints; it must succeed.
    pub(crate) fn sh(&self, flags: &[&str], script: &str) -> String {
        let output = self.ctr_run(flags, &["sh", "-c", script]);
        assert_eq!(output.code, Some(0), "{script:?}: {}{}", output.text(), output.stderr);
        output.text()
    }

    /// A container in the background.
    pub(crate) fn start(&self, flags: &[&str], script: &str) -> Task<'_> {
        self.start_with(&[&["--null-io"], flags].concat(), script)
    }

    /// A container in the background whose output goes where the flags say.
    pub(crate) fn start_with(&self, flags: &[&str], script: &str) -> Task<'_> {
        let task = self.task(self.id());
        let head = ["run", "-d", "--runtime", self.runtime.id()];
        self.ctr.must(&[&head, flags, &[BUSYBOX, &task.id, "sh", "-c", script]].concat());
        task
    }

    /// A container that runs already.
    pub(crate) fn task(&self, id: String) -> Task<'_> {
        Task { id, context: self }
    }

    fn containers(&self) -> Vec<String> {
        self.ctr.must(&["containers", "ls", "-q"]).split_whitespace().map(str::to_owned).collect()
    }

    /// Removes a container whatever its state.
    fn remove(&self, id: &str) {
        let _ = self.ctr.call(&["task", "delete", "-f", id]);
        let _ = self.ctr.call(&["containers", "rm", id]);
    }
}

impl Task<'_> {
    /// `ctr task exec`.
    pub(crate) fn exec(&self, command: &[&str]) -> Output {
        let exec = self.context.id();
        self.context.ctr.call(&[&["task", "exec", "--exec-id", &exec, &self.id], command].concat())
    }

    /// What a shell besides the container's process prints; it must succeed.
    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.exec(&["sh", "-c", script]);
        assert_eq!(output.code, Some(0), "{script:?}: {}{}", output.text(), output.stderr);
        output.text()
    }

    pub(crate) fn kill(&self, signal: &str) {
        self.context.ctr.must(&["task", "kill", "-s", signal, &self.id]);
    }

    /// Waits for the end.
    pub(crate) fn ended(&self) -> Event {
        self.event("/tasks/exit")
    }

    /// Waits for an event.
    pub(crate) fn event(&self, topic: &str) -> Event {
        self.context.daemon.events().expect(&self.id, topic)
    }

    /// What `ctr task ls` calls its state.
    pub(crate) fn status(&self) -> String {
        self.row().1
    }

    /// The process that stands for it on the host.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.row().0.parse().expect("a process id"))
    }

    /// Its process and state in `ctr task ls`.
    fn row(&self) -> (String, String) {
        let table = self.context.ctr.must(&["task", "ls"]);
        let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.first() == Some(&self.id.as_str()));
        let row = row.unwrap_or_else(|| panic!("no {}: {table}", self.id));
        (row[1].to_owned(), row[2].to_owned())
    }

    /// Deletes the ended task and its container; returns the exit status. That of the delete is told by ours only:
    /// runc's shim may end before it has published it.
    pub(crate) fn delete(self) -> u64 {
        self.context.ctr.must(&["task", "delete", &self.id]);
        self.context.ctr.must(&["containers", "rm", &self.id]);
        let status = self.ended().exit_status();
        if self.context.runtime == Runtime::Mvm {
            assert_eq!(self.event("/tasks/delete").exit_status(), status);
        }
        status
    }

    /// Ends and deletes it.
    pub(crate) fn end(self) {
        self.kill("SIGKILL");
        self.ended();
        assert_eq!(self.delete(), 137);
    }
}
