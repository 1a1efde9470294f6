//! A server made of threads and blocking writes: one thread a connection, so that what it sends and when is up to
//! a short script.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use servelab_bench::client::{Client, Target, Timeouts};
use servelab_bench::live::Live;
use servelab_bench::phases::{Extent, PhasePlan};
use servelab_bench::prompt::{Content, Job, Pool, Writer};
use servelab_bench::result::Endpoint;
use servelab_bench::run::{LoadShape, RunLog, RunPlan, run};
use tokio_util::sync::CancellationToken;

pub const HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
/// The end of a body in chunks.
pub const LAST: &str = "0\r\n\r\n";

/// Bytes as one chunk of a body.
pub fn chunk(bytes: &str) -> String {
    format!("{:x}\r\n{bytes}\r\n", bytes.len())
}

/// An event that carries `data`, as one chunk.
pub fn event(data: &str) -> String {
    chunk(&format!("data: {data}\n\n"))
}

pub fn token() -> String {
    event(
        r#"{"id":"x","object":"text_completion","choices":[{"index":0,"text":" hi","finish_reason":null}]}"#,
    )
}

/// The token that ends the answer, and the usage after it.
pub fn last_token_and_usage(tokens: u32) -> String {
    let finish = event(r#"{"choices":[{"index":0,"text":" hi","finish_reason":"length"}]}"#);
    let usage = format!(
        r#"{{"choices":[],"usage":{{"prompt_tokens":3,"completion_tokens":{tokens},"total_tokens":9}}}}"#
    );
    [finish, event(&usage), event("[DONE]"), LAST.to_owned()].concat()
}

/// A connection as a script sees it: a request has been read, its answer is the script's.
pub struct Conversation {
    pub stream: TcpStream,
    /// `max_tokens` of the request.
    pub max_tokens: u32,
    /// How many requests came before on this connection.
    pub earlier: u32,
}

impl Conversation {
    pub fn send(&mut self, text: &str) {
        // The client may have left.
        let _ = self.stream.write_all(text.as_bytes());
    }
}

/// A server for as long as the process lives; its threads end when their clients hang up.
pub fn serve(script: impl Fn(&mut Conversation) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let script = Arc::new(script);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(stream), script) = (stream, script.clone()) else { return };
            std::thread::spawn(move || converse(stream, &*script));
        }
    });
    address
}

fn converse(stream: TcpStream, script: &(dyn Fn(&mut Conversation) + Send + Sync)) {
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut conversation = Conversation { stream, max_tokens: 0, earlier: 0 };
    while let Some(body) = read_request(&mut reader) {
        conversation.max_tokens = body["max_tokens"].as_u64().unwrap_or(0) as u32;
        script(&mut conversation);
        conversation.earlier += 1;
    }
}

/// `None` once the client has hung up.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<serde_json::Value> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    serde_json::from_slice(&body).ok()
}

/// Short enough for a test, and long enough for a busy machine.
pub fn timeouts() -> Timeouts {
    Timeouts {
        connect: Duration::from_secs(10),
        first_byte: Duration::from_secs(30),
        idle: Duration::from_secs(30),
        total: Duration::from_secs(60),
    }
}

pub fn plan(shape: LoadShape, requests: u64) -> RunPlan {
    let measured = Extent::Requests(requests);
    let phases = PhasePlan { warm_up: Extent::Requests(0), measured, cool_down: false };
    RunPlan { shape, phases, max_in_flight: 1000, seed: 1 }
}

/// Request number `i` asks for `first + i` tokens, by which a server can tell them apart.
pub async fn measure(
    address: SocketAddr,
    timeouts: Timeouts,
    plan: &RunPlan,
    first: u32,
    stop: CancellationToken,
) -> RunLog {
    let target = Target::parse(&format!("http://{address}")).unwrap();
    let client = Client::new(target, None, timeouts).await.unwrap();
    measure_with(&client, plan, first, stop).await
}

/// The same with a client of one's own.
pub async fn measure_with(client: &Client, plan: &RunPlan, first: u32, stop: CancellationToken) -> RunLog {
    let words: Arc<[String]> = ["hello".to_owned()].into();
    let writer = Writer {
        endpoint: Endpoint::Completions,
        model: "truth".into(),
        pool: Pool::Words { words, overhead_tokens: 0, tokens_per_word: 1.0 },
        key: 0,
        salt_text: None,
        ignore_eos: true,
        temperature: None,
        extra_body: serde_json::Map::new(),
    };
    let jobs = (0..).map(move |i| Job::single(Content::Given("hello".into()), first + i));
    run(client, Arc::new(writer), Box::new(jobs), plan, Arc::new(Live::default()), stop).await
}
