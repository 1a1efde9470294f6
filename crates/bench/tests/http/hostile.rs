//! Servers that misbehave, each in one way.

use std::net::SocketAddr;
use std::time::Duration;

use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::client::Timeouts;
use servelab_bench::measure::{Tally, failures};
use servelab_bench::result::{FailureClass, Outcome, RequestRecord};
use servelab_bench::run::{LoadShape, RunLog};
use tokio_util::sync::CancellationToken;

use crate::server::{
    Conversation, HEAD, LAST, chunk, event, last_token_and_usage, measure, plan, serve, timeouts, token,
};

const SOON: Duration = Duration::from_millis(150);

fn one_by_one() -> LoadShape {
    LoadShape::Closed { concurrency: 1, think_time: Duration::ZERO }
}

async fn three_requests(address: SocketAddr, timeouts: Timeouts) -> RunLog {
    measure(address, timeouts, &plan(one_by_one(), 3), 4, CancellationToken::new()).await
}

/// Three requests, all of which must fail in this way; returns what the first said.
async fn all_fail(address: SocketAddr, timeouts: Timeouts, class: FailureClass, name: &str) -> String {
    let run = three_requests(address, timeouts).await;
    let counts = failures(&run.records);
    assert_eq!(counts.len(), 1, "{counts:?}");
    assert_eq!(
        (counts[0].class, counts[0].name.as_str(), counts[0].measured),
        (class, name, 3),
        "{counts:?}"
    );
    let metrics = Tally::of(&run.records, None).metrics();
    assert_eq!((metrics.requests, metrics.completed, metrics.failed), (3, 0, 3));
    counts[0].example.clone()
}

/// The script sends `text` and hangs up.
fn says(text: impl Into<String>) -> SocketAddr {
    let text = text.into();
    serve(move |conversation| {
        conversation.send(&text);
        let _ = conversation.stream.shutdown(std::net::Shutdown::Both);
    })
}

fn stream_of(events: &[String]) -> String {
    format!("{HEAD}{}{LAST}", events.concat())
}

#[tokio::test]
async fn nobody_listens() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let message = all_fail(address, timeouts(), FailureClass::Unreachable, "unreachable").await;
    assert!(message.contains(&address.to_string()), "{message}");
}

/// A listener whose backlog is full lets the kernel drop the next handshake.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_connection_that_is_never_made() {
    use socket2::{Domain, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(1).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let mut held = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, SOON) {
        held.push(stream);
        assert!(held.len() < 100, "the backlog never fills");
    }
    let timeouts = Timeouts { connect: SOON, ..timeouts() };
    all_fail(address, timeouts, FailureClass::ConnectTimeout, "connect_timeout").await;
}

#[tokio::test]
async fn refusals_are_told_apart_by_their_status() {
    for status in [400, 401, 429, 500, 503] {
        let body = r#"{"error":{"message":"no  room\nleft","type":"x","param":null,"code":null}}"#;
        let answer = format!(
            "HTTP/1.1 {status} No\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let address = serve(move |conversation| conversation.send(&answer));
        let message = all_fail(address, timeouts(), FailureClass::Status, &format!("status_{status}")).await;
        assert_eq!(message, "no room left");
    }
}

#[tokio::test]
async fn an_answer_that_is_not_streamed() {
    let body = r#"{"choices":[{"text":"all at once"}]}"#;
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let message = all_fail(says(answer), timeouts(), FailureClass::ContentType, "content_type").await;
    assert!(message.contains("application/json"), "{message}");
}

#[tokio::test]
async fn connections_that_break_off() {
    for text in [
        String::new(),
        "HTTP/1.1 200 OK\r\ncontent-ty".into(),
        HEAD.into(),
        format!("{HEAD}{}", token()),
        // The end of the body, but not of the answer.
        stream_of(&[token()]),
        "this is no HTTP at all\r\n\r\n".into(),
    ] {
        all_fail(says(text), timeouts(), FailureClass::Dropped, "dropped").await;
    }
}

/// Sends its text and then nothing, for as long as the client stays.
fn silent_after(text: String) -> SocketAddr {
    serve(move |conversation| conversation.send(&text))
}

#[tokio::test]
async fn a_server_that_never_answers() {
    let timeouts = Timeouts { first_byte: SOON, ..timeouts() };
    all_fail(silent_after(String::new()), timeouts, FailureClass::FirstByteTimeout, "first_byte_timeout")
        .await;
}

#[tokio::test]
async fn an_answer_that_stands_still() {
    let timeouts = Timeouts { idle: SOON, ..timeouts() };
    let address = silent_after(format!("{HEAD}{}", token()));
    all_fail(address, timeouts, FailureClass::Stall, "stall").await;
}

/// Comments keep the connection busy without ever bringing a token.
#[tokio::test]
async fn an_answer_that_never_ends() {
    let address = serve(|conversation| {
        conversation.send(HEAD);
        for _ in 0..200 {
            conversation.send(&chunk(": working\n\n"));
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let timeouts = Timeouts { total: 3 * SOON, ..timeouts() };
    all_fail(address, timeouts, FailureClass::TotalTimeout, "total_timeout").await;
}

#[tokio::test]
async fn events_that_are_broken() {
    let many = token().repeat(10_000);
    let endless = "40000\r\n".to_owned() + &"x".repeat(0x40000) + "\r\n";
    for events in [
        event("{\"choices\":[{"),
        event("<html>"),
        event("[]"),
        event(r#"{"choices":[{"text":5}]}"#),
        many,
        endless.repeat(5),
    ] {
        all_fail(says(stream_of(&[events])), timeouts(), FailureClass::BrokenSse, "broken_sse").await;
    }
}

#[tokio::test]
async fn an_error_in_the_middle_of_an_answer() {
    let error = event(r#"{"error":{"message":"the device is lost","type":"server_error"}}"#);
    let address = says(stream_of(&[token(), error]));
    let message = all_fail(address, timeouts(), FailureClass::ErrorEvent, "error_event").await;
    assert_eq!(message, "the device is lost");
}

#[tokio::test]
async fn answers_without_usage_or_without_a_token() {
    let finish =
        |text: &str| event(&format!(r#"{{"choices":[{{"text":"{text}","finish_reason":"stop"}}]}}"#));
    let usage = event(r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}"#);
    let address = says(stream_of(&[token(), finish("!"), event("[DONE]")]));
    all_fail(address, timeouts(), FailureClass::NoUsage, "no_usage").await;
    let address = says(stream_of(&[finish(""), usage, event("[DONE]")]));
    all_fail(address, timeouts(), FailureClass::NoToken, "no_token").await;
}

#[tokio::test]
async fn good_and_bad_answers_are_counted_beside_each_other() {
    let address = serve(|conversation| match conversation.max_tokens % 3 {
        0 => conversation.send("HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n"),
        _ => conversation.send(&format!("{HEAD}{}", last_token_and_usage(1))),
    });
    let run = measure(address, timeouts(), &plan(one_by_one(), 9), 0, CancellationToken::new()).await;
    let metrics = Tally::of(&run.records, None).metrics();
    assert_eq!((metrics.requests, metrics.completed, metrics.failed), (9, 6, 3));
}

/// A server may close a connection that is idle, announced or not; that is no failure of the next request.
#[tokio::test]
async fn connections_that_are_closed_between_two_requests() {
    let answer = || format!("{HEAD}{}", last_token_and_usage(1));
    let hangs_up: fn(&mut Conversation) = |conversation| {
        let _ = conversation.stream.shutdown(std::net::Shutdown::Both);
    };
    let after_the_answer = serve(move |conversation| {
        conversation.send(&answer());
        hangs_up(conversation);
    });
    let at_the_next_request = serve(move |conversation| match conversation.earlier {
        0 => conversation.send(&answer()),
        _ => hangs_up(conversation),
    });
    let keeps_it = serve(move |conversation| conversation.send(&answer()));
    for (address, reused) in [(after_the_answer, 0), (at_the_next_request, 0), (keeps_it, 2)] {
        let run = three_requests(address, timeouts()).await;
        assert!(run.records.iter().all(RequestRecord::is_completed), "{:?}", failures(&run.records));
        let without_connect = run.records.iter().filter(|record| record.connect_seconds.is_none());
        assert_eq!(without_connect.count(), reused);
    }
}

#[tokio::test]
async fn an_open_loop_does_not_wait_and_counts_what_it_cannot_hold() {
    let address = silent_after(String::new());
    let mut plan = plan(LoadShape::Open { arrivals: ArrivalShape::AllAtOnce, max_concurrency: None }, 10);
    plan.max_in_flight = 3;
    let timeouts = Timeouts { first_byte: SOON, ..timeouts() };
    let run = measure(address, timeouts, &plan, 4, CancellationToken::new()).await;
    let counts = failures(&run.records);
    let names: Vec<_> = counts.iter().map(|count| (count.name.as_str(), count.all)).collect();
    assert_eq!(names, [("max_in_flight", 7), ("first_byte_timeout", 3)]);
}

#[tokio::test]
async fn a_run_that_is_stopped_keeps_what_was_done() {
    let address = serve(|conversation| match conversation.max_tokens {
        0..10 => conversation.send(&format!("{HEAD}{}", last_token_and_usage(1))),
        _ => conversation.send(&format!("{HEAD}{}", token())),
    });
    let stop = CancellationToken::new();
    let plan = plan(one_by_one(), 1000);
    let ending = stop.clone();
    tokio::spawn(async move {
        tokio::time::sleep(3 * SOON).await;
        ending.cancel();
    });
    let run = measure(address, timeouts(), &plan, 5, stop).await;
    assert!(run.interrupted);
    let completed = run.records.iter().filter(|record| record.is_completed()).count();
    assert_eq!(completed, 5);
    assert_eq!(run.records.iter().filter(|record| record.outcome == Outcome::Cut).count(), 1);
    assert_eq!(Tally::of(&run.records, None).metrics().completed, 5);
}
