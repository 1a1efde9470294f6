//! Publishes KV events over ZeroMQ as vLLM does: PUB with three frames a batch, and ROUTER for whoever missed some.
//!
//! The sockets know no keys: whoever reaches them reads the tokens of every prompt that is cached. They belong into a
//! network of one's own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use servelab_wire::kv_events::zmq::{Encoding, KvBatch, REPLAY_END};
use zeromq::{Endpoint, PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::log::{Batch, Ended, KvLog, Start};
use super::to_wire;

/// A reader of a replay that takes nothing for that long is left.
const REPLAY_PATIENCE: Duration = Duration::from_secs(10);
/// What vLLM calls the memory that the model computes in.
const MEDIUM: &str = "GPU";

/// Where and how to publish.
#[derive(Clone, Debug)]
pub struct KvZmqOptions {
    /// Address of the PUB socket, `tcp://HOST:PORT`.
    pub publish: String,
    /// Address of the ROUTER socket; `None`: what was missed is lost.
    pub replay: Option<String>,
    /// First frame of every batch; `None`: `kv@ADDRESS@MODEL`.
    pub topic: Option<String>,
    pub encoding: Encoding,
}

/// Sockets that are bound and send nothing yet.
pub struct KvZmq {
    publish: PubSocket,
    replay: Option<RouterSocket>,
    topic: String,
    encoding: Encoding,
}

/// An address of the two that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot publish KV events at {address}: {error}; choose another address, or stop what listens there")]
pub struct KvBindError {
    address: String,
    error: zeromq::ZmqError,
}

impl KvZmq {
    /// # Errors
    /// If an address is taken or wrong.
    pub async fn bind(options: KvZmqOptions, server: SocketAddr, model: &str) -> Result<Self, KvBindError> {
        let KvZmqOptions { publish, replay, topic, encoding } = options;
        let failed = |address: &str| {
            let address = address.to_owned();
            move |error| KvBindError { address, error }
        };
        let mut publisher = PubSocket::new();
        warn_if_open(&publisher.bind(&publish).await.map_err(failed(&publish))?);
        let replay = match replay {
            Some(address) => {
                let mut router = RouterSocket::new();
                warn_if_open(&router.bind(&address).await.map_err(failed(&address))?);
                Some(router)
            }
            None => None,
        };
        let topic = topic.unwrap_or_else(|| format!("kv@{server}@{model}"));
        tracing::info!(address = publish, topic, "KV events are published over ZeroMQ");
        Ok(Self { publish: publisher, replay, topic, encoding })
    }

    /// Publishes until the engine is gone.
    pub async fn run(self, log: Arc<KvLog>, block_size: u32) {
        let Self { publish, replay, topic, encoding } = self;
        let encode = Encode { block_size, encoding };
        let publishing = publish_all(publish, topic, &log, encode);
        match replay {
            Some(socket) => tokio::select! {
                () = publishing => {}
                () = replay_all(socket, &log, encode) => {}
            },
            None => publishing.await,
        }
    }
}

fn warn_if_open(endpoint: &Endpoint) {
    let Endpoint::Tcp(host, _) = endpoint else { return };
    let local = match host.to_string().parse::<std::net::IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.to_string() == "localhost",
    };
    if !local {
        tracing::warn!(address = %endpoint, "whoever reaches this address reads the tokens of cached prompts");
    }
}

#[derive(Clone, Copy)]
struct Encode {
    block_size: u32,
    encoding: Encoding,
}

impl Encode {
    fn payload(self, batch: &Batch) -> Vec<u8> {
        let events = to_wire(&batch.events, self.block_size, Some(MEDIUM));
        KvBatch { ts: batch.unix_seconds, events, data_parallel_rank: Some(0) }.encode(self.encoding)
    }
}

fn frames(frames: Vec<Vec<u8>>) -> Option<ZmqMessage> {
    let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
    ZmqMessage::try_from(frames).ok()
}

/// From the first batch on; numbers that the ring has lost are gaps, which readers see.
async fn publish_all(mut socket: PubSocket, topic: String, log: &Arc<KvLog>, encode: Encode) {
    let Start::Resumed(mut reader) = log.attach(Some((log.id(), 0))) else { return };
    loop {
        match reader.next().await {
            Ok(batch) => {
                let parts =
                    vec![topic.clone().into_bytes(), batch.seq.to_be_bytes().into(), encode.payload(&batch)];
                let Some(message) = frames(parts) else { continue };
                // Never waits: a subscriber that is too slow loses batches, and sees that.
                if let Err(error) = socket.send(message).await {
                    tracing::warn!(%error, seq = batch.seq, "a batch of KV events was not published");
                }
            }
            Err(Ended::Overtaken { oldest }) => reader.skip_to(oldest),
            Err(Ended::Closed) => return,
        }
    }
}

/// Answers `[reader, "", FROM]` with `[reader, "", SEQ, batch]` for each batch that is kept, then -1 and nothing.
async fn replay_all(mut socket: RouterSocket, log: &Arc<KvLog>, encode: Encode) {
    loop {
        let Ok(request) = socket.recv().await else {
            // There is no peer at the moment.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let parts = request.into_vec();
        let [reader, empty, from] = parts.as_slice() else {
            tracing::warn!(
                frames = parts.len(),
                "a replay of KV events was asked for in a form that is unknown"
            );
            continue;
        };
        let (Ok(from), true) = (<[u8; 8]>::try_from(&from[..]), empty.is_empty()) else {
            tracing::warn!(bytes = from.len(), "a replay of KV events begins with no number of eight bytes");
            continue;
        };
        let answers = log.since(u64::from_be_bytes(from));
        let bodies = answers.iter().map(|batch| (batch.seq.to_be_bytes(), encode.payload(batch)));
        for (seq, payload) in bodies.chain([(REPLAY_END, Vec::new())]) {
            let Some(message) = frames(vec![reader.to_vec(), Vec::new(), seq.to_vec(), payload]) else {
                break;
            };
            match tokio::time::timeout(REPLAY_PATIENCE, socket.send(message)).await {
                Ok(Ok(())) => {}
                _ => break,
            }
        }
    }
}
