//! containerd's task service: its messages to and from the actor's calls.
//!
//! Versions 2 and 3 differ in their names alone. A method that is not written here would answer NOT_FOUND, which
//! clients take for an answer about a task; so all are.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status as WireStatus,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::{Service as Methods, TtrpcContext};
use mvm_protocol::WindowSize;
use mvm_runtime::failure::Context as _;
use oci_spec::runtime::{LinuxResources, Process as OciProcess};
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::events::{any, timestamp};
use crate::stats;
use crate::stdio::Paths;
use crate::tasks::{Exit, Handle, Name, NewCheckpoint, NewTask, Status};

/// The names the service is served under.
const VERSIONS: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How the type of a checkpoint's options ends: clients have them of `containerd.runc.v1` and `containerd.linux.runc`,
/// which are alike.
const CHECKPOINT_OPTIONS: &str = ".CheckpointOptions";

/// Serves tasks.
struct TaskService {
    tasks: Handle,
}

/// The service under all its names.
pub(crate) fn services(tasks: &Handle) -> HashMap<String, Methods> {
    let named = |name: &str| {
        let service = Arc::new(TaskService { tasks: tasks.clone() });
        create_task(service).into_values().map(|methods| (name.to_owned(), methods)).next()
    };
    VERSIONS.into_iter().filter_map(named).collect()
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        log::debug!("create {} in {}", r.id, r.bundle);
        let stdio = Paths { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal };
        let checkpoint = Some(r.checkpoint).filter(|path| !path.is_empty()).map(PathBuf::from);
        let task = NewTask { id: r.id, bundle: PathBuf::from(r.bundle), rootfs: r.rootfs, stdio, checkpoint };
        let pid = self.tasks.ask(move |tasks, reply| tasks.create(task, reply)).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> ttrpc::Result<StartResponse> {
        log::debug!("start {} {}", r.id, r.exec_id);
        let name = name(r.id, r.exec_id);
        let pid = self.tasks.ask(move |tasks, reply| tasks.start(name, reply)).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let process: Box<OciProcess> = json(&r.spec.value, "the process")?;
        let name = name(r.id, r.exec_id);
        let stdio = Paths { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal };
        self.tasks.ask(move |tasks, reply| tasks.exec(name, process, stdio, reply)).await?;
        Ok(Empty::default())
    }

    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> ttrpc::Result<StateResponse> {
        let name = name(r.id.clone(), r.exec_id.clone());
        let report = self.tasks.ask(move |tasks, reply| drop(reply.send(tasks.report(&name)))).await?;
        let status = match report.status {
            Status::Created => WireStatus::CREATED,
            Status::Running => WireStatus::RUNNING,
            Status::Paused => WireStatus::PAUSED,
            Status::Stopped => WireStatus::STOPPED,
        };
        let (exit_status, exited_at) = wire_exit(report.exit);
        let id = if r.exec_id.is_empty() { r.id } else { r.exec_id.clone() };
        Ok(StateResponse {
            id,
            bundle: report.bundle,
            pid: report.pid,
            status: status.into(),
            stdin: report.stdio.stdin,
            stdout: report.stdio.stdout,
            stderr: report.stdio.stderr,
            terminal: report.stdio.terminal,
            exit_status,
            exited_at,
            exec_id: r.exec_id,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let name = name(r.id, r.exec_id);
        let mut exit = self.tasks.ask(move |tasks, reply| drop(reply.send(tasks.watch(&name)))).await?;
        // A process that is forgotten while somebody waits has told how it ended before, if it ever ran.
        let exit = exit.wait_for(Option::is_some).await.map(|exit| *exit).unwrap_or_default();
        let (exit_status, exited_at) = wire_exit(exit);
        Ok(WaitResponse { exit_status, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        log::debug!("kill {} {} with {}", r.id, r.exec_id, r.signal);
        let name = name(r.id, r.exec_id);
        self.tasks.ask(move |tasks, reply| tasks.kill(name, r.signal, r.all, reply)).await?;
        Ok(Empty::default())
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        log::debug!("delete {} {}", r.id, r.exec_id);
        let name = name(r.id, r.exec_id);
        let (pid, exit) = self.tasks.ask(move |tasks, reply| tasks.delete(name, reply)).await?;
        let (exit_status, exited_at) = wire_exit(exit);
        Ok(DeleteResponse { pid, exit_status, exited_at, ..Default::default() })
    }

    /// The guest's processes have no numbers on the host: the machine stands for them.
    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pid = self.tasks.ask(move |tasks, reply| drop(reply.send(tasks.pid(&r.id)))).await?;
        let process = ProcessInfo { pid, ..Default::default() };
        Ok(PidsResponse { processes: vec![process], ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> ttrpc::Result<Empty> {
        self.tasks.ask(move |tasks, reply| tasks.set_paused(&r.id, true, reply)).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> ttrpc::Result<Empty> {
        self.tasks.ask(move |tasks, reply| tasks.set_paused(&r.id, false, reply)).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        log::debug!("checkpoint {} to {}", r.id, r.path);
        let exit = r.options.as_ref().map(ends_task).transpose()?.unwrap_or(false);
        let wanted = NewCheckpoint { id: r.id, directory: PathBuf::from(r.path), exit };
        self.tasks.ask(move |tasks, reply| tasks.checkpoint(wanted, reply)).await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.tasks.ask(move |tasks, reply| tasks.stats(r.id, reply)).await?;
        let metrics = stats::metrics(&stats.unwrap_or_default());
        Ok(StatsResponse { stats: MessageField::some(any(stats::PACKAGE, &metrics)), ..Default::default() })
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources: LinuxResources = json(&r.resources.value, "the resources")?;
        self.tasks.ask(move |tasks, reply| tasks.update(&r.id, resources, reply)).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let side = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let size = WindowSize { rows: side(r.height), columns: side(r.width) };
        let name = name(r.id, r.exec_id);
        self.tasks.ask(move |tasks, reply| tasks.resize(name, size, reply)).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> ttrpc::Result<Empty> {
        let name = name(r.id, r.exec_id);
        if r.stdin {
            self.tasks.ask(move |tasks, reply| drop(reply.send(tasks.close_stdin(&name)))).await?;
        }
        Ok(Empty::default())
    }

    async fn connect(&self, _: &TtrpcContext, r: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let pid = self.tasks.ask(move |tasks, reply| drop(reply.send(tasks.pid(&r.id)))).await;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            // The shim itself can be asked before there is a task.
            task_pid: pid.unwrap_or(0),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, r: ShutdownRequest) -> ttrpc::Result<Empty> {
        log::debug!("shutdown {}", r.id);
        self.tasks
            .ask(|tasks, reply| {
                tasks.shut_down_when_idle();
                let _ = reply.send(Ok(()));
            })
            .await?;
        Ok(Empty::default())
    }
}

fn name(container: String, exec: String) -> Name {
    Name { container, exec }
}

/// Whether a task is to end with its checkpoint. Of the options only this one has a meaning for a machine; where the
/// checkpoint goes is in the request itself.
fn ends_task(options: &Any) -> Result<bool, Error> {
    if !options.type_url.ends_with(CHECKPOINT_OPTIONS) {
        let text = format!("options of a checkpoint cannot be a {}", options.type_url);
        return Err(Error::invalid_argument(text));
    }
    let parsed = CheckpointOptions::parse_from_bytes(&options.value);
    let parsed = parsed.context(|| "cannot parse the options of the checkpoint".to_owned());
    let parsed = parsed.map_err(|failure| Error::invalid_argument(Error::from(failure).to_string()))?;
    Ok(parsed.exit)
}

/// Zero and no time until there is an exit.
fn wire_exit(exit: Option<Exit>) -> (u32, MessageField<Timestamp>) {
    match exit {
        Some(exit) => (exit.status, MessageField::some(timestamp(exit.at))),
        None => (0, MessageField::none()),
    }
}

/// What containerd carries as JSON in an `Any`.
fn json<T: DeserializeOwned>(value: &[u8], what: &str) -> Result<T, Error> {
    let parsed = serde_json::from_slice(value).context(|| format!("cannot parse {what}"));
    parsed.map_err(|failure| Error::invalid_argument(Error::from(failure).to_string()))
}
