//! With no replica there, the router holds requests, counts them, and sends them on when one turns ready.

use std::time::Duration;

use serde_json::Value;

use crate::util::{Backend, Behaviour, Routed, options, until};

const HELD: &str = "servelab_router_requests_held";

#[tokio::test]
async fn fault_8_with_no_replica_requests_are_held_and_counted_for_the_scaler() {
    let backend = Backend::start(Behaviour::Answer);
    backend.set_ready(false);
    let routed = Routed::start(options(&[&backend]), 0).await;
    let asked: Vec<_> = (0..10).map(|_| tokio::spawn(routed.ask(false).send())).collect();
    until(async || routed.metric(HELD).await == 10.0).await;
    assert_eq!(routed.metric("servelab_router_requests_waiting").await, 10.0);
    assert_eq!((routed.health().await["status"].clone(), backend.came()), ("ready".into(), 0));
    asked[3].abort();
    until(async || routed.metric(HELD).await == 9.0).await;
    backend.set_ready(true);
    for (at, asked) in asked.into_iter().enumerate().filter(|(at, _)| *at != 3) {
        assert_eq!(asked.await.unwrap().unwrap().status().as_u16(), 200, "{at}");
    }
    assert_eq!((backend.came(), routed.metric(HELD).await), (9, 0.0));
}

/// All replicas away, then one back: what was on its way to the last one is held too.
#[tokio::test]
async fn when_the_last_replica_dies_requests_wait_for_the_next() {
    let last = Backend::start(Behaviour::Answer);
    let mut options = options(&[&last]);
    // The health check must not be what notices.
    options.probe.interval = Duration::from_secs(2);
    let routed = Routed::start(options, 1).await;
    let address = last.address;
    drop(last);
    let asked = tokio::spawn(routed.ask(false).send());
    until(async || routed.metric(HELD).await == 1.0).await;
    let back = Backend::on(address, Behaviour::Answer);
    assert_eq!(asked.await.unwrap().unwrap().headers()["x-backend"], back.name());
}

#[tokio::test]
async fn fault_8_holding_is_bounded_in_number_and_time() {
    let mut options = options(&[]);
    options.hold.max_requests = 1;
    options.hold.timeout = Duration::from_millis(1500);
    let routed = Routed::start(options, 0).await;
    let held = tokio::spawn(routed.ask(true).send());
    until(async || routed.metric(HELD).await == 1.0).await;
    let beyond = routed.ask(false).send().await.unwrap();
    let held = held.await.unwrap().unwrap();
    for answer in [beyond, held] {
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (503, &"5".parse().unwrap())
        );
        assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "no_replica");
    }
}
