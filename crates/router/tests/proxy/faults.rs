//! Replicas that fail. Before the first byte another one answers; after it the client is told.

use std::time::Duration;

use serde_json::Value;
use servelab_router::Timeouts;

use crate::util::{Backend, Behaviour, Routed, options, until};

#[tokio::test]
async fn fault_7_what_fails_before_the_first_byte_is_tried_elsewhere() {
    for behaviour in [
        Behaviour::BreakAtOnce,
        Behaviour::ShortBody,
        Behaviour::Status(502),
        Behaviour::Status(503),
        Behaviour::Status(429),
    ] {
        let (bad, good) = (Backend::start(behaviour), Backend::start(Behaviour::Answer));
        let routed = Routed::before(&[&bad, &good]).await;
        for _ in 0..20 {
            let answer = routed.ask(false).send().await.unwrap();
            assert_eq!(answer.headers()["x-backend"], good.name(), "{behaviour:?}");
        }
        assert!(bad.came() > 0, "{behaviour:?}");
        assert!(routed.metric("servelab_router_retries_total").await > 0.0);
    }
}

#[tokio::test]
async fn fault_7_what_has_begun_is_never_tried_again_and_ends_with_an_event_that_says_why() {
    let backend = Backend::start(Behaviour::BreakMidway);
    let routed = Routed::before(&[&backend]).await;
    let text = routed.ask(true).send().await.unwrap().text().await.unwrap();
    let events: Vec<&str> = text.split_terminator("\n\n").collect();
    assert_eq!(events[..3], ["data: {\"n\":0}", "data: {\"n\":1}", "data: {\"n\":2}"], "{text}");
    let error: Value = serde_json::from_str(events[3].strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(
        (events.len(), &error["error"]["code"]),
        (4, &"replica_failed".into()),
        "half an event is nobody's"
    );
    assert_eq!(backend.came(), 1);
    assert_eq!(routed.metric("servelab_router_requests_total{outcome=\"failed\"}").await, 1.0);
}

#[tokio::test]
async fn silence_has_an_end() {
    let backend = Backend::start(Behaviour::Stall);
    let mut options = options(&[&backend]);
    options.timeouts = Timeouts {
        idle: Duration::from_millis(200),
        first_byte: Duration::from_millis(300),
        ..options.timeouts
    };
    let routed = Routed::start(options, 1).await;
    let text = routed.ask(true).send().await.unwrap().text().await.unwrap();
    assert!(text.contains("replica_timed_out") && !text.contains("[DONE]"), "{text}");
    backend.behave(Behaviour::Hang);
    let answer = routed.ask(true).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 504);
    until(async || backend.inside() == 0).await;
}

#[tokio::test]
async fn everything_has_an_end() {
    let backend = Backend::start(Behaviour::Endless);
    let mut options = options(&[&backend]);
    options.timeouts.total = Duration::from_millis(500);
    let routed = Routed::start(options, 1).await;
    let text = routed.ask(true).send().await.unwrap().text().await.unwrap();
    assert!(
        text.ends_with("\n\n") && text.contains("not complete after 0 s"),
        "{}",
        &text[text.len() - 200..]
    );
    backend.behave(Behaviour::Hang);
    assert_eq!(routed.ask(false).send().await.unwrap().status().as_u16(), 504);
}

#[tokio::test]
async fn when_none_does_better_the_last_ones_answer_passes() {
    let (one, other) = (Backend::start(Behaviour::Status(429)), Backend::start(Behaviour::Status(429)));
    let routed = Routed::before(&[&one, &other]).await;
    let answer = routed.ask(false).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), one.came(), other.came()), (429, 1, 1));
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["message"], "as the test says");
}

#[tokio::test]
async fn a_replica_that_is_gone_is_left_alone_and_found_again() {
    let (gone, good) = (Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer));
    let routed = Routed::before(&[&gone, &good]).await;
    let address = gone.address;
    drop(gone);
    for _ in 0..50 {
        assert_eq!(routed.ask(false).send().await.unwrap().headers()["x-backend"], good.name());
    }
    until(async || routed.health().await["replicas_ready"] == 1).await;
    let back = Backend::on(address, Behaviour::Answer);
    until(async || {
        routed.ask(false).send().await.unwrap();
        back.came() > 0
    })
    .await;
}

#[tokio::test]
async fn a_slow_first_attempt_gets_a_second_one_beside_it_and_the_loser_is_cancelled() {
    let (slow, quick) = (Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer));
    let mut options = options(&[&slow, &quick]);
    options.hedge_quantile = Some(0.99);
    let routed = Routed::start(options, 2).await;
    for _ in 0..40 {
        routed.ask(false).send().await.unwrap();
    }
    slow.behave(Behaviour::Hang);
    for _ in 0..10 {
        assert_eq!(routed.ask(false).send().await.unwrap().headers()["x-backend"], quick.name());
    }
    assert!(routed.metric("servelab_router_hedges_won_total").await > 0.0);
    until(async || slow.inside() == 0).await;
}

/// Nobody asks for the next piece, so that nothing but the clock can end it.
#[tokio::test]
async fn a_client_that_does_not_read_has_an_end_too() {
    let backend = Backend::start(Behaviour::Endless);
    let mut options = options(&[&backend]);
    options.timeouts.total = Duration::from_millis(500);
    let routed = Routed::start(options, 1).await;
    let unread = routed.ask(true).send().await.unwrap();
    assert_eq!(unread.status().as_u16(), 200);
    until(async || backend.inside() == 0).await;
    until(async || routed.metric("servelab_router_requests_in_flight").await == 0.0).await;
    drop(unread);
}
