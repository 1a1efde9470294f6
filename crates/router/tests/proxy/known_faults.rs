//! Faults that other routers are known for, each under its number: 1, 3 and 5 here, 4 and 6 in `transparent.rs`, 7 in
//! `faults.rs`, 8 in `hold.rs`.

use serde_json::{Value, json};
use servelab_telemetry::Secret;

use crate::util::{Backend, Behaviour, Routed, options, until};

fn prompt(routed: &Routed, text: &str, streams: bool) -> reqwest::RequestBuilder {
    let body = json!({"prompt": text, "max_tokens": 10, "stream": streams});
    routed.client.post(format!("{}/v1/completions", routed.base)).json(&body)
}

/// All go where the prefix is, as long as they wait less there than computing it anew would take; then elsewhere.
#[tokio::test]
async fn fault_1_a_hot_prefix_spills_before_its_queue_costs_more_than_computing_it_elsewhere() {
    let backends = [Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer)];
    let routed = Routed::before(&backends.each_ref()).await;
    let text = "The same long beginning of every prompt. ".repeat(500);
    for at in 0..20 {
        prompt(&routed, &format!("{text}{at}"), false).send().await.unwrap();
    }
    let (home, other) = match backends[0].came() {
        0 => (&backends[1], &backends[0]),
        _ => (&backends[0], &backends[1]),
    };
    assert_eq!((home.came(), other.came()), (20, 0), "one at a time all are where the prefix is");
    // Some 400 tokens that nobody holds: what the requests there wait for.
    let own = "Words of its own. ".repeat(90);
    home.behave(Behaviour::Hang);
    other.behave(Behaviour::Hang);
    let asked: Vec<_> =
        (0..80).map(|at| tokio::spawn(prompt(&routed, &format!("{text}{at} {own}"), false).send())).collect();
    until(async || backends.iter().map(Backend::inside).sum::<usize>() == 80).await;
    assert!(other.inside() > 0, "all 80 wait for one replica");
    assert!(
        home.inside() >= other.inside(),
        "{} where the prefix is, {} elsewhere",
        home.inside(),
        other.inside()
    );
    asked.iter().for_each(|asked| asked.abort());
}

#[tokio::test]
async fn fault_3_the_index_of_prefixes_keeps_its_bound_and_nothing_of_a_replica_that_is_gone() {
    const INDEX: &str = "servelab_router_index_bytes";
    let backends = [Backend::start(Behaviour::Answer), Backend::start(Behaviour::Answer)];
    let mut options = options(&backends.each_ref());
    options.fleet.index_bytes = 256 << 10;
    options.admin_key = Some(Secret::new("admin"));
    let routed = Routed::start(options, 2).await;
    for at in 0..300 {
        prompt(&routed, &format!("{at} ").repeat(2000), false).send().await.unwrap();
        let bytes = routed.metric(INDEX).await;
        assert!(bytes > 0.0 && bytes <= 262_144.0, "{bytes} bytes after {at} requests");
    }
    let blocks = async || {
        let replicas: Value = routed.get("/replicas").send().await.unwrap().json().await.unwrap();
        let blocks = |replica: &Value| replica["index_blocks"].as_u64().unwrap();
        replicas["replicas"].as_array().unwrap().iter().map(blocks).collect::<Vec<_>>()
    };
    let held: u64 = blocks().await.iter().sum();
    assert!(held > 500, "{held} blocks are in the index");
    let url = format!("{}/replicas", routed.base);
    let change = async |method: reqwest::Method, backend: &Backend| {
        let request = routed.client.request(method, &url).bearer_auth("admin");
        let answer =
            request.json(&json!({"url": format!("http://{}", backend.address)})).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
    };
    for backend in &backends {
        change(reqwest::Method::DELETE, backend).await;
    }
    let text = routed.get("/metrics").send().await.unwrap().text().await.unwrap();
    assert!(!text.contains("replica=\"http"), "no series names a replica that is gone");
    for backend in &backends {
        change(reqwest::Method::POST, backend).await;
    }
    assert_eq!(blocks().await, [0, 0], "what comes to the same place holds nothing");
}

#[tokio::test]
async fn fault_5_requests_in_flight_are_counted_until_their_last_byte_and_no_longer() {
    let backend = Backend::start(Behaviour::Stall);
    let mut options = options(&[&backend]);
    options.timeouts.idle = options.timeouts.total;
    let routed = Routed::start(options, 1).await;
    let in_flight = async || {
        let replicas: Value = routed.get("/replicas").send().await.unwrap().json().await.unwrap();
        replicas["replicas"][0]["in_flight"].as_u64().unwrap()
    };
    let mut streams = Vec::new();
    for _ in 0..6 {
        streams.push(prompt(&routed, "x", true).send().await.unwrap());
    }
    assert_eq!(in_flight().await, 6);
    streams.truncate(4);
    until(async || in_flight().await == 4).await;
    // Ends of every other kind leave the count of those that live as it is.
    for behaviour in
        [Behaviour::BreakMidway, Behaviour::Status(500), Behaviour::Answer, Behaviour::BreakAtOnce]
    {
        backend.behave(behaviour);
        for streams in [false, true] {
            let _ = prompt(&routed, "x", streams).send().await.unwrap().text().await;
        }
        until(async || in_flight().await == 4).await;
    }
    assert_eq!(routed.metric("servelab_router_requests_in_flight").await, 4.0);
    drop(streams);
    until(async || in_flight().await == 0).await;
    assert_eq!(routed.metric("servelab_router_requests_in_flight").await, 0.0);
}
