//! TTRPC as the tests speak it: calls that block, and a place that takes events and can be gone at any moment.

use std::future::pending;
use std::path::Path;
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Events, create_events};
use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Code, context};
use tokio::runtime::{Builder, Runtime};

use crate::host::PATIENCE;

/// What carries the calls of all tests.
static CALLS: LazyLock<Runtime> = LazyLock::new(runtime);

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Blocks until a call has its answer.
pub(crate) fn answer<F: Future>(call: F) -> F::Output {
    CALLS.block_on(call)
}

/// What a call may take.
pub(crate) fn context() -> context::Context {
    context::with_duration(PATIENCE)
}

/// The class of error a call failed with.
pub(crate) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("no status: {other:?}"),
    }
}

/// Events that were taken.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) events: Mutex<Vec<Envelope>>,
    pub(crate) changed: Condvar,
}

struct Taker(Arc<Received>);

#[async_trait]
impl Events for Taker {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(request.envelope.unwrap_or_default());
        self.0.changed.notify_all();
        Ok(Empty::default())
    }
}

/// Takes events at a socket until it is dropped. Then it is gone as a killed process is: what was on its way stays
/// unanswered, every connection is closed.
pub(crate) struct EventServer {
    _runtime: Runtime,
}

impl EventServer {
    pub(crate) fn new(socket: &Path, received: &Arc<Received>) -> Self {
        let runtime = runtime();
        let service = create_events(Arc::new(Taker(Arc::clone(received))));
        let address = format!("unix://{}", socket.display());
        let mut server =
            runtime.block_on(async { Server::new().bind(&address) }).unwrap().register_service(service);
        runtime.spawn(async move {
            server.start().await.unwrap();
            pending::<()>().await;
        });
        Self { _runtime: runtime }
    }
}
