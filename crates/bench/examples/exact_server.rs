//! A server with an exact schedule: the first token of an answer comes TTFT after its request, every other one ITL
//! after the one before. What a load generator says of it can be held against that.
//!
//!     cargo run --release -p servelab-bench --example exact_server -- [TTFT_MS] [ITL_MS]
//!
//! Speaks enough of the OpenAI API for common load generators (`/v1/models`, streamed and plain `/v1/completions`), on
//! a free port of 127.0.0.1 that it prints. One thread a connection; ends when it is killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const MODEL: &str = "exact";
const TOKEN: &str = " the";

#[derive(Clone, Copy)]
struct Schedule {
    ttft: Duration,
    itl: Duration,
}

#[expect(clippy::print_stdout, reason = "the address is this program's output")]
fn main() -> Result<(), Failure> {
    let times: Vec<f64> = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let ms = |at: usize, default: f64| Duration::try_from_secs_f64(times.get(at).unwrap_or(&default) / 1e3);
    let schedule = Schedule { ttft: ms(0, 50.0)?, itl: ms(1, 10.0)? };
    let listener = listen()?;
    println!("listening on http://{}", listener.local_addr()?);
    for stream in listener.incoming() {
        let stream = stream?;
        // A client that hangs up ends its thread, and nothing else.
        std::thread::spawn(move || converse(stream, schedule));
    }
    Ok(())
}

/// With room for a burst of connections: std's 128 would make an open loop's beginning wait a second for a second try.
fn listen() -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn converse(mut stream: TcpStream, schedule: Schedule) -> Result<(), Failure> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some((path, body)) = read_request(&mut reader)? {
        let received = Instant::now();
        match path.as_str() {
            "/v1/completions" if body["stream"] == true => answer(&mut stream, &body, received, schedule)?,
            "/v1/completions" => {
                std::thread::sleep(schedule.ttft);
                let choice = json!({"index": 0, "text": TOKEN, "finish_reason": "length"});
                plain(&mut stream, "200 OK", &json!({"choices": [choice], "usage": usage(&body, 1)}))?;
            }
            "/v1/models" => {
                let model = json!({"id": MODEL, "object": "model", "root": MODEL, "max_model_len": 1 << 20});
                plain(&mut stream, "200 OK", &json!({"object": "list", "data": [model]}))?;
            }
            "/ready" | "/health" => plain(&mut stream, "200 OK", &json!({}))?,
            _ => {
                plain(&mut stream, "404 Not Found", &json!({"error": {"message": "there is no such path"}}))?
            }
        }
    }
    Ok(())
}

/// Streams an answer. The last token carries the reason to finish, and the usage follows at once.
fn answer(
    stream: &mut TcpStream,
    body: &Value,
    received: Instant,
    schedule: Schedule,
) -> Result<(), Failure> {
    let tokens = ["max_tokens", "max_completion_tokens"].iter().find_map(|name| body[name].as_u64());
    let tokens = u32::try_from(tokens.unwrap_or(16))?.max(1);
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for at in 0..tokens {
        let is_last = at + 1 == tokens;
        let finish = if is_last { json!("length") } else { Value::Null };
        let choice = json!({"index": 0, "text": TOKEN, "logprobs": null, "finish_reason": finish});
        let mut text = if at == 0 { head.clone() } else { String::new() };
        text += &event(&chunk(&json!([choice]), &Value::Null));
        if is_last {
            text += &event(&chunk(&json!([]), &usage(body, tokens)));
            text += &event("[DONE]");
            text += "0\r\n\r\n";
        }
        let due = received + schedule.ttft + at * schedule.itl;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        stream.write_all(text.as_bytes())?;
    }
    Ok(())
}

fn chunk(choices: &Value, usage: &Value) -> String {
    json!({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": choices, "usage": usage})
        .to_string()
}

/// Words stand for tokens.
fn usage(body: &Value, completion_tokens: u32) -> Value {
    let prompt = match &body["prompt"] {
        Value::Array(ids) => ids.len(),
        other => other.as_str().unwrap_or_default().split_whitespace().count(),
    };
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens as usize,
    })
}

fn event(data: &str) -> String {
    let event = format!("data: {data}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len())
}

fn plain(stream: &mut TcpStream, status: &str, body: &Value) -> Result<(), Failure> {
    let body = body.to_string();
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
    Ok(stream.write_all((head + &body).as_bytes())?)
}

/// Path and body; `None` once the client has hung up.
fn read_request(reader: &mut BufReader<TcpStream>) -> Result<Option<(String, Value)>, Failure> {
    let (mut path, mut length) = (None, 0_u64);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        if path.is_none() {
            path = Some(line.split(' ').nth(1).ok_or("a request without a path")?.to_owned());
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body)?;
    Ok(path.map(|path| (path, serde_json::from_slice(&body).unwrap_or_default())))
}
