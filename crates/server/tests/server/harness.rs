//! The replica under test.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use servelab_engine::{
    EngineConfig, ModelRunner, RowOutput, RunnerError, Step, StepOutput, TokenLogprobs, Want,
};
use servelab_front::prompts::{Prompter, TextFiles};
use servelab_server::kv_events::zmq::KvZmqOptions;
use servelab_server::{
    LoadTimes, LoadedModel, ModelMemory, SamplingDefaults, ServeError, Server, ServerOptions,
};
use servelab_telemetry::{BuildInfo, Metrics, MetricsConfig, Secret};
use servelab_wire::DeviceState;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Ids below are bytes.
pub const EOS: u32 = 256;
pub const IM_START: u32 = 257;
pub const VOCAB: u32 = 258;
pub const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}\n{% endfor %}\
                            {% if add_generation_prompt %}<|im_start|>assistant:{% endif %}";

/// Every byte is a token, and there are two special ones.
pub fn text_files() -> TextFiles {
    let itself = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100;
    let mut vocab: HashMap<String, u32> = HashMap::new();
    for byte in 0..256u32 {
        let shown = if itself(&byte) {
            byte
        } else {
            others += 1;
            others - 1
        };
        vocab.insert(char::from_u32(shown).unwrap().to_string(), byte);
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(EOS, "<|eos|>"), special(IM_START, "<|im_start|>")],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": []},
    });
    TextFiles { tokenizer: file.to_string().into(), ..TextFiles::default() }
}

/// What the test tells the runner, and what the runner tells the test.
#[derive(Clone, Default)]
pub struct Control(Arc<(Mutex<Shared>, Condvar)>);

#[derive(Default)]
struct Shared {
    /// Steps that may run; `None`: all.
    allowed: Option<u64>,
    steps: u64,
    next_error: Option<RunnerError>,
    panic: bool,
}

impl Control {
    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.0.0.lock().unwrap().steps
    }

    /// The next step waits.
    pub fn pause(&self) {
        self.0.0.lock().unwrap().allowed = Some(0);
    }

    pub fn resume(&self) {
        self.0.0.lock().unwrap().allowed = None;
        self.0.1.notify_all();
    }

    /// The next step fails.
    pub fn fail(&self, error: RunnerError) {
        self.0.0.lock().unwrap().next_error = Some(error);
    }

    /// The next step panics.
    pub fn panic(&self) {
        self.0.0.lock().unwrap().panic = true;
    }

    fn begin_step(&self) -> Result<(), RunnerError> {
        let mut shared = self.0.0.lock().unwrap();
        while shared.allowed == Some(0) {
            shared = self.0.1.wait(shared).unwrap();
        }
        shared.allowed = shared.allowed.map(|allowed| allowed - 1);
        shared.steps += 1;
        if std::mem::take(&mut shared.panic) {
            drop(shared);
            panic!("the test asked for it");
        }
        shared.next_error.take().map_or(Ok(()), Err)
    }
}

/// Says a fixed text, over and over, byte by byte. Where the temperature is not 0, the seed and the choice
/// decide where in the text it begins.
pub struct Scripted {
    script: Vec<u32>,
    control: Control,
    step_time: Duration,
}

impl Scripted {
    fn logprobs(&self, token: u32, top: u32) -> TokenLogprobs {
        let top = (0..top).map(|at| ((token + at) % VOCAB, -0.5 * (at + 1) as f32)).collect();
        TokenLogprobs { logprob: -0.5, rank: 1, top }
    }

    fn row(&self, want: &Want) -> RowOutput {
        match want {
            Want::Score { target, top } => {
                RowOutput { token: *target, logprobs: Some(self.logprobs(*target, *top)) }
            }
            Want::Sample(draw) => {
                let random = draw.sampling.temperature > 0.0;
                let start =
                    if random { draw.sampling.seed.wrapping_add(3 * u64::from(draw.choice)) } else { 0 };
                let at = (start % 1000) as usize + draw.output_index as usize;
                let mut token = self.script[at % self.script.len()];
                if draw.banned.contains(&token) {
                    token = u32::from(b'-');
                }
                RowOutput { token, logprobs: draw.sampling.logprobs.map(|top| self.logprobs(token, top)) }
            }
        }
    }
}

impl ModelRunner for Scripted {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        std::thread::sleep(self.step_time);
        self.control.begin_step()?;
        Ok(StepOutput { rows: step.rows.iter().map(|row| self.row(&row.want)).collect() })
    }
}

/// What a test may change before the replica starts.
pub struct Setup {
    pub engine: EngineConfig,
    pub max_waiting: u32,
    pub max_connections: usize,
    pub max_body_bytes: usize,
    pub api_keys: Vec<Secret>,
    pub drain_timeout: Duration,
    pub stall_timeout: Duration,
    pub defaults: SamplingDefaults,
    pub device: DeviceState,
    pub template: Option<&'static str>,
    pub kv_zmq: Option<KvZmqOptions>,
    pub script: Vec<u32>,
    pub step_time: Duration,
    /// The loader waits for it.
    pub load_after: Option<std::sync::mpsc::Receiver<()>>,
    pub load_error: Option<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            engine: EngineConfig {
                block_size: 16,
                num_blocks: 2048,
                max_model_len: 4096,
                max_batched_tokens: 512,
                max_running: 8,
                max_waiting: 1,
                prefix_cache: true,
            },
            max_waiting: 64,
            max_connections: 256,
            max_body_bytes: 1 << 20,
            api_keys: Vec::new(),
            drain_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(600),
            defaults: SamplingDefaults { temperature: Some(0.0), ..SamplingDefaults::default() },
            device: DeviceState { kind: "cpu".into(), name: "cpu".into(), ..DeviceState::default() },
            template: Some(TEMPLATE),
            kv_zmq: None,
            script: text_tokens("Hello wörld. "),
            step_time: Duration::ZERO,
            load_after: None,
            load_error: None,
        }
    }
}

pub fn text_tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// A replica that serves.
pub struct Replica {
    pub address: SocketAddr,
    pub control: Control,
    pub metrics: Arc<Metrics>,
    client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
}

/// An answer that has arrived.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap_or_default() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The error of an answer that must be one, in OpenAI's shape.
    pub fn error(&self) -> Value {
        let body = self.json();
        let error = &body["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        assert!(error["type"].is_string(), "{body}");
        for member in ["param", "code"] {
            assert!(error.get(member).is_some_and(|value| value.is_null() || value.is_string()), "{body}");
        }
        error.clone()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

impl Replica {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// A replica that is ready.
    pub async fn with(change: impl FnOnce(&mut Setup)) -> Self {
        let replica = Self::loading(change).await;
        replica.until("/ready", |answer| answer.status == 200).await;
        replica
    }

    /// A replica that may still load.
    pub async fn loading(change: impl FnOnce(&mut Setup)) -> Self {
        let mut setup = Setup::default();
        change(&mut setup);
        let control = Control::default();
        let metrics = metrics();
        let options = options(setup, control.clone(), metrics.clone());
        let server = Server::bind(options).await.unwrap();
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { address, control, metrics, client, stop: Some(stop), task }
    }

    /// Why a replica with these settings does not start.
    pub async fn refused(change: impl FnOnce(&mut Setup)) -> String {
        let mut setup = Setup::default();
        change(&mut setup);
        Server::bind(options(setup, Control::default(), metrics())).await.err().unwrap().to_string()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method.parse().unwrap(), self.url(path))
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request("GET", path).send().await.unwrap()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::of(self.request("POST", path).json(body).send().await.unwrap()).await
    }

    /// Posts without waiting for the answer.
    pub fn posting(&self, path: &str, body: &Value) -> JoinHandle<Answer> {
        let request = self.request("POST", path).json(body);
        tokio::spawn(async move { Answer::of(request.send().await.unwrap()).await })
    }

    /// Gets `path` again and again until the answer is as wanted.
    pub async fn until(&self, path: &str, wanted: impl Fn(&Answer) -> bool) -> Answer {
        for _ in 0..3000 {
            let answer = self.get(path).await;
            if wanted(&answer) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{path} never became as wanted: {:?}", self.get(path).await);
    }

    /// Waits until nothing runs, waits or is held.
    pub async fn until_idle(&self) {
        self.until("/state", |answer| {
            let engine = &answer.json()["engine"];
            engine["running"] == json!([]) && engine["waiting"] == json!([]) && engine["blocks"]["held"] == 0
        })
        .await;
    }

    pub fn signal(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// What `run` returned.
    pub async fn ended(self) -> Result<(), ServeError> {
        self.task.await.unwrap()
    }
}

fn metrics() -> Arc<Metrics> {
    let config = MetricsConfig {
        prefix: "servelab_",
        model_name: "bytes",
        max_model_len: 4096,
        routes: servelab_server::ROUTES,
        build: BuildInfo { version: "0", commit: None },
    };
    Arc::new(Metrics::new(&config).unwrap())
}

fn options(setup: Setup, control: Control, metrics: Arc<Metrics>) -> ServerOptions {
    let (max_waiting, max_body_bytes) = (setup.max_waiting, setup.max_body_bytes);
    let max_connections = setup.max_connections;
    let (drain_timeout, stall_timeout) = (setup.drain_timeout, setup.stall_timeout);
    let api_keys = setup.api_keys.clone();
    ServerOptions {
        kv_zmq: setup.kv_zmq,
        host: "127.0.0.1".into(),
        port: 0,
        served_model_names: vec!["bytes".into(), "org/bytes".into()],
        max_waiting,
        max_connections,
        max_body_bytes,
        api_keys,
        drain_timeout,
        stall_timeout,
        seed: 0,
        metrics,
        traces: servelab_telemetry::Traces::off(),
        load: Box::new(move || {
            if let Some(signal) = &setup.load_after {
                let _ = signal.recv();
            }
            if let Some(error) = setup.load_error {
                return Err(servelab_server::LoadError(error.into()));
            }
            let text_files =
                TextFiles { chat_template: setup.template.map(|source| source.into()), ..text_files() };
            Ok(LoadedModel {
                runner: Box::new(Scripted { script: setup.script, control, step_time: setup.step_time }),
                engine: setup.engine,
                prompter: Prompter::new(&text_files).unwrap(),
                text_files,
                eos_token_ids: vec![EOS],
                vocab_size: VOCAB,
                root: "models/bytes".into(),
                sampling_defaults: setup.defaults,
                device: setup.device,
                kv_dtype: "f32".into(),
                load_times: LoadTimes::default(),
                memory: ModelMemory::default(),
            })
        }),
    }
}

/// The body of a chat of one message, with more fields over it.
pub fn chat(more: Value) -> Value {
    over(json!({"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}), more)
}

/// The body of a completion, with more fields over it.
pub fn completion(more: Value) -> Value {
    over(json!({"model": "bytes", "prompt": "Hi", "max_tokens": 5}), more)
}

fn over(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// The data of the events of a stream.
pub fn events(text: &str) -> Vec<String> {
    servelab_wire::sse::SseReader::default().push(text.as_bytes())
}

/// The content of a chat stream, put together.
pub fn streamed_text(text: &str) -> String {
    let chunks = events(text).into_iter().filter(|data| data != "[DONE]");
    chunks
        .map(|data| serde_json::from_str::<Value>(&data).unwrap())
        .filter_map(|chunk| {
            let choice = &chunk["choices"][0];
            choice["delta"]["content"].as_str().or(choice["text"].as_str()).map(str::to_owned)
        })
        .collect()
}
