//! Replicas that write what HTTP forbids, never end, or vanish: the client gets another one's answer or is told, and
//! the router keeps nothing of it.

use std::time::Duration;

use futures::StreamExt;
use serde_json::Value;

use crate::raw::{Does, GOOD, Raw};
use crate::util::{Backend, Behaviour, PATIENCE, Routed, options, options_to, until};

const EVENTS: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const ONE_EVENT: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
      10\r\ndata: {\"n\":12}\n\n\r\n";
const ENDLESS_JSON: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";

/// What no client should ever see of a replica, whether it asked for a stream or not.
const NO_ANSWERS: [(&str, Does); 18] = [
    ("closes without a word", Does::Writes(b"")),
    ("resets without a word", Does::Resets(b"")),
    ("half-closes without a word", Does::HalfCloses(b"")),
    ("speaks TLS", Does::Writes(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")),
    ("garbage for a status line", Does::Writes(b"HTTP/1.1 banana\r\n\r\n")),
    ("a version that there is not", Does::Writes(b"HTTP/9.9 200 OK\r\ncontent-length: 0\r\n\r\n")),
    ("a status of two digits", Does::Writes(b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n")),
    ("half a head", Does::Resets(b"HTTP/1.1 200 OK\r\ncontent-ty")),
    ("a length that is no number", Does::Writes(b"HTTP/1.1 200 OK\r\ncontent-length: banana\r\n\r\n{}")),
    (
        "two lengths that differ",
        Does::Writes(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 9\r\n\r\n{}"),
    ),
    ("a body shorter than its length", Does::Writes(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"a\"")),
    ("a reset in the middle", Does::Resets(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"a\"")),
    ("half closed in the middle", Does::HalfCloses(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"a\"")),
    (
        "a chunk whose size is no number",
        Does::Writes(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nbanana\r\n{}\r\n0\r\n\r\n"),
    ),
    (
        "a change of protocol nobody asked for",
        Does::Writes(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"),
    ),
    ("a header of a megabyte", Does::Headers(1000)),
    ("a head that never ends", Does::NeverEnds(b"HTTP/1.1 200 OK\r\n", b"x-more: and more\r\n")),
    (
        "an error whose body never ends",
        Does::NeverEnds(
            b"HTTP/1.1 503 Service Unavailable\r\ntransfer-encoding: chunked\r\n\r\n",
            b"4\r\nmore\r\n",
        ),
    ),
];

#[tokio::test]
async fn what_is_no_answer_is_replaced_by_another_replicas() {
    for (what, does) in NO_ANSWERS {
        let (bad, good) = (Raw::start(does), Backend::start(Behaviour::Answer));
        let routed = Routed::start(options_to(&[bad.address, good.address]), 2).await;
        for at in 0..20 {
            let streams = at % 2 == 1;
            let answer =
                tokio::time::timeout(PATIENCE, routed.ask(streams).send()).await.expect(what).unwrap();
            assert_eq!(answer.status().as_u16(), 200, "{what}");
            if !streams {
                assert_eq!(answer.headers()["x-backend"], good.name(), "{what}");
            }
            let text = answer.text().await.unwrap();
            assert!(text.contains("[DONE]") || text.contains("\"yes\""), "{what}: {text}");
        }
        assert!(bad.came() > 0, "{what}");
        until(async || bad.inside() == 0).await;
    }
}

#[tokio::test]
async fn when_there_is_no_other_replica_the_client_is_told_in_json() {
    for (what, does) in NO_ANSWERS {
        let bad = Raw::start(does);
        let mut options = options_to(&[bad.address]);
        options.max_retries = 0;
        let routed = Routed::start(options, 1).await;
        let answer = tokio::time::timeout(PATIENCE, routed.ask(false).send()).await.expect(what).unwrap();
        let status = answer.status().as_u16();
        let body: Value = answer.json().await.expect(what);
        assert!([502, 503].contains(&status), "{what}: {status} {body}");
        assert_eq!(body["error"]["type"], "server_error", "{what}: {body}");
        assert_eq!(routed.health().await["status"], "ready", "{what}");
    }
}

#[tokio::test]
async fn a_status_that_asks_for_another_replica_is_not_waited_for_to_its_end() {
    let head = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 100\r\n\r\n{";
    let (bad, good) = (Raw::start(Does::FallsSilent(head)), Backend::start(Behaviour::Answer));
    let routed = Routed::start(options_to(&[bad.address, good.address]), 2).await;
    let asked = async {
        while bad.came() == 0 {
            assert_eq!(routed.ask(false).send().await.unwrap().headers()["x-backend"], good.name());
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.expect("the rest of the error never comes");
}

/// Twenty ask, one after the other, and each gets [`GOOD`] and nothing else.
async fn all_get_the_good_answer(routed: &Routed) {
    for _ in 0..20 {
        let answer = routed.ask(false).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), answer.text().await.unwrap().as_str()),
            (200, "{\"raw\":true}")
        );
    }
}

#[tokio::test]
async fn what_comes_after_an_answer_is_nobodys() {
    let twice = [GOOD, b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"raw\":\"evil\"}"].concat().leak();
    let raw = Raw::start(Does::Writes(twice));
    let routed = Routed::start(options_to(&[raw.address]), 1).await;
    all_get_the_good_answer(&routed).await;
}

#[tokio::test]
async fn a_stream_that_breaks_in_any_way_ends_with_an_event_that_says_so() {
    let event = |more: &str| [ONE_EVENT, more.as_bytes()].concat().leak() as &'static [u8];
    for (what, does) in [
        ("closed between events", Does::Writes(event(""))),
        ("reset between events", Does::Resets(event(""))),
        ("half closed", Does::HalfCloses(event(""))),
        ("a chunk cut short", Does::Writes(event("100\r\ndata: {\"n\""))),
        ("reset within a chunk", Does::Resets(event("100\r\ndata: {\"n\""))),
        ("a chunk size that is none", Does::Writes(event("banana\r\n"))),
        ("a chunk of more than there can be", Does::Writes(event("ffffffffffffffffff\r\ndata"))),
    ] {
        let raw = Raw::start(does);
        let routed = Routed::start(options_to(&[raw.address]), 1).await;
        let text = routed.ask(true).send().await.unwrap().text().await.expect(what);
        let events: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!((events.len(), events[0]), (2, "data: {\"n\":12}"), "{what}: {text}");
        let error: Value = serde_json::from_str(events[1].trim_start_matches("data: ")).expect(what);
        assert_eq!(error["error"]["code"], "replica_failed", "{what}");
        assert_eq!(raw.came(), 1, "{what}: what has begun is never tried again");
    }
}

#[tokio::test]
async fn an_answer_without_events_that_breaks_after_its_beginning_breaks_for_the_client_too() {
    let chunk = [ENDLESS_JSON, b"4\r\n{\"a\"\r\n"].concat().leak();
    let raw = Raw::start(Does::Resets(chunk));
    let routed = Routed::start(options_to(&[raw.address]), 1).await;
    let answer = routed.ask(false).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    assert!(answer.bytes().await.is_err(), "half an answer must not look like a whole one");
    until(async || routed.metric("servelab_router_requests_total{outcome=\"failed\"}").await == 1.0).await;
}

/// As long as the time for a whole answer, and no byte more than the sockets hold beyond what was read.
#[tokio::test]
async fn a_body_that_never_ends_ends_with_the_time_for_a_whole_answer() {
    let piece = [b"1000\r\n".as_slice(), &[b' '; 4096], b"\r\n"].concat().leak();
    let events = [b"1000\r\ndata: ".as_slice(), &[b'x'; 4088], b"\n\n\r\n"].concat().leak();
    for (streams, head, piece) in [(false, ENDLESS_JSON, &*piece), (true, EVENTS, &*events)] {
        let raw = Raw::start(Does::NeverEnds(head, piece));
        let mut options = options_to(&[raw.address]);
        options.timeouts.total = Duration::from_millis(500);
        let routed = Routed::start(options, 1).await;
        let mut pieces = routed.ask(streams).send().await.unwrap().bytes_stream();
        let mut last = Ok(bytes::Bytes::new());
        let read = async {
            while let Some(piece) = pieces.next().await {
                last = piece;
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("it never ends");
        match last {
            Ok(last) => {
                let text = String::from_utf8_lossy(&last).into_owned();
                assert!(streams && text.contains("replica_timed_out"), "{text}");
            }
            Err(_) => assert!(!streams, "a stream of events ends with one"),
        }
        until(async || raw.inside() == 0).await;
    }
    let raw = Raw::start(Does::NeverEnds(ENDLESS_JSON, piece));
    let routed = Routed::start(options_to(&[raw.address]), 1).await;
    let unread = routed.ask(false).send().await.unwrap();
    let before = std::cell::Cell::new(usize::MAX);
    until(async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        before.replace(raw.sent()) == raw.sent()
    })
    .await;
    assert!(raw.sent() < 64 << 20, "{} bytes were taken from the replica", raw.sent());
    drop(unread);
    until(async || raw.inside() == 0).await;
}

/// It accepts and says nothing: the machine is well, the process is not.
#[tokio::test]
async fn a_replica_that_accepts_and_says_nothing_is_given_up_in_time() {
    let (silent, good) = (Raw::start(Does::FallsSilent(b"")), Backend::start(Behaviour::Answer));
    let mut options = options_to(&[silent.address, good.address]);
    options.timeouts.first_byte = Duration::from_millis(300);
    let routed = Routed::start(options, 2).await;
    while silent.came() == 0 {
        let text = routed.ask(true).send().await.unwrap().text().await.unwrap();
        assert!(text.contains("[DONE]"), "{text}");
    }
    until(async || silent.inside() == 0).await;
}

#[tokio::test]
async fn a_connection_that_the_replica_has_half_closed_is_not_used_again() {
    let closes = GOOD.strip_suffix(b"}").unwrap();
    let closes = [closes, b"}"].concat().leak();
    let raw = Raw::start(Does::HalfCloses(closes));
    let routed = Routed::start(options_to(&[raw.address]), 1).await;
    all_get_the_good_answer(&routed).await;
    assert_eq!(raw.came(), 20);
    until(async || raw.inside() == 0).await;
}

/// A replica takes everything with it that it had, and that is more than a fleet in trouble would be asked again.
#[tokio::test]
async fn a_replica_that_dies_with_all_that_it_may_have_loses_none_of_it() {
    let (one, other) = (Backend::start(Behaviour::Hang), Backend::start(Behaviour::Hang));
    let mut options = options(&[&one, &other]);
    options.max_in_flight_per_replica = 200;
    options.max_waiting = 1000;
    let routed = Routed::start(options, 2).await;
    let asked: Vec<_> = (0..400).map(|_| tokio::spawn(routed.ask(false).send())).collect();
    until(async || one.inside() + other.inside() == 400).await;
    let (dying, other) = if one.inside() < other.inside() { (other, one) } else { (one, other) };
    assert!(dying.inside() >= 200);
    other.behave(Behaviour::Answer);
    drop(dying);
    // What hangs at the other one since before goes with its clients.
    until(async || asked.iter().filter(|asked| asked.is_finished()).count() >= 400 - other.inside()).await;
    for asked in asked.into_iter().filter(|asked| asked.is_finished()) {
        let answer = asked.await.unwrap().unwrap();
        assert_eq!(answer.status().as_u16(), 200, "{}", answer.text().await.unwrap());
    }
}
