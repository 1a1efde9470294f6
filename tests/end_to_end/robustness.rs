use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use futures::future::join_all;

use crate::util::{Server, greedy, prose};

fn connect(server: &Server) -> TcpStream {
    let connection = TcpStream::connect(server.address()).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection
}

#[tokio::test]
async fn garbage_on_the_socket_hurts_nobody() {
    let server = Server::start(&[]).await;
    let expected = server.complete("Hello", 4).await;
    let long_line = [b"GET /".as_slice(), &[b'a'; 100_000], b" HTTP/1.1\r\n\r\n"].concat();
    let garbage: [&[u8]; 6] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00\xff\x00\xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
        &long_line,
    ];
    for bytes in garbage {
        let mut connection = connect(&server);
        // The server may close before everything is written.
        let _ = connection.write_all(bytes);
        let _ = connection.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer);
        let start = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
        assert!(answer.is_empty() || start.starts_with("HTTP/1.1 4"), "{start}");
    }
    assert_eq!(server.complete("Hello", 4).await, expected);
}

#[tokio::test]
async fn requests_that_never_end_block_nobody() {
    let server = Server::start(&[]).await;
    let halves: Vec<TcpStream> = (0..64)
        .map(|at| {
            let mut connection = connect(&server);
            let head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n";
            connection.write_all(head).unwrap();
            if at % 2 == 0 {
                connection.write_all(b"content-length: 1000\r\n\r\n{\"prompt\": \"").unwrap();
            }
            connection
        })
        .collect();
    assert!(!server.complete("Hello", 4).await.is_empty());
    assert_eq!(server.get("/ready").await.0, 200);
    drop(halves);
    server.until_idle().await;
}

#[tokio::test]
async fn clients_that_come_and_go_leave_nothing_behind() {
    let server = Server::start(&["--max-waiting", "64"]).await;
    let expected = server.complete("Hello", 6).await;
    for round in 0..6 {
        let streams = join_all((0..16).map(|at| {
            let body = greedy(&prose(at + round, 20), 200);
            let server = &server;
            async move { server.open_stream("/v1/completions", &body).await }
        }))
        .await;
        drop(streams);
    }
    server.until_idle().await;
    assert_eq!(server.complete("Hello", 6).await, expected);
}

/// The full measure, 2,000 requests, is `just soak`.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn resident_memory_stays_flat() {
    let requests: usize = std::env::var("SERVELAB_SOAK_REQUESTS").map_or(400, |text| text.parse().unwrap());
    // Few blocks, so that the pool is in use throughout before the first measure.
    let server = Server::start(&["--kv-blocks", "256"]).await;
    // Logs at info level must not grow with requests either.
    let batch = async |from: usize, count: usize| {
        for chunk in (from..from + count).collect::<Vec<_>>().chunks(8) {
            join_all(chunk.iter().map(|&at| {
                let server = &server;
                async move { server.complete(&prose(at, 8 + at % 60), 8).await }
            }))
            .await;
        }
    };
    batch(0, requests / 2).await;
    let resident =
        async || server.metric("process_resident_memory_bytes").await.unwrap() / f64::from(1 << 20);
    // What leaks does so in every part; what the allocator takes once it keeps.
    let (mut least, mut before) = (f64::INFINITY, resident().await);
    for part in 2..4 {
        batch(part * requests / 4, requests / 4).await;
        let after = resident().await;
        println!("resident memory: {after:.1} MiB, grown by {:.2} MiB", after - before);
        least = least.min(after - before);
        before = after;
    }
    assert!(least < 4.0, "resident memory grew by {least:.1} MiB and more in each {} requests", requests / 4);
}
