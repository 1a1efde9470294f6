//! What replicas say that their prefix caches hold, in place of what the router guesses by what it sent where.
//!
//! One task a replica follows its stream: servelab's over HTTP ([`http`]), or vLLM's over ZeroMQ ([`zmq`]). Both feed a
//! [`mirror`] of what the replica holds, and through it the index. While there is no stream, or none yet, the router
//! guesses as it does without one.

pub mod feed;
pub mod http;
pub mod mirror;
pub mod zmq;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use ::http::HeaderValue;
use rand::Rng;
use serde::Serialize;

use self::feed::Feed;
use crate::replicas::client::Client;
use crate::replicas::registry::{Health, Registry, Replica};

/// Where the router looks for events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Over HTTP; if the replica has no such stream, over ZeroMQ, if a port is given.
    #[default]
    Auto,
    Http,
    Zmq,
    Off,
}

/// How the router follows the events of its replicas.
#[derive(Clone, Debug, Default)]
pub struct KvEventsOptions {
    pub transport: Transport,
    /// Of every replica's PUB socket, on the host of its address.
    pub zmq_port: Option<u16>,
    /// Of its ROUTER socket, for what was missed.
    pub replay_port: Option<u16>,
}

/// The port of the PUB socket where none is given, as vLLM's.
pub const ZMQ_PORT: u16 = 5557;

/// How a stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum StreamState {
    /// There is none: switched off, or the replica has none.
    Off,
    /// It is being looked for, or was lost.
    Connecting,
    /// It tells what changes, and the beginning is missing: what is not told is still guessed.
    Partial,
    /// All that the replica holds is known.
    Precise,
}

/// What became of one replica's stream.
#[derive(Debug)]
pub struct StreamStats {
    state: AtomicU8,
    pub batches: AtomicU64,
    pub gaps: AtomicU64,
    pub resyncs: AtomicU64,
}

impl Default for StreamStats {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { state: AtomicU8::new(StreamState::Off as u8), batches: zero(), gaps: zero(), resyncs: zero() }
    }
}

impl StreamStats {
    pub fn state(&self) -> StreamState {
        match self.state.load(Ordering::Relaxed) {
            0 => StreamState::Off,
            1 => StreamState::Connecting,
            2 => StreamState::Partial,
            _ => StreamState::Precise,
        }
    }

    pub fn set(&self, state: StreamState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// A batch was missed.
    pub fn gap(&self) {
        self.gaps.fetch_add(1, Ordering::Relaxed);
    }
}

/// Why a stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The replica has none, and will not have one soon.
    Unsupported(String),
    /// It broke, or made no sense.
    Lost(String),
}

/// Until a stream that was lost is looked for again: at first, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Until a replica without a stream is asked again.
const UNSUPPORTED: Duration = Duration::from_secs(60);

/// Follows the events of a replica until it is taken off the list.
pub async fn follow(
    registry: Arc<Registry>,
    replica: Arc<Replica>,
    client: Client,
    options: Arc<KvEventsOptions>,
    key: Option<HeaderValue>,
) {
    if options.transport == Transport::Off {
        return;
    }
    let removed = replica.removed.clone();
    let followed = async {
        let mut feed = Feed::new(registry.clone(), replica.clone());
        let mut pause = AGAIN.0;
        loop {
            until_ready(&registry, &replica).await;
            replica.kv.set(StreamState::Connecting);
            let batches = replica.kv.batches.load(Ordering::Relaxed);
            let end = one(&mut feed, &client, &options, key.as_ref()).await;
            feed.lost();
            if replica.kv.batches.load(Ordering::Relaxed) > batches {
                pause = AGAIN.0;
            }
            match end {
                End::Unsupported(why) => {
                    tracing::info!(replica = %replica.address, why, "no KV events; its prefixes are guessed");
                    replica.kv.set(StreamState::Off);
                    tokio::time::sleep(UNSUPPORTED).await;
                }
                End::Lost(why) => {
                    tracing::warn!(replica = %replica.address, why, "its KV events are lost; its prefixes are guessed");
                    let jitter = rand::rng().random_range(0.8..1.2);
                    tokio::time::sleep(pause.mul_f64(jitter)).await;
                    pause = (2 * pause).min(AGAIN.1);
                }
            }
        }
    };
    removed.run_until_cancelled(followed).await;
}

async fn one(feed: &mut Feed, client: &Client, options: &KvEventsOptions, key: Option<&HeaderValue>) -> End {
    let over_zmq = |port| zmq::Addresses { port, replay_port: options.replay_port };
    match (options.transport, options.zmq_port) {
        (Transport::Zmq, port) => zmq::follow(feed, over_zmq(port.unwrap_or(ZMQ_PORT))).await,
        (Transport::Auto, Some(port)) => match http::follow(feed, client, key).await {
            End::Unsupported(_) => zmq::follow(feed, over_zmq(port)).await,
            end => end,
        },
        _ => http::follow(feed, client, key).await,
    }
}

async fn until_ready(registry: &Registry, replica: &Replica) {
    let mut changes = registry.changes();
    while replica.health() != Health::Ready {
        if changes.changed().await.is_err() {
            return;
        }
    }
}
