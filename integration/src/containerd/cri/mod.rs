//! A client of the container runtime interface: as much of gRPC as one answer to one question needs.

pub mod messages;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::{RecvStream, client};
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

use messages::{
    ContainerStats, ContainerStatsAnswer, ContainerStatus, ContainerStatusAnswer, CreateContainer, Empty,
    ExecSync, ExecSyncAnswer, Id, PodStatus, PodStatusAnswer, Pods, RunPodSandbox, StopContainer,
    UpdateContainer, Version,
};

/// Bound of one call, emulated.
const BOUND: Duration = Duration::from_secs(240);

/// A daemon's runtime service.
#[derive(Clone, Debug)]
pub struct Cri {
    socket: PathBuf,
}

/// Why a call did not come to an answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The service refuses.
    #[error("{method}: status {status}: {message}")]
    Refused {
        /// What was asked.
        method: &'static str,
        /// gRPC's number of the reason.
        status: String,
        /// The service's words.
        message: String,
    },
    /// The service cannot be reached or does not speak the protocol.
    #[error("{method}")]
    Transport {
        /// What was asked.
        method: &'static str,
        /// What is wrong.
        source: io::Error,
    },
}

/// A method of the interface: its name, what it is asked and what it answers.
macro_rules! methods {
    ($($(#[$comment:meta])* $name:ident: $method:literal, $request:ty => $answer:ty;)*) => {
        impl Cri {
            $($(#[$comment])*
            ///
            /// # Errors
            /// The service refuses or cannot be reached.
            pub fn $name(&self, request: &$request) -> Result<$answer, Error> {
                self.call($method, request)
            })*
        }
    };
}

methods! {
    /// Who serves.
    version: "Version", Empty => Version;
    /// Makes a pod.
    run_pod: "RunPodSandbox", RunPodSandbox => Id;
    /// Ends a pod and its containers.
    stop_pod: "StopPodSandbox", Id => Empty;
    /// Removes an ended pod.
    remove_pod: "RemovePodSandbox", Id => Empty;
    /// Every pod there is.
    list_pods: "ListPodSandbox", Empty => Pods;
    /// Makes a container in a pod.
    create: "CreateContainer", CreateContainer => Id;
    /// Starts a container.
    start: "StartContainer", Id => Empty;
    /// Ends a container.
    stop: "StopContainer", StopContainer => Empty;
    /// Removes an ended container.
    remove: "RemoveContainer", Id => Empty;
    /// Runs a command in a container to its end.
    exec: "ExecSync", ExecSync => ExecSyncAnswer;
    /// Changes a container's limits.
    update: "UpdateContainerResources", UpdateContainer => Empty;
}

impl Cri {
    /// The service at a socket.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// A pod's state.
    ///
    /// # Errors
    /// The service refuses or cannot be reached.
    pub fn pod_status(&self, id: &str) -> Result<PodStatus, Error> {
        let answer: PodStatusAnswer = self.call("PodSandboxStatus", &Id { id: id.to_owned() })?;
        Ok(answer.status.unwrap_or_default())
    }

    /// A container's state.
    ///
    /// # Errors
    /// The service refuses or cannot be reached.
    pub fn status(&self, id: &str) -> Result<ContainerStatus, Error> {
        let answer: ContainerStatusAnswer = self.call("ContainerStatus", &Id { id: id.to_owned() })?;
        Ok(answer.status.unwrap_or_default())
    }

    /// What a container uses.
    ///
    /// # Errors
    /// The service refuses or cannot be reached.
    pub fn stats(&self, id: &str) -> Result<ContainerStats, Error> {
        let answer: ContainerStatsAnswer = self.call("ContainerStats", &Id { id: id.to_owned() })?;
        Ok(answer.stats.unwrap_or_default())
    }

    /// One call on a connection of its own.
    fn call<A: Message + Default>(&self, method: &'static str, request: &impl Message) -> Result<A, Error> {
        let transport = |source| Error::Transport { method, source };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(transport)?;
        let exchange = exchange(&self.socket, method, framed(request));
        let answered =
            runtime.block_on(async { tokio::time::timeout(BOUND, exchange).await.map_err(io::Error::from)? });
        let (body, trailers) = answered.map_err(transport)?;
        let text = |name: &str| {
            trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let status = text("grpc-status").unwrap_or_else(|| "missing".to_owned());
        if status != "0" {
            let message = text("grpc-message").unwrap_or_default();
            return Err(Error::Refused { method, status, message });
        }
        // The flag of compression and the length come first (the gRPC over HTTP/2 protocol, "Length-Prefixed-Message").
        let message = body.get(5..).unwrap_or_default();
        A::decode(message).map_err(|error| transport(io::Error::other(error)))
    }
}

fn framed(message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    bytes.put_slice(&message.encode_to_vec());
    bytes.freeze()
}

/// Sends one request and reads its answer: the body, and the headers that came last.
async fn exchange(socket: &Path, method: &str, body: Bytes) -> io::Result<(Vec<u8>, HeaderMap)> {
    let stream = UnixStream::connect(socket).await?;
    let (sender, connection) = client::handshake(stream).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    let request = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(io::Error::other)?;
    let mut sender = sender.ready().await.map_err(io::Error::other)?;
    let (response, mut upload) = sender.send_request(request, false).map_err(io::Error::other)?;
    upload.send_data(body, true).map_err(io::Error::other)?;
    let response = response.await.map_err(io::Error::other)?;
    let headers = response.headers().clone();
    let mut stream = response.into_body();
    let received = receive(&mut stream).await?;
    // A refusal comes as headers alone.
    let trailers = stream.trailers().await.map_err(io::Error::other)?.unwrap_or(headers);
    Ok((received, trailers))
}

async fn receive(stream: &mut RecvStream) -> io::Result<Vec<u8>> {
    let mut received = Vec::new();
    while let Some(part) = stream.data().await {
        let part = part.map_err(io::Error::other)?;
        received.extend_from_slice(&part);
        stream.flow_control().release_capacity(part.len()).map_err(io::Error::other)?;
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_preceded_by_its_length() {
        let bytes = framed(&Id { id: "abc".to_owned() });
        assert_eq!(bytes[..], [0, 0, 0, 0, 5, 0x0a, 3, b'a', b'b', b'c']);
    }

    #[test]
    fn a_socket_that_is_not_there_is_named_by_the_method() {
        let error = Cri::new(Path::new("/no/such/socket")).version(&Empty {}).unwrap_err();
        assert_eq!(error.to_string(), "Version");
    }
}
