//! How many streamed chunks a second the client follows on one core.
//!
//!     cargo run --release -p servelab-bench --example chunk_rate -- [STREAMS] [SECONDS] [RATE...]
//!
//! A server on one thread writes a token to each of STREAMS streams in turn, so many a second in all, and notes how
//! late it was itself. The client runs on one other thread. For each rate a line tells what was sent and received, how
//! late the server wrote, and how late the client read: from the arrival of a chunk in the kernel to its being read.
//! The client follows a rate if the p99 of that is below 5 ms and nothing was lost. The tests of the client say how
//! right its times are; this says how far they carry.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use servelab_bench::client::{Client, Target, Timeouts};
use servelab_bench::live::Live;
use servelab_bench::phases::{Extent, PhasePlan};
use servelab_bench::prompt::{Content, Job, Pool, Writer};
use servelab_bench::result::{Endpoint, RequestRecord};
use servelab_bench::run::{LoadShape, RunPlan, run};
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
/// As long as a chunk of servelab or vLLM.
const TOKEN: &str = r#"{"id":"cmpl-6f1c1e4be3b94c63a3f0cf2b66c0d6c5","object":"text_completion","created":1732492800,"model":"demo","choices":[{"index":0,"text":" batching","logprobs":null,"finish_reason":null,"stop_reason":null}],"system_fingerprint":"servelab-0.1.0"}"#;

#[expect(clippy::print_stdout, reason = "the table is this program's output")]
fn main() -> Result<(), Failure> {
    let arguments: Vec<u64> = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let streams = arguments.first().copied().unwrap_or(256).max(1);
    let seconds = arguments.get(1).copied().unwrap_or(5).max(1);
    let rates = match arguments.get(2..) {
        Some(rates) if !rates.is_empty() => rates.to_vec(),
        _ => vec![10_000, 25_000, 50_000, 75_000, 100_000, 125_000, 150_000],
    };
    println!("{streams} streams, {seconds} s each, chunks of {} bytes", frame(TOKEN).len());
    println!(
        "{:>10}{:>12}{:>14}{:>14}{:>12}{:>12}{:>12}{:>10}",
        "wanted/s",
        "received/s",
        "server p99 ms",
        "read lag p50",
        "p99 ms",
        "p99.9 ms",
        "client CPU",
        "follows"
    );
    for rate in rates {
        println!("{}", one_rate(streams, seconds, rate)?);
    }
    Ok(())
}

fn one_rate(streams: u64, seconds: u64, rate: u64) -> Result<String, Failure> {
    let per_stream = (rate * seconds / streams).max(2);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let server = std::thread::spawn(move || serve(&listener, streams, per_stream, rate));
    let client = std::thread::spawn(move || measure(address, streams, per_stream));
    let server_lag = server.join().map_err(|_| "the server panicked")??;
    let Measured { records, reads, cpu_seconds } = client.join().map_err(|_| "the client panicked")??;
    let received: u64 = records.iter().map(|record| u64::from(record.chunks)).sum();
    let first = records.iter().filter_map(|record| record.first_token_seconds).fold(f64::INFINITY, f64::min);
    let last = records.iter().filter_map(|record| record.last_token_seconds).fold(0.0, f64::max);
    let ms = |percent| 1000.0 * reads.lag.percentile(percent).as_secs_f64();
    let whole = records.iter().all(RequestRecord::is_completed) && received == streams * per_stream;
    let follows = whole && ms(99.0) < 5.0;
    Ok(format!(
        "{rate:>10}{:>12.0}{:>14.3}{:>14.3}{:>12.3}{:>12.3}{:>11.0}%{:>10}",
        received as f64 / (last - first),
        1000.0 * server_lag.as_secs_f64(),
        ms(50.0),
        ms(99.0),
        ms(99.9),
        100.0 * cpu_seconds / (last - first),
        if follows { "yes" } else { "no" }
    ))
}

struct Measured {
    records: Vec<RequestRecord>,
    reads: servelab_bench::client::ReadStats,
    cpu_seconds: f64,
}

/// The client, on this thread alone.
fn measure(address: SocketAddr, streams: u64, tokens: u64) -> Result<Measured, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let before = thread_cpu_seconds();
    let log = runtime.block_on(async {
        let target = Target::parse(&format!("http://{address}"))?;
        let client = Client::new(target, None, Timeouts::default()).await?;
        let words: Arc<[String]> = ["hello".to_owned()].into();
        let writer = Writer {
            endpoint: Endpoint::Completions,
            model: "m".into(),
            pool: Pool::Words { words, overhead_tokens: 0, tokens_per_word: 1.0 },
            key: 0,
            salt_text: None,
            ignore_eos: true,
            temperature: None,
            extra_body: serde_json::Map::new(),
        };
        let jobs = std::iter::repeat_with(move || Job::single(Content::Given("x".into()), tokens as u32));
        let measured = Extent::Requests(streams);
        let phases = PhasePlan { warm_up: Extent::Requests(0), measured, cool_down: false };
        let shape = LoadShape::Closed { concurrency: streams as u32, think_time: Duration::ZERO };
        let plan = RunPlan { shape, phases, max_in_flight: u32::MAX, seed: 0 };
        let live = Arc::new(Live::default());
        Ok::<_, Failure>(
            run(&client, Arc::new(writer), Box::new(jobs), &plan, live, CancellationToken::new()).await,
        )
    })?;
    let cpu_seconds = thread_cpu_seconds() - before;
    let reads = log.reads.ok_or("no reads")?;
    Ok(Measured { records: log.records, reads, cpu_seconds })
}

/// Processor time of this thread; 0 where it is not told.
fn thread_cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|nanos| nanos.parse::<f64>().ok())
        .map_or(0.0, |nanos| nanos / 1e9)
}

fn frame(data: &str) -> String {
    let event = format!("data: {data}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len())
}

/// Takes all requests, then writes to them in turn. Returns the p99 of its own lateness.
fn serve(listener: &TcpListener, streams: u64, per_stream: u64, rate: u64) -> Result<Duration, Failure> {
    let mut clients = accept(listener, streams)?;
    let last = [
        frame(&TOKEN.replace("\"finish_reason\":null", "\"finish_reason\":\"length\"")),
        frame(&format!(r#"{{"choices":[],"usage":{{"prompt_tokens":1,"completion_tokens":{per_stream}}}}}"#)),
        frame("[DONE]"),
        "0\r\n\r\n".to_owned(),
    ]
    .concat();
    let token = frame(TOKEN);
    for client in &mut clients {
        client.write_all(HEAD.as_bytes())?;
    }
    let start = Instant::now();
    let mut lags = Vec::with_capacity((streams * per_stream) as usize);
    for at in 0..streams * per_stream {
        let due = start + Duration::from_secs_f64(at as f64 / rate as f64);
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            // A sleep of the system is too coarse for the last stretch.
            if left > Duration::from_micros(200) {
                std::thread::sleep(left - Duration::from_micros(150))
            } else {
                std::hint::spin_loop()
            }
        }
        let text = if at < streams * (per_stream - 1) { &token } else { &last };
        clients[(at % streams) as usize].write_all(text.as_bytes())?;
        lags.push(due.elapsed());
    }
    lags.sort_unstable();
    Ok(lags[(lags.len() - 1) * 99 / 100])
}

fn accept(listener: &TcpListener, streams: u64) -> Result<Vec<TcpStream>, Failure> {
    let mut clients = Vec::new();
    for _ in 0..streams {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        read_request(&stream)?;
        clients.push(stream);
    }
    Ok(clients)
}

fn read_request(stream: &TcpStream) -> Result<(), Failure> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line == "\r\n" || line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    Ok(reader.read_exact(&mut body)?)
}
