//! Backends that do as they are told, and a router before them.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use http::StatusCode;
use serde_json::{Value, json};
use servelab_front::prompts::{Prompter, TextFiles};
use servelab_router::choice::fleet::FleetOptions;
use servelab_router::choice::policy::Policy;
use servelab_router::choice::rates::Pace;
use servelab_router::events::{KvEventsOptions, Transport};
use servelab_router::limits::KeyLimits;
use servelab_router::metrics::RouterMetrics;
use servelab_router::parity::watch::ParityOptions;
use servelab_router::prompt::BLOCK_SIZE;
use servelab_router::replicas::probe::ProbeOptions;
use servelab_router::{HoldOptions, RouterOptions, Server, Source, Timeouts};
use servelab_wire::TokenizeRequest;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long anything may take before a test gives up. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a backend does with a request that generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    Answer,
    /// Answers with this status and an error body.
    Status(u16),
    /// Never answers.
    Hang,
    /// Closes the connection before anything is said.
    BreakAtOnce,
    /// Three events, half of a fourth, and the end of the connection.
    BreakMidway,
    /// Two events, then silence.
    Stall,
    /// Announces more bytes than it sends.
    ShortBody,
    /// A stream without end, as fast as it is read.
    Endless,
}

/// One backend, on threads of its own: dropped, all its connections break, as those of a process that is killed.
pub struct Backend {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

struct Shared {
    behaviour: Mutex<Behaviour>,
    ready: Mutex<bool>,
    name: String,
    /// Requests that generate: how many came, and how many are inside.
    came: AtomicUsize,
    inside: AtomicUsize,
    /// Bytes that were handed to an endless stream's connection.
    sent: AtomicUsize,
    /// Headers of the last request.
    headers: Mutex<Value>,
    /// What it serves as its tokenizer, and what it tokenises with.
    text: Mutex<Option<(TextFiles, Arc<Prompter>)>>,
}

/// Counts a request while it, or its answer, lives.
struct Inside(Arc<Shared>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Backend {
    pub fn start(behaviour: Behaviour) -> Self {
        Self::on("127.0.0.1:0".parse().unwrap(), behaviour)
    }

    pub fn on(address: SocketAddr, behaviour: Behaviour) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let socket = std::net::TcpListener::bind(address).unwrap();
        let address = socket.local_addr().unwrap();
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(behaviour),
            ready: Mutex::new(true),
            name: address.port().to_string(),
            came: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            headers: Mutex::new(Value::Null),
            text: Mutex::new(None),
        });
        let router = Router::new()
            .route("/health", get(health))
            .route("/tokenizer", get(manifest))
            .route("/tokenizer/{file}", get(tokenizer_file))
            .route("/tokenize", post(tokenize))
            .fallback(serve)
            .with_state(shared.clone());
        socket.set_nonblocking(true).unwrap();
        runtime
            .spawn(async move { axum::serve(TcpListener::from_std(socket).unwrap(), router).await.unwrap() });
        Self { address, shared, runtime: Some(runtime) }
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.shared.behaviour.lock().unwrap() = behaviour;
    }

    /// It serves the demo model's tokenizer with one chat template, and tokenises with another.
    pub fn tokenise(&self, served: &str, used: &str) {
        let prompter = Arc::new(Prompter::new(&demo_files(used)).unwrap());
        *self.shared.text.lock().unwrap() = Some((demo_files(served), prompter));
    }

    pub fn set_ready(&self, ready: bool) {
        *self.shared.ready.lock().unwrap() = ready;
    }

    pub fn came(&self) -> usize {
        self.shared.came.load(Ordering::SeqCst)
    }

    pub fn inside(&self) -> usize {
        self.shared.inside.load(Ordering::SeqCst)
    }

    pub fn sent(&self) -> usize {
        self.shared.sent.load(Ordering::SeqCst)
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn headers(&self) -> Value {
        self.shared.headers.lock().unwrap().clone()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

async fn health(State(shared): State<Arc<Shared>>) -> StatusCode {
    if *shared.ready.lock().unwrap() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// The demo model's tokenizer with this chat template.
pub fn demo_files(template: &str) -> TextFiles {
    TextFiles {
        tokenizer: Bytes::from_static(include_bytes!("../../../model/demo/tokenizer.json")),
        tokenizer_config: None,
        chat_template: Some(template.to_owned().into()),
    }
}

async fn manifest(State(shared): State<Arc<Shared>>) -> Result<axum::Json<Value>, StatusCode> {
    let text = shared.text.lock().unwrap();
    let (files, _) = text.as_ref().ok_or(StatusCode::NOT_FOUND)?;
    let list: Vec<Value> =
        files.list().map(|(name, content)| json!({"name": name, "bytes": content.len()})).collect();
    let revision = format!("{:032x}", files.revision());
    Ok(axum::Json(json!({"model": "demo", "revision": revision, "block_size": 16, "files": list})))
}

async fn tokenizer_file(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Bytes, StatusCode> {
    let text = shared.text.lock().unwrap();
    let (files, _) = text.as_ref().ok_or(StatusCode::NOT_FOUND)?;
    files
        .list()
        .find(|(known, _)| *known == name)
        .map(|(_, content)| content.clone())
        .ok_or(StatusCode::NOT_FOUND)
}

async fn tokenize(
    State(shared): State<Arc<Shared>>,
    axum::Json(body): axum::Json<Value>,
) -> Result<axum::Json<Value>, StatusCode> {
    let text = shared.text.lock().unwrap();
    let (_, prompter) = text.as_ref().ok_or(StatusCode::NOT_FOUND)?;
    let request = TokenizeRequest::read(body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let tokens = prompter.tokenize(request).map_err(|_| StatusCode::BAD_REQUEST)?.tokens;
    Ok(axum::Json(json!({"count": tokens.len(), "max_model_len": 512, "tokens": *tokens})))
}

async fn serve(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if request.uri().path() == "/metrics" {
        return StatusCode::NOT_FOUND.into_response();
    }
    let headers =
        request.headers().iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().into()));
    *shared.headers.lock().unwrap() = Value::Object(headers.collect());
    shared.came.fetch_add(1, Ordering::SeqCst);
    shared.inside.fetch_add(1, Ordering::SeqCst);
    let inside = Inside(shared.clone());
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let streams = serde_json::from_slice::<Value>(&body).is_ok_and(|body| body["stream"] == true);
    let behaviour = *shared.behaviour.lock().unwrap();
    match behaviour {
        Behaviour::Answer if streams => events(inside, 4, Ending::Done),
        Behaviour::Answer => answer(&shared),
        Behaviour::Status(status) => {
            let error =
                json!({"message": "as the test says", "type": "server_error", "param": null, "code": null});
            let body = json!({"error": error});
            (StatusCode::from_u16(status).unwrap(), [("x-backend", shared.name.clone())], axum::Json(body))
                .into_response()
        }
        Behaviour::Hang => std::future::pending().await,
        Behaviour::BreakAtOnce => panic!("as the test says"),
        Behaviour::BreakMidway => events(inside, 3, Ending::Break),
        Behaviour::Stall => events(inside, 2, Ending::Silence),
        Behaviour::ShortBody => {
            let pieces = futures::stream::iter([
                Ok(Bytes::from_static(b"{\"usage\":")),
                Err(std::io::Error::other("cut")),
            ]);
            Response::builder().header("content-length", "100").body(Body::from_stream(pieces)).unwrap()
        }
        Behaviour::Endless => endless(inside),
    }
}

fn answer(shared: &Shared) -> Response {
    let body = json!({
        "backend": shared.name,
        "choices": [{"text": "yes"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25, "prompt_tokens_details": {"cached_tokens": 16}},
    });
    ([("x-backend", shared.name.clone())], axum::Json(body)).into_response()
}

enum Ending {
    Done,
    Break,
    Silence,
}

fn event(number: usize) -> Bytes {
    Bytes::from(format!("data: {{\"n\":{number}}}\n\n"))
}

fn events(inside: Inside, count: usize, ending: Ending) -> Response {
    let first = futures::stream::iter((0..count).map(|number| Ok(event(number))));
    let last: futures::stream::BoxStream<'static, Result<Bytes, std::io::Error>> = match ending {
        Ending::Done => futures::stream::iter([Ok(Bytes::from_static(b"data: [DONE]\n\n"))]).boxed(),
        Ending::Break => {
            futures::stream::iter([
                Ok(Bytes::from_static(b"data: {\"n\":")),
                Err(std::io::Error::other("cut")),
            ])
            // The half is written before the connection goes.
            .then(async |piece| {
                tokio::time::sleep(Duration::from_millis(50)).await;
                piece
            })
            .boxed()
        }
        Ending::Silence => futures::stream::pending().boxed(),
    };
    stream(first.chain(last).map(move |piece| {
        let _ = &inside;
        piece
    }))
}

fn endless(inside: Inside) -> Response {
    let piece = Bytes::from(format!("data: {}\n\n", "x".repeat(16 * 1024)));
    stream(futures::stream::repeat_with(move || {
        inside.0.sent.fetch_add(piece.len(), Ordering::SeqCst);
        Ok::<_, std::io::Error>(piece.clone())
    }))
}

fn stream<S>(pieces: S) -> Response
where
    S: futures::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static,
{
    let body = Body::from_stream(pieces);
    Response::builder().header("content-type", "text/event-stream").body(body).unwrap()
}

/// A router in front of some backends.
pub struct Routed {
    pub base: String,
    pub client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<()>,
}

/// Options for tests: everything quick.
pub fn options(backends: &[&Backend]) -> RouterOptions {
    options_to(&backends.iter().map(|backend| backend.address).collect::<Vec<_>>())
}

/// The same before whatever listens there.
pub fn options_to(addresses: &[SocketAddr]) -> RouterOptions {
    let addresses = addresses.iter().map(|address| address.to_string().parse().unwrap()).collect();
    RouterOptions {
        host: "127.0.0.1".into(),
        port: 0,
        sources: vec![Source::Static(addresses)],
        fleet: FleetOptions {
            policy: Policy::Cost,
            seed: 1,
            index_bytes: 1 << 20,
            block_size: BLOCK_SIZE,
            prior: Pace::default(),
        },
        kv_events: KvEventsOptions { transport: Transport::Off, ..KvEventsOptions::default() },
        probe: ProbeOptions { interval: Duration::from_millis(50), ..ProbeOptions::default() },
        parity: ParityOptions::default(),
        timeouts: Timeouts { connect: Duration::from_secs(5), ..Timeouts::default() },
        hold: HoldOptions { max_requests: 100, timeout: PATIENCE },
        max_retries: 3,
        hedge_quantile: None,
        max_connections: 1000,
        max_body_bytes: 1 << 20,
        max_in_flight_per_replica: 100,
        max_waiting: 100,
        keys: Vec::new(),
        anonymous_limits: KeyLimits::default(),
        limits_redis: None,
        admin_key: None,
        replica_key: None,
        idempotency_window: Duration::from_secs(600),
        drain_timeout: PATIENCE,
        metrics: Arc::new(RouterMetrics::new("servelab_", Policy::Cost).unwrap()),
        traces: servelab_telemetry::Traces::off(),
    }
}

impl Routed {
    /// Starts it and waits until it sees that many replicas ready.
    pub async fn start(options: RouterOptions, ready: u64) -> Self {
        let server = Server::bind(options).await.unwrap();
        let base = format!("http://{}", server.local_addr());
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            server.run(stopped).await.unwrap();
        });
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let routed = Self { base, client, stop: Some(stop), task };
        until(async || routed.health().await["replicas_ready"] == ready).await;
        routed
    }

    pub async fn before(backends: &[&Backend]) -> Self {
        Self::start(options(backends), backends.len() as u64).await
    }

    pub async fn health(&self) -> Value {
        self.get("/health").send().await.unwrap().json().await.unwrap()
    }

    pub fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.client.get(format!("{}{path}", self.base))
    }

    /// A completion, whole or streamed.
    pub fn ask(&self, streams: bool) -> reqwest::RequestBuilder {
        let body = json!({"prompt": "What is a block?", "max_tokens": 10, "stream": streams});
        self.client.post(format!("{}/v1/completions", self.base)).json(&body)
    }

    /// The value of a series, 0 if it is not there.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").send().await.unwrap().text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Tells it to stop.
    pub fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }
}

impl Drop for Routed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until it holds.
pub async fn until(holds: impl AsyncFn() -> bool) {
    let waited = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("it never came to be");
}
