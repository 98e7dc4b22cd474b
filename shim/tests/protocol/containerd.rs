//! What containerd is to a shim: a bundle, a log that may be read, a socket that takes events, a client.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest,
    KillRequest, ShutdownRequest, StartRequest, StateRequest, StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::Value;
use tempfile::TempDir;

use crate::bundles::process;
use crate::fifos::Streams;
use crate::host::{PATIENCE, children, is_alive, wait_gone};
use crate::wire::{EventServer, Received, answer, context};

/// The program under test.
pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-mvm-v2");

/// One containerd with at most one shim.
pub(crate) struct Containerd {
    pub(crate) directory: TempDir,
    pub(crate) namespace: String,
    events: Arc<Received>,
    server: Option<EventServer>,
    pub(crate) client: Option<TaskClient>,
    pub(crate) address: String,
    shim_pid: u32,
}

impl Containerd {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut containerd = Self {
            directory: tempfile::tempdir().unwrap(),
            namespace: format!("test-{}-{number}", std::process::id()),
            events: Arc::default(),
            server: None,
            client: None,
            address: String::new(),
            shim_pid: 0,
        };
        containerd.take_events();
        containerd
    }

    /// A containerd whose shim serves one bundle.
    pub(crate) fn with_shim(id: &str, config: &Value) -> Self {
        let mut containerd = Self::new();
        containerd.bundle(id, config);
        containerd.start_shim(id);
        containerd
    }

    fn events_address(&self) -> PathBuf {
        self.directory.path().join("ttrpc")
    }

    /// Begins to take events, as after a restart.
    pub(crate) fn take_events(&mut self) {
        let _ = fs::remove_file(self.events_address());
        self.server = Some(EventServer::new(&self.events_address(), &self.events));
    }

    /// Takes no events any more, as while it is down.
    pub(crate) fn go_down(&mut self) {
        self.server = None;
        let _ = fs::remove_file(self.events_address());
    }

    /// Listens for events as one that is stopped: nobody accepts, and there is no room for another connection.
    pub(crate) fn hang(&self) -> (OwnedFd, UnixStream) {
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let address = UnixAddr::new(&self.events_address()).unwrap();
        bind(listener.as_raw_fd(), &address).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let waiting = UnixStream::connect(self.events_address()).unwrap();
        (listener, waiting)
    }

    /// Makes a bundle.
    pub(crate) fn bundle(&self, id: &str, config: &Value) -> PathBuf {
        let bundle = self.directory.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        mkfifo(&bundle.join("log"), Mode::S_IRWXU).unwrap();
        bundle
    }

    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.directory.path().join(id)
    }

    /// The shim's program, as containerd calls it for a bundle.
    pub(crate) fn command(&self, id: &str, action: &[&str]) -> Command {
        let mut command = Command::new(SHIM);
        command
            .args(["-namespace", &self.namespace, "-id", id, "-publish-binary", "/usr/bin/containerd"])
            .arg("-address")
            .arg(self.directory.path().join("grpc"))
            .args(action)
            .current_dir(self.path(id))
            .env("TTRPC_ADDRESS", self.events_address())
            .env("MVM_FAKE_MACHINES", "1")
            .stdin(Stdio::null());
        command
    }

    /// Runs `start`; gives the address it printed.
    pub(crate) fn start(&self, id: &str) -> String {
        let output = self.command(id, &["start"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a shim and connects to it.
    pub(crate) fn start_shim(&mut self, id: &str) {
        self.address = self.start(id);
        self.connect();
    }

    /// Connects anew, as after a restart.
    pub(crate) fn connect(&mut self) {
        let client = TaskClient::new(answer(Client::connect(&self.address)).unwrap());
        let response = answer(client.connect(context(), &ConnectRequest::default())).unwrap();
        self.shim_pid = response.shim_pid;
        self.client = Some(client);
    }

    pub(crate) fn client(&self) -> &TaskClient {
        self.client.as_ref().expect("the shim was started")
    }

    pub(crate) fn shim_pid(&self) -> i32 {
        i32::try_from(self.shim_pid).unwrap()
    }

    /// Creates a task in its bundle.
    pub(crate) fn create(&self, id: &str, stdio: &Streams) -> ttrpc::Result<u32> {
        self.restore(id, stdio, "")
    }

    /// Creates a task that goes on from a checkpoint.
    pub(crate) fn restore(&self, id: &str, stdio: &Streams, checkpoint: &str) -> ttrpc::Result<u32> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: self.path(id).display().to_string(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            checkpoint: checkpoint.to_owned(),
            ..Default::default()
        };
        Ok(answer(self.client().create(context(), &request))?.pid)
    }

    /// Starts a task, or an exec of it.
    pub(crate) fn run(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        Ok(answer(self.client().start(context(), &request))?.pid)
    }

    /// Adds an exec of a shell script.
    pub(crate) fn exec(&self, id: &str, exec: &str, script: &str, stdio: &Streams) -> ttrpc::Result<Empty> {
        let process = process(&["sh", "-c", script]).to_string();
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.into_bytes(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        answer(self.client().exec(context(), &request))
    }

    pub(crate) fn state(&self, id: &str, exec: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        answer(self.client().state(context(), &request))
    }

    pub(crate) fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        answer(self.client().wait(context(), &request))
    }

    pub(crate) fn kill(&self, id: &str, exec: &str, signal: i32) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal: u32::try_from(signal).unwrap(),
            ..Default::default()
        };
        answer(self.client().kill(context(), &request))
    }

    pub(crate) fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        answer(self.client().delete(context(), &request))
    }

    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> ttrpc::Result<Empty> {
        let request =
            CloseIORequest { id: id.to_owned(), exec_id: exec.to_owned(), stdin: true, ..Default::default() };
        answer(self.client().close_io(context(), &request))
    }

    pub(crate) fn shutdown(&self, id: &str) -> ttrpc::Result<Empty> {
        answer(
            self.client().shutdown(context(), &ShutdownRequest { id: id.to_owned(), ..Default::default() }),
        )
    }

    /// The `delete` of the program itself.
    pub(crate) fn delete_binary(&self, id: &str) -> DeleteResponse {
        let bundle = self.path(id);
        let output: Output =
            self.command(id, &["-bundle", bundle.to_str().unwrap(), "delete"]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// Waits until so many events were taken; gives all of them in words.
    pub(crate) fn events(&self, count: usize) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut events = self.events.events.lock().unwrap();
        while events.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let words: Vec<_> = events.iter().map(words).collect();
            assert!(!left.is_zero(), "{count} events expected, these came: {words:?}");
            events = self.events.changed.wait_timeout(events, left).unwrap().0;
        }
        assert!(events.iter().all(|event| event.namespace == self.namespace));
        events.iter().map(words).collect()
    }

    /// Deletes the last task's shim and waits until it is gone; gives the events in words.
    pub(crate) fn end(&mut self, id: &str) -> Vec<String> {
        let pid = self.shim_pid();
        // One that was asked before ends by itself.
        let _ = self.shutdown(id);
        wait_gone(pid);
        let socket = self.address.trim_start_matches("unix://");
        assert!(!Path::new(socket).exists(), "the socket is left");
        assert!(!Path::new("/run/mvm").join(&self.namespace).exists(), "the machine's directory is left");
        self.events(0)
    }
}

impl Drop for Containerd {
    /// What a failed test leaves.
    fn drop(&mut self) {
        if self.shim_pid != 0 && is_alive(self.shim_pid()) {
            for pid in children(self.shim_pid()).into_iter().chain([self.shim_pid()]) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = fs::remove_file(self.address.trim_start_matches("unix://"));
            let _ = fs::remove_dir_all(Path::new("/run/mvm").join(&self.namespace));
        }
        self.go_down();
    }
}

/// An event as a line: topic and the fields that matter.
fn words(event: &Envelope) -> String {
    let topic = event.topic.trim_start_matches("/tasks/");
    let value = &event.event.value;
    let rest = match event.event.type_url.strip_prefix("containerd.events.").unwrap() {
        "TaskCreate" => TaskCreate::parse_from_bytes(value).unwrap().container_id,
        "TaskStart" => TaskStart::parse_from_bytes(value).unwrap().container_id,
        "TaskExecAdded" => {
            let event = TaskExecAdded::parse_from_bytes(value).unwrap();
            format!("{}/{}", event.container_id, event.exec_id)
        }
        "TaskExecStarted" => {
            let event = TaskExecStarted::parse_from_bytes(value).unwrap();
            assert_ne!(event.pid, 0);
            format!("{}/{}", event.container_id, event.exec_id)
        }
        "TaskExit" => {
            let event = TaskExit::parse_from_bytes(value).unwrap();
            assert!(event.exited_at.is_some());
            format!("{}/{} {}", event.container_id, event.id, event.exit_status)
        }
        "TaskDelete" => {
            let event = TaskDelete::parse_from_bytes(value).unwrap();
            format!("{} {}", event.container_id, event.exit_status)
        }
        "TaskCheckpointed" => {
            let event = TaskCheckpointed::parse_from_bytes(value).unwrap();
            format!("{} to {}", event.container_id, event.checkpoint)
        }
        "TaskOOM" => TaskOOM::parse_from_bytes(value).unwrap().container_id,
        "TaskPaused" => TaskPaused::parse_from_bytes(value).unwrap().container_id,
        "TaskResumed" => TaskResumed::parse_from_bytes(value).unwrap().container_id,
        other => panic!("an event of type {other}"),
    };
    format!("{topic} {rest}")
}
