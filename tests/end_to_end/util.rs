//! Starts the binary on a free port, waits until it is ready, kills it when it goes out of scope.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// The binary under test, built by cargo for this test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_servelab");

/// How long anything may take before a test gives up. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A running `servelab serve`.
pub struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT`
    pub base: String,
    pub client: reqwest::Client,
    errors: NamedTempFile,
}

/// `servelab` with nothing of the caller's environment that it would read.
pub fn servelab(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments).stdin(Stdio::null());
    for variable in ["SERVELAB_API_KEYS", "HF_TOKEN", "HF_ENDPOINT"] {
        command.env_remove(variable);
    }
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("OTEL_")) {
        command.env_remove(variable);
    }
    command
}

impl Server {
    /// Starts it with these flags besides `--port 0` and waits until it is ready.
    pub async fn start(flags: &[&str]) -> Self {
        let mut command = servelab(&["serve", "--port", "0"]);
        command.args(flags);
        let server = Self::spawn(command);
        server.wait_until_ready().await;
        server
    }

    /// Starts the command, reads the address from its first line, and does not wait further.
    pub fn spawn(mut command: Command) -> Self {
        let errors = NamedTempFile::new().unwrap();
        command.stdout(Stdio::piped()).stderr(errors.reopen().unwrap());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let (send, receive) = mpsc::channel();
        // Reads to the end, so that the server never meets a full or closed pipe.
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                if let Some(base) = line.strip_prefix("listening on ") {
                    let _ = send.send(base.to_owned());
                }
            }
        });
        match receive.recv_timeout(PATIENCE) {
            Ok(base) => Self { child, base, client: client(), errors },
            Err(_) => {
                let _ = child.kill();
                panic!("no address: {}", std::fs::read_to_string(errors.path()).unwrap());
            }
        }
    }

    pub async fn wait_until_ready(&self) {
        self.until("ready", async || self.get("/ready").await.0 == 200).await;
    }

    /// Waits until the condition holds.
    pub async fn until(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let start = Instant::now();
        while !holds().await {
            assert!(start.elapsed() < PATIENCE, "never {what}; the server said:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What the server wrote to standard error so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.errors.path()).unwrap()
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        let answer = self.client.get(self.url(path)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// Status and JSON of a POST.
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.client.post(self.url(path)).json(body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    /// The body of a POST that succeeds.
    pub async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, 200, "{answer}\n{}", self.log());
        answer
    }

    /// A greedy completion's text.
    pub async fn complete(&self, prompt: &str, max_tokens: u32) -> String {
        let answer = self.ok("/v1/completions", &greedy(prompt, max_tokens)).await;
        text(&answer).to_owned()
    }

    /// The data of every event of a streamed answer.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let answer = self.open_stream(path, body).await;
        let content_type = answer.headers()["content-type"].to_str().unwrap();
        assert!(content_type.starts_with("text/event-stream"), "{content_type}");
        events(answer).await
    }

    /// A streamed answer that has begun and of which only the head has been read.
    pub async fn open_stream(&self, path: &str, body: &Value) -> reqwest::Response {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let answer = self.client.post(self.url(path)).json(&body).send().await.unwrap();
        if answer.status() == 200 {
            return answer;
        }
        panic!("{}: {}", answer.status(), answer.text().await.unwrap());
    }

    /// The engine's part of `/state`.
    pub async fn engine_state(&self) -> Value {
        let (status, text) = self.get("/state").await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()["engine"].take()
    }

    /// Waits until no sequence runs or waits and no block is held.
    pub async fn until_idle(&self) {
        let idle = async || {
            let state = self.engine_state().await;
            let empty = |list: &str| state[list].as_array().unwrap().is_empty();
            empty("running") && empty("waiting") && state["blocks"]["held"] == 0
        };
        self.until("idle", idle).await;
    }

    /// The value of a series of `/metrics`, `None` if it is not exported.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let (status, text) = self.get("/metrics").await;
        assert_eq!(status, 200);
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits until the process has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the server does not end; it said:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the binary to its end.
pub fn run(mut command: Command) -> (i32, String, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Read meanwhile: a program waits for room once a pipe is full.
    let (out, err) = (text_of(child.stdout.take().unwrap()), text_of(child.stderr.take().unwrap()));
    let start = Instant::now();
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code().unwrap();
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("{command:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    (code, out.join().unwrap(), err.join().unwrap())
}

fn text_of(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    })
}

/// Whether `servelab bench` did its work. One that calls its own figures spoilt, on a machine that is busy with other
/// tests, has sent its load all the same.
pub fn has_sent_its_load(code: i32, errors: &str) -> bool {
    code == 0 || (code == 1 && errors.contains("the figures do not stand"))
}

pub fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap()
}

/// The data of every event, in order.
pub async fn events(answer: reqwest::Response) -> Vec<String> {
    let mut bytes = Vec::new();
    let mut stream = answer.bytes_stream();
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk.unwrap());
    }
    let text = String::from_utf8(bytes).unwrap();
    let events = text.split("\n\n").filter(|event| !event.is_empty());
    events.filter_map(|event| event.strip_prefix("data: ")).map(str::to_owned).collect()
}

/// A greedy completion that does not end before `max_tokens`.
pub fn greedy(prompt: &str, max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

/// A greedy chat request.
pub fn chat(question: &str, max_tokens: u32) -> Value {
    json!({
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    })
}

/// The text of a completion's first choice.
pub fn text(completion: &Value) -> &str {
    completion["choices"][0]["text"].as_str().unwrap()
}

/// A text of about `words` tokens, different for each seed.
pub fn prose(seed: usize, words: usize) -> String {
    const WORDS: [&str; 16] = [
        "block", "cache", "token", "prefix", "batch", "queue", "step", "decode", "prefill", "request",
        "memory", "router", "replica", "kernel", "latency", "prompt",
    ];
    let word = |at: usize| WORDS[(seed * 7 + at * (seed % 5 + 3) + at / 9) % WORDS.len()];
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}
