//! What the prefix cache holds and loses, over HTTP and over ZeroMQ.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use serde_json::json;
use servelab_engine::{EngineConfig, hash_blocks};
use servelab_server::kv_events::zmq::KvZmqOptions;
use servelab_telemetry::Secret;
use servelab_wire::kv_events::stream::KvMessage;
use servelab_wire::kv_events::zmq::{Encoding, KvBatch, REPLAY_END};
use servelab_wire::kv_events::{BlockName, KvEvent};
use servelab_wire::sse::SseReader;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use crate::harness::{Replica, Setup, completion};

const PATIENCE: Duration = Duration::from_secs(60);

/// A reader of the stream, and what it knows.
struct Listener {
    response: reqwest::Response,
    sse: SseReader,
    waiting: Vec<KvMessage>,
    stream: String,
    next: u64,
    held: BTreeMap<BlockName, Vec<u32>>,
}

impl Listener {
    async fn open(replica: &Replica, query: &str) -> Self {
        let response = replica.request("GET", &format!("/kv/events{query}")).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let (sse, waiting) = (SseReader::default(), Vec::new());
        let mut listener =
            Self { response, sse, waiting, stream: String::new(), next: 0, held: BTreeMap::new() };
        while listener.step().await {}
        listener
    }

    async fn message(&mut self) -> KvMessage {
        while self.waiting.is_empty() {
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk()).await.unwrap();
            let texts = self.sse.push(&chunk.unwrap().expect("the stream goes on"));
            self.waiting = texts.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        }
        self.waiting.remove(0)
    }

    /// Takes the next message in. True while more of a snapshot comes.
    async fn step(&mut self) -> bool {
        match self.message().await {
            KvMessage::Snapshot { stream, next, more, events } => {
                (self.stream, self.next) = (stream, next);
                self.apply(events);
                more
            }
            KvMessage::Resumed { stream, next } => {
                (self.stream, self.next) = (stream, next);
                false
            }
            KvMessage::Batch { seq, events } => {
                assert_eq!(seq, self.next, "a number was left out");
                self.next += 1;
                self.apply(events);
                false
            }
            KvMessage::Heartbeat { next } => {
                assert_eq!(next, self.next);
                false
            }
            KvMessage::Gap { .. } => panic!("it was fast enough"),
        }
    }

    fn apply(&mut self, events: Vec<KvEvent>) {
        for event in events {
            match event {
                KvEvent::AllBlocksCleared => self.held.clear(),
                KvEvent::BlockRemoved(removed) => {
                    removed.block_hashes.iter().for_each(|name| {
                        self.held.remove(name).expect("it was there");
                    });
                }
                KvEvent::BlockStored(stored) => {
                    let tokens =
                        stored.token_ids.chunks_exact(stored.block_size as usize).map(<[u32]>::to_vec);
                    self.held.extend(stored.block_hashes.iter().cloned().zip(tokens));
                }
            }
        }
    }

    /// Whether it knows of every block of a prompt of these tokens.
    fn holds(&self, tokens: &[u32]) -> bool {
        hash_blocks(tokens, 16, 0).iter().all(|hash| self.held.contains_key(&BlockName::from(hash.0)))
    }

    async fn until(&mut self, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            self.step().await;
        }
    }
}

fn tokens(first: u32) -> Vec<u32> {
    (0..64).map(|at| (first + at) % 256).collect()
}

async fn ask(replica: &Replica, tokens: &[u32]) {
    let answer =
        replica.post("/v1/completions", &completion(json!({"prompt": tokens, "max_tokens": 1}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

/// Room for two prompts of 64 tokens.
fn small(setup: &mut Setup) {
    setup.engine = EngineConfig { num_blocks: 10, max_model_len: 128, ..setup.engine.clone() };
}

#[tokio::test]
async fn a_listener_hears_of_what_is_stored_evicted_and_reset() {
    let replica = Replica::with(small).await;
    let mut listener = Listener::open(&replica, "").await;
    assert!(listener.held.is_empty());
    ask(&replica, &tokens(0)).await;
    listener.until(|listener| listener.holds(&tokens(0))).await;
    for first in [50, 100] {
        ask(&replica, &tokens(first)).await;
    }
    listener.until(|listener| listener.holds(&tokens(100))).await;
    assert!(!listener.holds(&tokens(0)), "it was evicted");

    let mut late = Listener::open(&replica, "").await;
    late.until(|late| late.next == listener.next).await;
    assert_eq!(late.held, listener.held, "whoever comes late knows as much");

    let query = format!("?from={}&stream={}", listener.next, listener.stream);
    replica.post("/reset_prefix_cache", &json!({})).await;
    listener.until(|listener| listener.held.is_empty()).await;
    ask(&replica, &tokens(7)).await;
    let mut back = Listener::open(&replica, &query).await;
    back.held = late.held.clone();
    back.until(|back| back.holds(&tokens(7))).await;
    listener.until(|listener| listener.holds(&tokens(7))).await;
    assert_eq!(back.held, listener.held, "whoever comes back has missed nothing");
}

#[tokio::test]
async fn a_stream_of_another_run_begins_anew_and_wrong_parameters_are_named() {
    let replica = Replica::start().await;
    ask(&replica, &tokens(0)).await;
    let listener = Listener::open(&replica, "?from=1&stream=of-another-run").await;
    assert!(listener.holds(&tokens(0)));
    for (query, part) in [
        ("?from=1", "belong together"),
        ("?stream=x", "belong together"),
        ("?from=-1&stream=x", "from is \"-1\""),
        ("?form=1", "\"form\" is unknown"),
    ] {
        let answer = replica.get(&format!("/kv/events{query}")).await;
        assert_eq!(answer.status, 400);
        assert!(answer.error()["message"].as_str().unwrap().contains(part), "{}", answer.text);
    }
}

#[tokio::test]
async fn the_stream_asks_for_the_key_and_ends_when_the_replica_drains() {
    let replica = Replica::with(|setup| setup.api_keys = vec![Secret::new("sesame")]).await;
    assert_eq!(replica.get("/kv/events").await.status, 401);
    drop(replica);
    let mut replica = Replica::start().await;
    let mut listener = Listener::open(&replica, "").await;
    replica.signal();
    let ended = async { while listener.response.chunk().await.is_ok_and(|chunk| chunk.is_some()) {} };
    tokio::time::timeout(PATIENCE, ended).await.unwrap();
}

fn free_address() -> String {
    format!("tcp://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
}

#[tokio::test]
async fn the_same_events_go_out_over_zeromq_and_what_was_missed_can_be_replayed() {
    let (publish, replay) = (free_address(), free_address());
    let options = KvZmqOptions {
        publish: publish.clone(),
        replay: Some(replay.clone()),
        topic: None,
        encoding: Encoding::Array,
    };
    let replica = Replica::with(|setup| setup.kv_zmq = Some(options)).await;
    ask(&replica, &tokens(0)).await;

    let mut dealer = DealerSocket::new();
    dealer.connect(&replay).await.unwrap();
    // The answer may be there before its events are.
    let mut replayed = Vec::new();
    let start = Instant::now();
    while replayed.is_empty() && start.elapsed() < PATIENCE {
        replayed = replay_of_all(&mut dealer).await;
    }
    assert_eq!(replayed[0].0, 0, "the recording began with the first step");
    let KvEvent::BlockStored(stored) = &KvBatch::decode(&replayed[0].1).unwrap().events[0] else { panic!() };
    assert_eq!((stored.token_ids.as_slice(), stored.medium.as_deref()), (&tokens(0)[..], Some("GPU")));

    let mut subscriber = SubSocket::new();
    subscriber.connect(&publish).await.unwrap();
    subscriber.subscribe("kv@").await.unwrap();
    // The subscription takes its time to arrive.
    let frames = loop {
        ask(&replica, &tokens(fresh())).await;
        if let Ok(message) = tokio::time::timeout(Duration::from_millis(100), subscriber.recv()).await {
            break message.unwrap().into_vec();
        }
    };
    assert_eq!(frames[0][..], *format!("kv@{}@bytes", replica.address).as_bytes());
    assert!(u64::from_be_bytes(frames[1][..].try_into().unwrap()) >= replayed.len() as u64);
    KvBatch::decode(&frames[2]).unwrap();
}

/// What is replayed from the beginning on, each batch with its number.
async fn replay_of_all(dealer: &mut DealerSocket) -> Vec<(u64, Bytes)> {
    let parts = vec![Bytes::new(), Bytes::from(0_u64.to_be_bytes().to_vec())];
    dealer.send(ZmqMessage::try_from(parts).unwrap()).await.unwrap();
    let mut replayed = Vec::new();
    loop {
        let frames = tokio::time::timeout(PATIENCE, dealer.recv()).await.unwrap().unwrap().into_vec();
        if frames[1][..] == REPLAY_END {
            return replayed;
        }
        replayed.push((u64::from_be_bytes(frames[1][..].try_into().unwrap()), frames[2].clone()));
    }
}

/// Another number each time, for a while.
fn fresh() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let publish = format!("tcp://{}", taken.local_addr().unwrap());
    for address in [publish, "tcp://nowhere".to_owned()] {
        let options =
            KvZmqOptions { publish: address.clone(), replay: None, topic: None, encoding: Encoding::Map };
        let error = Replica::refused(|setup| setup.kv_zmq = Some(options)).await;
        assert!(error.contains(&address) && error.contains("choose another address"), "{error}");
    }
}
