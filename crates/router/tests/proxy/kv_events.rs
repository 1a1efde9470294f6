//! Replicas that say what they hold, over HTTP and over ZeroMQ, with what can go wrong on the way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use http::{StatusCode, Uri};
use serde_json::{Value, json};
use servelab_router::events::{KvEventsOptions, Transport};
use servelab_router::{RouterOptions, Source};
use servelab_wire::kv_events::stream::KvMessage;
use servelab_wire::kv_events::zmq::{Encoding, KvBatch, REPLAY_END};
use servelab_wire::kv_events::{BlockName, BlockRemoved, BlockStored, KvEvent};
use tokio::sync::mpsc;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use crate::util::{PATIENCE, Routed, options, until};

/// A replica whose stream says what the test wants.
struct Teller {
    address: std::net::SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// One for each connection to come. Without one, there is no such stream here.
    streams: Mutex<VecDeque<mpsc::UnboundedReceiver<KvMessage>>>,
    /// What was asked for.
    asked: Mutex<Vec<String>>,
}

impl Teller {
    async fn start() -> Self {
        let shared = Arc::new(Shared::default());
        let answer = async || {
            axum::Json(json!({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}))
        };
        let router = Router::new()
            .route("/health", get(async || StatusCode::OK))
            .route("/v1/completions", post(answer))
            .route("/kv/events", get(stream))
            .with_state(shared.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(axum::serve(listener, router).into_future());
        Self { address, shared }
    }

    /// What the next connection is told.
    fn stream(&self) -> mpsc::UnboundedSender<KvMessage> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.shared.streams.lock().unwrap().push_back(receiver);
        sender
    }

    fn options(&self, transport: Transport) -> RouterOptions {
        RouterOptions {
            sources: vec![Source::Static(vec![self.address.to_string().parse().unwrap()])],
            kv_events: KvEventsOptions { transport, ..KvEventsOptions::default() },
            ..options(&[])
        }
    }
}

async fn stream(State(shared): State<Arc<Shared>>, uri: Uri) -> Response {
    let Some(messages) = shared.streams.lock().unwrap().pop_front() else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    shared.asked.lock().unwrap().push(uri.query().unwrap_or_default().to_owned());
    let frames = futures::stream::unfold(messages, async |mut messages| {
        let message = messages.recv().await?;
        let text = format!("data: {}\n\n", serde_json::to_string(&message).unwrap());
        Some((Ok::<_, std::io::Error>(Bytes::from(text)), messages))
    });
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(Body::from_stream(frames.boxed()))
        .unwrap()
}

fn names(blocks: std::ops::Range<u64>) -> Vec<BlockName> {
    blocks.map(BlockName::Number).collect()
}

/// Blocks of 16 tokens from `first` on, named by their number.
fn stored(first: u32, blocks: u32) -> KvEvent {
    let name = u64::from(first) * 100;
    KvEvent::BlockStored(BlockStored {
        block_hashes: names(name..name + u64::from(blocks)),
        token_ids: (first..first + 16 * blocks).collect(),
        block_size: 16,
        ..BlockStored::default()
    })
}

fn removed(first: u32, block: u64) -> KvEvent {
    let name = u64::from(first) * 100 + block;
    KvEvent::BlockRemoved(BlockRemoved { block_hashes: names(name..name + 1), ..BlockRemoved::default() })
}

fn snapshot(next: u64, events: Vec<KvEvent>) -> KvMessage {
    KvMessage::Snapshot { stream: "run".into(), next, more: false, events }
}

impl Routed {
    async fn replica(&self) -> Value {
        self.get("/replicas").send().await.unwrap().json::<Value>().await.unwrap()["replicas"][0].clone()
    }

    /// Waits until the replica is seen so.
    async fn until_replica(&self, name: &str, value: Value) {
        until(async || self.replica().await[name] == value).await;
    }

    /// Sends a prompt of 80 tokens, and gives how many of them the router believes to be there.
    async fn matched(&self, first: u32) -> u64 {
        let prompt: Vec<u32> = (first..first + 80).collect();
        let body = json!({"prompt": prompt, "max_tokens": 1});
        let sent =
            self.client.post(format!("{}/v1/completions", self.base)).json(&body).send().await.unwrap();
        assert_eq!(sent.status(), 200);
        let decisions: Value = self.get("/decisions?limit=1").send().await.unwrap().json().await.unwrap();
        decisions["decisions"][0]["matched_tokens"].as_u64().unwrap()
    }
}

#[tokio::test]
async fn what_a_replica_tells_is_believed_until_a_number_is_missing() {
    let teller = Teller::start().await;
    let (first, second, third) = (teller.stream(), teller.stream(), teller.stream());
    let routed = Routed::start(teller.options(Transport::Auto), 1).await;
    first
        .send(KvMessage::Snapshot { stream: "run".into(), next: 5, more: true, events: vec![stored(0, 4)] })
        .unwrap();
    first.send(snapshot(5, vec![stored(1000, 2)])).unwrap();
    routed.until_replica("kv_events", json!("precise")).await;
    assert_eq!(routed.replica().await["index_blocks"], 6);
    first.send(KvMessage::Batch { seq: 5, events: vec![removed(0, 3)] }).unwrap();
    first.send(KvMessage::Heartbeat { next: 6 }).unwrap();
    routed.until_replica("kv_batches", json!(1)).await;
    assert_eq!(routed.matched(0).await, 48, "the fourth block was evicted");
    assert_eq!(routed.matched(0).await, 79, "what was sent is expected; one token is always computed");
    assert_eq!(routed.matched(1000).await, 32);

    first.send(KvMessage::Batch { seq: 7, events: vec![stored(2000, 1)] }).unwrap();
    second.send(snapshot(9, vec![stored(2000, 3)])).unwrap();
    routed.until_replica("kv_resyncs", json!(1)).await;
    assert_eq!(routed.replica().await["kv_gaps"], 1);
    assert_eq!((routed.matched(2000).await, routed.matched(0).await), (48, 0));

    // The stream breaks and goes on where it was.
    drop(second);
    third.send(KvMessage::Resumed { stream: "run".into(), next: 9 }).unwrap();
    third
        .send(KvMessage::Batch { seq: 9, events: vec![KvEvent::AllBlocksCleared, stored(3000, 1)] })
        .unwrap();
    routed.until_replica("kv_batches", json!(2)).await;
    assert_eq!((routed.matched(3000).await, routed.matched(2000).await), (16, 0));
    assert_eq!(*teller.shared.asked.lock().unwrap(), ["", "", "from=9&stream=run"]);
    let series = format!("servelab_router_kv_events_state{{replica=\"http://{}\"}}", teller.address);
    assert_eq!(routed.metric(&series).await, 3.0);
}

#[tokio::test]
async fn nonsense_is_not_believed_and_a_reader_that_was_too_slow_begins_anew() {
    let teller = Teller::start().await;
    let streams = [(); 3].map(|()| teller.stream());
    let routed = Routed::start(teller.options(Transport::Http), 1).await;
    let KvEvent::BlockStored(mut bad) = stored(0, 2) else { panic!() };
    bad.token_ids.pop();
    streams[0].send(snapshot(1, vec![KvEvent::BlockStored(bad)])).unwrap();
    streams[1].send(snapshot(1, vec![])).unwrap();
    streams[1].send(KvMessage::Gap { oldest: 4 }).unwrap();
    streams[2].send(snapshot(4, vec![stored(0, 2)])).unwrap();
    routed.until_replica("kv_gaps", json!(1)).await;
    routed.until_replica("kv_resyncs", json!(1)).await;
    assert_eq!(routed.matched(0).await, 32);
    assert_eq!(*teller.shared.asked.lock().unwrap(), ["", "", ""]);
}

#[tokio::test]
async fn a_replica_without_a_stream_is_guessed() {
    let backend = crate::util::Backend::start(crate::util::Behaviour::Answer);
    let options = RouterOptions {
        kv_events: KvEventsOptions { transport: Transport::Auto, ..KvEventsOptions::default() },
        ..options(&[&backend])
    };
    let routed = Routed::start(options, 1).await;
    until(async || backend.came() == 1).await;
    routed.until_replica("kv_events", json!("off")).await;
    assert_eq!((routed.matched(0).await, routed.matched(0).await), (0, 79));
}

/// Batches with their sequence numbers.
type Kept = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// What vLLM's publisher does.
struct Publisher {
    socket: PubSocket,
    port: u16,
    replay_port: u16,
    kept: Kept,
    next: u64,
    last: Vec<Vec<u8>>,
}

fn message(frames: Vec<Vec<u8>>) -> ZmqMessage {
    ZmqMessage::try_from(frames.into_iter().map(Bytes::from).collect::<Vec<_>>()).unwrap()
}

fn port(endpoint: &zeromq::Endpoint) -> u16 {
    endpoint.to_string().rsplit_once(':').unwrap().1.parse().unwrap()
}

impl Publisher {
    async fn start() -> Self {
        let (mut socket, mut replay) = (PubSocket::new(), RouterSocket::new());
        let port_of = port(&socket.bind("tcp://127.0.0.1:0").await.unwrap());
        let replay_port = port(&replay.bind("tcp://127.0.0.1:0").await.unwrap());
        let kept: Kept = Arc::default();
        let answers = kept.clone();
        tokio::spawn(async move {
            loop {
                let Ok(request) = replay.recv().await else {
                    tokio::task::yield_now().await;
                    continue;
                };
                let frames = request.into_vec();
                let from = u64::from_be_bytes(frames[2][..].try_into().unwrap());
                let all = answers.lock().unwrap().clone();
                let wanted = all.into_iter().filter(|(seq, _)| *seq >= from);
                let wanted = wanted.map(|(seq, payload)| (seq.to_be_bytes(), payload));
                for (seq, payload) in wanted.chain([(REPLAY_END, Vec::new())]) {
                    let parts = vec![frames[0].to_vec(), Vec::new(), seq.to_vec(), payload];
                    replay.send(message(parts)).await.unwrap();
                }
            }
        });
        Self { socket, port: port_of, replay_port, kept, next: 0, last: Vec::new() }
    }

    async fn send(&mut self, event: KvEvent, heard: bool, kept: bool) {
        let ts = self.next as f64;
        let batch = KvBatch { ts, events: vec![event], data_parallel_rank: None }.encode(Encoding::Array);
        if kept {
            self.kept.lock().unwrap().push((self.next, batch.clone()));
        }
        if heard {
            let frames = vec![b"kv@test".to_vec(), self.next.to_be_bytes().to_vec(), batch];
            self.last = frames;
        }
        self.next += 1;
    }

    /// Sends the last batch until the router has heard so many: a subscription takes its time to arrive, and what comes
    /// again is no news.
    async fn until_heard(&mut self, routed: &Routed, batches: u64) {
        let heard = async {
            while routed.replica().await["kv_batches"] != batches {
                self.socket.send(message(self.last.clone())).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, heard).await.expect("the router hears the batch");
    }
}

#[tokio::test]
async fn over_zeromq_what_is_missing_is_replayed_or_all_is_forgotten() {
    let teller = Teller::start().await;
    let mut publisher = Publisher::start().await;
    publisher.send(stored(0, 4), false, true).await;
    publisher.send(removed(0, 3), false, true).await;
    let mut options = teller.options(Transport::Zmq);
    options.kv_events.zmq_port = Some(publisher.port);
    options.kv_events.replay_port = Some(publisher.replay_port);
    let routed = Routed::start(options, 1).await;
    routed.until_replica("kv_events", json!("precise")).await;
    assert_eq!(routed.matched(0).await, 48, "all of the past was replayed");

    publisher.send(stored(1000, 2), false, true).await;
    publisher.send(stored(2000, 1), true, true).await;
    publisher.until_heard(&routed, 2).await;
    assert_eq!((routed.matched(1000).await, routed.matched(2000).await), (32, 16));
    assert_eq!(routed.replica().await["kv_gaps"], 1);

    publisher.send(removed(1000, 1), false, false).await;
    publisher.send(stored(3000, 1), true, true).await;
    publisher.until_heard(&routed, 3).await;
    assert_eq!(routed.replica().await["kv_events"], "partial");
    assert_eq!((routed.matched(3000).await, routed.matched(2000).await), (16, 0));
    assert_eq!(routed.matched(2000).await, 79, "what was before is guessed again");

    // Another run of the replica counts from 0 again.
    publisher.kept.lock().unwrap().clear();
    let batch =
        KvBatch { ts: publisher.next as f64 + 1.0, events: vec![stored(4000, 1)], data_parallel_rank: None };
    publisher.last = vec![Vec::new(), 0_u64.to_be_bytes().to_vec(), batch.encode(Encoding::Map)];
    publisher.until_heard(&routed, 4).await;
    assert_eq!(routed.replica().await["kv_events"], "precise");
    assert_eq!((routed.matched(4000).await, routed.matched(3000).await), (16, 0));
}
