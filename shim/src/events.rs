//! Tells containerd what happens to tasks, in the order it happened.
//!
//! Events are forwarded one after the other over one connection. When containerd is away an event is tried again a
//! few times before it is given up; the rest waits behind it, bounded.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context::with_duration;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// The package of the events' messages.
const PACKAGE: &str = "containerd.events";
/// Time for containerd to take one event.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often an event is tried.
const TRIES: u32 = 5;
/// Events that may wait.
const QUEUE: usize = 2048;

/// Takes events and forwards them behind the caller's back.
#[derive(Debug)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

#[derive(Debug)]
enum Item {
    Event(Box<Envelope>),
    /// Answered when everything before it is out.
    Flush(oneshot::Sender<()>),
}

impl Publisher {
    /// Forwards to containerd's TTRPC socket; without an address, to nobody. Needs to be called in the runtime.
    pub(crate) fn new(namespace: &str, address: Option<String>) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        tokio::spawn(Forwarder { address, client: None }.run(items));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Queues an event.
    pub(crate) fn publish<M: Message>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any(PACKAGE, event)),
            ..Default::default()
        };
        if self.queue.try_send(Item::Event(Box::new(envelope))).is_err() {
            log::warn!("event {topic} dropped: {QUEUE} others wait for containerd");
        }
    }

    /// Comes back when all events so far are out or given up.
    pub(crate) fn flushed(&self) -> oneshot::Receiver<()> {
        let (done, flushed) = oneshot::channel();
        // A queue without room drops the sender: the flush is over at once.
        let _ = self.queue.try_send(Item::Flush(done));
        flushed
    }
}

struct Forwarder {
    address: Option<String>,
    client: Option<EventsClient>,
}

impl Forwarder {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(item) = items.recv().await {
            match item {
                Item::Flush(done) => drop(done.send(())),
                Item::Event(event) => self.forward(*event).await,
            }
        }
    }

    async fn forward(&mut self, event: Envelope) {
        let Some(address) = self.address.clone() else { return };
        let topic = event.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(event), ..Default::default() };
        let mut why = String::new();
        for attempt in 0..TRIES {
            tokio::time::sleep(Duration::from_secs(attempt.into())).await;
            // A connection that was idle over a restart of containerd fails once: that is no try.
            let was_idle = self.client.is_some();
            match self.try_once(&address, &request).await {
                Ok(()) => return,
                Err(_) if was_idle && attempt == 0 => match self.try_once(&address, &request).await {
                    Ok(()) => return,
                    Err(error) => why = error,
                },
                Err(error) => why = error,
            }
            log::debug!("event {topic} not taken: {why}");
        }
        log::warn!("event {topic} given up after {TRIES} tries: {why}");
    }

    async fn try_once(&mut self, address: &str, request: &ForwardRequest) -> Result<(), String> {
        let client = match self.client.take() {
            Some(client) => client,
            // Not `Client::connect`: it blocks the whole daemon while a containerd that hangs has no room.
            None => {
                let stream = UnixStream::connect(address).await.map_err(|error| error.to_string())?;
                EventsClient::new(Client::new(stream.into()))
            }
        };
        client.forward(with_duration(TIMEOUT), request).await.map_err(|error| error.to_string())?;
        self.client = Some(client);
        Ok(())
    }
}

/// A message of a package as containerd's type registry names it: without a host in front. The message could tell
/// its package itself, but only by way of descriptors that take half a megabyte.
pub(crate) fn any<M: Message>(package: &str, message: &M) -> Any {
    Any {
        type_url: format!("{package}.{}", M::NAME),
        // Encoding to memory fails on missing required fields alone, which proto3 does not have.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

/// A time on the wire.
pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}
