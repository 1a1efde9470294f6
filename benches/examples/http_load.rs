//! Closed-loop load on an OpenAI-compatible server: a fixed number of clients, each sending the next
//! request when the last one has ended. Prompts are random token ids, so that prompt lengths are exact
//! and no two requests share a prefix.
//!
//! `http_load URL MODEL CLIENTS REQUESTS INPUT_TOKENS OUTPUT_TOKENS VOCABULARY SEED`
//!
//! Output tokens are counted from the server's `usage`, TTFT ends at the first event with text, and
//! the inter-token latency of a request is `(end - first) / (tokens - 1)`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Load {
    url: String,
    model: String,
    clients: u64,
    requests: u64,
    input_tokens: u64,
    output_tokens: u64,
    vocabulary: u64,
    seed: u64,
}

struct Timing {
    first: Duration,
    end: Duration,
    tokens: u64,
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the result is this program's output")]
async fn main() -> Result<(), Failure> {
    let load = Arc::new(parse_arguments()?);
    let next = Arc::new(AtomicU64::new(0));
    // A server may close an idle connection just when it is taken again, so each request opens its own.
    let http = reqwest::Client::builder().pool_max_idle_per_host(0).build()?;
    let started = Instant::now();
    let clients: Vec<_> =
        (0..load.clients).map(|_| tokio::spawn(client(load.clone(), next.clone(), http.clone()))).collect();
    let mut timings = Vec::new();
    for client in clients {
        timings.extend(client.await??);
    }
    println!("{}", report(&load, &timings, started.elapsed()));
    Ok(())
}

fn parse_arguments() -> Result<Load, Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, model, numbers @ ..] = arguments.as_slice() else { return Err(usage()) };
    let numbers = numbers.iter().map(|n| n.parse()).collect::<Result<Vec<u64>, _>>()?;
    let [clients, requests, input_tokens, output_tokens, vocabulary, seed] = numbers[..] else {
        return Err(usage());
    };
    let (url, model) = (url.clone(), model.clone());
    Ok(Load { url, model, clients, requests, input_tokens, output_tokens, vocabulary, seed })
}

fn usage() -> Failure {
    "usage: http_load URL MODEL CLIENTS REQUESTS INPUT_TOKENS OUTPUT_TOKENS VOCABULARY SEED".into()
}

async fn client(
    load: Arc<Load>,
    next: Arc<AtomicU64>,
    http: reqwest::Client,
) -> Result<Vec<Timing>, Failure> {
    let mut timings = Vec::new();
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= load.requests {
            return Ok(timings);
        }
        timings.push(one_request(&load, index, &http).await?);
    }
}

async fn one_request(load: &Load, index: u64, http: &reqwest::Client) -> Result<Timing, Failure> {
    let body = json!({
        "model": load.model, "prompt": prompt(load, index), "max_tokens": load.output_tokens,
        "ignore_eos": true, "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
    });
    let sent = Instant::now();
    let answer = http.post(format!("{}/v1/completions", load.url)).json(&body).send().await?;
    if !answer.status().is_success() {
        return Err(format!("{}: {}", answer.status(), answer.text().await?).into());
    }
    let (mut bytes, mut buffer) = (answer.bytes_stream(), Vec::new());
    let (mut first, mut tokens) = (None, None);
    while let Some(chunk) = bytes.next().await {
        buffer.extend_from_slice(&chunk?);
        while let Some(end) = buffer.windows(2).position(|w| w == b"\n\n") {
            let frame: Vec<u8> = buffer.drain(..end + 2).collect();
            let Some(event) = parse_event(&frame)? else { continue };
            if first.is_none() && has_text(&event) {
                first = Some(sent.elapsed());
            }
            tokens = event["usage"]["completion_tokens"].as_u64().or(tokens);
        }
    }
    let first = first.ok_or("an answer without text")?;
    Ok(Timing { first, end: sent.elapsed(), tokens: tokens.ok_or("an answer without usage")? })
}

fn parse_event(frame: &[u8]) -> Result<Option<Value>, Failure> {
    let text = std::str::from_utf8(frame)?.trim();
    match text.strip_prefix("data: ") {
        None | Some("[DONE]") => Ok(None),
        Some(data) => {
            let event: Value = serde_json::from_str(data)?;
            if event.get("error").is_some_and(|e| !e.is_null()) {
                return Err(format!("the server failed: {}", event["error"]).into());
            }
            Ok(Some(event))
        }
    }
}

fn has_text(event: &Value) -> bool {
    event["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty())
}

/// Token ids drawn by splitmix64 (Steele et al. 2014), away from the low ids where special tokens live.
fn prompt(load: &Load, index: u64) -> Vec<u64> {
    let low = 300.min(load.vocabulary / 2);
    let mut state = load.seed.wrapping_mul(0x1000_0000_01b3).wrapping_add(index << 32);
    let mut draw = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..load.input_tokens).map(|_| low + draw() % (load.vocabulary - low)).collect()
}

fn report(load: &Load, timings: &[Timing], wall: Duration) -> Value {
    let output: u64 = timings.iter().map(|t| t.tokens).sum();
    let mut first: Vec<f64> = timings.iter().map(|t| t.first.as_secs_f64() * 1e3).collect();
    first.sort_by(f64::total_cmp);
    let itl: Vec<f64> = timings
        .iter()
        .filter(|t| t.tokens > 1)
        .map(|t| (t.end - t.first).as_secs_f64() * 1e3 / (t.tokens - 1) as f64)
        .collect();
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
    let percentile = |p: usize| first[(first.len() - 1) * p / 100];
    json!({
        "model": load.model, "clients": load.clients, "requests": timings.len(),
        "input_tokens": load.input_tokens, "output_tokens_total": output,
        "wall_seconds": round(wall.as_secs_f64()),
        "output_tokens_per_second": round(output as f64 / wall.as_secs_f64()),
        "ttft_ms": {"mean": round(mean(&first)), "p50": round(percentile(50)), "p99": round(percentile(99))},
        "itl_ms_mean": round(mean(&itl)),
    })
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
