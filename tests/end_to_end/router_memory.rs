//! Whatever the router keeps of a request ends with it, or has a bound.

use std::io::BufReader;
use std::net::{TcpListener, TcpStream};

use futures::future::join_all;
use serde_json::json;

use crate::bench_failures::{plain, read_request, say};
use crate::util::{Server, events, prose, servelab};

const USAGE: &str = r#"{"prompt_tokens":40,"completion_tokens":2,"total_tokens":42}"#;

/// A replica that is well and answers at once.
fn backend() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || converse(stream));
        }
    });
    base
}

fn converse(mut stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some((path, body)) = read_request(&mut reader) {
        let answer = match path.as_str() {
            "/health" => plain("200 OK", "{}"),
            "/v1/completions" if body["stream"] == true => streamed(),
            "/v1/completions" => {
                plain("200 OK", &format!(r#"{{"choices":[{{"text":"a b"}}],"usage":{USAGE}}}"#))
            }
            _ => plain("404 Not Found", "{}"),
        };
        say(&mut stream, &answer);
    }
}

fn streamed() -> String {
    let chunk = |data: &str| {
        let event = format!("data: {data}\n\n");
        format!("{:x}\r\n{event}\r\n", event.len())
    };
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let usage = format!(r#"{{"choices":[],"usage":{USAGE}}}"#);
    [head, &chunk(r#"{"choices":[{"text":"a"}]}"#), &chunk(&usage), &chunk("[DONE]"), "0\r\n\r\n"].concat()
}

fn resident_bytes(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}

/// Whole answers, streams, clients that leave, prompts that share nothing. The full measure, 50,000 requests, is
/// `just soak`.
#[tokio::test]
async fn the_routers_memory_stays_flat() {
    let requests: usize =
        std::env::var("SERVELAB_ROUTER_SOAK_REQUESTS").map_or(4000, |text| text.parse().unwrap());
    let mut command =
        servelab(&["route", "--port", "0", "--health-interval", "100ms", "--log-level", "warn"]);
    // The index is full before the first measure.
    command.args(["--index-memory", "1MiB"]);
    for _ in 0..3 {
        command.args(["--replica", &backend()]);
    }
    let router = Server::spawn(command);
    router
        .until("three replicas are ready", async || {
            router.get("/health").await.1.contains("\"replicas_ready\":3")
        })
        .await;
    let ask = async |number: usize| {
        let body = json!({"prompt": format!("{number} {}", prose(number, 200)), "max_tokens": 2, "user": number.to_string()});
        match number % 8 {
            0 => drop(router.open_stream("/v1/completions", &body).await),
            1..4 => assert_eq!(events(router.open_stream("/v1/completions", &body).await).await.len(), 3),
            _ => assert_eq!(router.ok("/v1/completions", &body).await["usage"]["prompt_tokens"], 40),
        }
    };
    let batch = async |from: usize, to: usize| {
        for chunk in (from..to).collect::<Vec<_>>().chunks(16) {
            join_all(chunk.iter().map(|number| ask(*number))).await;
        }
        router
            .until("nothing is inside", async || {
                router.metric("servelab_router_requests_in_flight").await == Some(0.0)
            })
            .await;
        resident_bytes(router.id())
    };
    let before = batch(0, requests / 2).await;
    let after = batch(requests / 2, requests).await;
    let (grown, mib) = (after - before, f64::from(1 << 20));
    println!(
        "resident: {:.1} MiB, grown by {:.2} MiB over the last {}",
        after / mib,
        grown / mib,
        requests / 2
    );
    // Two kilobytes that each request leaves behind are too many.
    assert!(grown < 4.0 * mib, "resident memory grew by {:.2} MiB", grown / mib);
}
