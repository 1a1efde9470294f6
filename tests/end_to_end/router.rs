//! The router before real replicas: one is killed, one drains, none is there yet, one holds the prefix.

use std::cell::Cell;
use std::net::TcpListener;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::util::{PATIENCE, Server, events, servelab};

/// Small replicas that start quickly and leave the processor to each other.
const REPLICA: &[&str] = &["--threads", "1", "--kv-blocks", "256", "--max-running", "8"];

async fn replica() -> Server {
    Server::start(REPLICA).await
}

/// A router before these addresses that asks them often how they are.
async fn router(replicas: &[&str], flags: &[&str]) -> Server {
    let mut command = servelab(&["route", "--port", "0", "--health-interval", "100ms"]);
    for replica in replicas {
        command.args(["--replica", replica]);
    }
    command.args(flags);
    let router = Server::spawn(command);
    router.wait_until_ready().await;
    router
}

async fn until_ready(router: &Server, count: usize) {
    let ready = async || {
        let health: Value = serde_json::from_str(&router.get("/health").await.1).unwrap();
        health["replicas_ready"] == count
    };
    router.until("as many replicas are ready", ready).await;
}

fn body(number: usize) -> Value {
    json!({"prompt": format!("Question {number}: what is a block?"), "max_tokens": 60, "temperature": 0, "ignore_eos": true})
}

/// Sends `count` requests at once, unstreamed, and gives the status of each.
async fn ask_all(router: &Server, count: usize) -> Vec<u16> {
    let asked = (0..count).map(async |number| {
        let (status, answer) = router.post("/v1/completions", &body(number)).await;
        if status == 200 {
            assert_eq!(answer["usage"]["completion_tokens"], 60, "{answer}");
        }
        status
    });
    join_all(asked).await
}

#[tokio::test]
async fn a_replica_that_is_killed_loses_no_unstreamed_request_and_its_streams_say_so() {
    let (mut killed, one, other) = tokio::join!(replica(), replica(), replica());
    let router = router(&[&killed.base, &one.base, &other.base], &[]).await;
    until_ready(&router, 3).await;
    let long =
        json!({"prompt": "Tell me of blocks", "max_tokens": 200, "temperature": 0, "ignore_eos": true});
    let streams = (0..6).map(async |_| events(router.open_stream("/v1/completions", &long).await).await);
    let killing = async {
        router
            .until("every replica works", async || killed.engine_state().await["running"] != json!([]))
            .await;
        killed.signal("KILL");
        killed.ended().await;
    };
    let (statuses, streams, ()) = tokio::join!(ask_all(&router, 24), join_all(streams), killing);
    assert_eq!(statuses, [200; 24], "{}", router.log());
    for events in streams {
        let last = events.last().unwrap();
        assert!(last == "[DONE]" || last.contains("replica_failed"), "{last}");
    }
    until_ready(&router, 2).await;
    assert_eq!(ask_all(&router, 4).await, [200; 4]);
}

#[tokio::test]
async fn a_replica_that_drains_loses_nothing() {
    let (mut drained, other) = tokio::join!(replica(), replica());
    let router = router(&[&drained.base, &other.base], &[]).await;
    until_ready(&router, 2).await;
    let draining = async {
        router.until("it works", async || drained.engine_state().await["running"] != json!([])).await;
        drained.signal("TERM");
        assert!(drained.ended().await.success());
    };
    let (statuses, ()) = tokio::join!(ask_all(&router, 16), draining);
    assert_eq!(statuses, [200; 16], "{}", router.log());
    assert_eq!(ask_all(&router, 4).await, [200; 4]);
}

/// Clients that each send their next request when the last one has been answered, until `done` is.
async fn ask_until<T>(router: &Server, clients: usize, done: impl Future<Output = T>) -> (Vec<u16>, T) {
    let over = Cell::new(false);
    let asked = (0..clients).map(async |client| {
        let mut statuses = Vec::new();
        while !over.get() {
            let number = client + clients * statuses.len();
            statuses.push(router.post("/v1/completions", &body(number)).await.0);
        }
        statuses
    });
    let done = async {
        let done = done.await;
        over.set(true);
        done
    };
    let (statuses, done) = tokio::join!(join_all(asked), done);
    (statuses.concat(), done)
}

async fn until_it_works(router: &Server, replica: &Server) {
    router.until("it works", async || replica.engine_state().await["running"] != json!([])).await;
}

#[tokio::test]
async fn a_replica_that_is_killed_and_started_again_under_load_loses_no_unstreamed_request() {
    let (mut killed, one, other) = tokio::join!(replica(), replica(), replica());
    let router = router(&[&killed.base, &one.base, &other.base], &[]).await;
    until_ready(&router, 3).await;
    let port = killed.base.rsplit(':').next().unwrap().to_owned();
    let killing = async {
        until_it_works(&router, &killed).await;
        killed.signal("KILL");
        killed.ended().await;
        until_ready(&router, 2).await;
        let mut command = servelab(&["serve", "--port", &port]);
        command.args(REPLICA);
        let again = Server::spawn(command);
        until_ready(&router, 3).await;
        until_it_works(&router, &again).await;
    };
    let (statuses, ()) = ask_until(&router, 6, killing).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}\n{}", router.log());
}

#[tokio::test]
async fn replicas_that_come_and_go_under_load_lose_nothing() {
    let (first, second) = tokio::join!(replica(), replica());
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "admin").unwrap();
    let router = router(&[&first.base], &["--admin-key-file", key.path().to_str().unwrap()]).await;
    until_ready(&router, 1).await;
    let change = async |method: reqwest::Method, replica: &Server| {
        let request = router.client.request(method, router.url("/replicas")).bearer_auth("admin");
        let answer = request.json(&json!({"url": replica.base})).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    };
    let changes = async {
        for _ in 0..2 {
            change(reqwest::Method::POST, &second).await;
            until_it_works(&router, &second).await;
            change(reqwest::Method::DELETE, &first).await;
            first.until_idle().await;
            change(reqwest::Method::POST, &first).await;
            until_it_works(&router, &first).await;
            change(reqwest::Method::DELETE, &second).await;
            second.until_idle().await;
        }
    };
    let (statuses, ()) = ask_until(&router, 4, changes).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}\n{}", router.log());
    assert_eq!(
        router.metric("servelab_router_retries_total").await,
        Some(0.0),
        "what a removed one has ends there"
    );
}

#[tokio::test]
async fn when_all_replicas_die_at_work_the_next_one_answers_what_they_had() {
    let (mut one, mut other) = tokio::join!(replica(), replica());
    let router = router(&[&one.base, &other.base], &[]).await;
    until_ready(&router, 2).await;
    let port = one.base.rsplit(':').next().unwrap().to_owned();
    let dying = async {
        until_it_works(&router, &one).await;
        until_it_works(&router, &other).await;
        for replica in [&mut one, &mut other] {
            replica.signal("KILL");
            replica.ended().await;
        }
        router
            .until("all are held", async || router.metric("servelab_router_requests_held").await > Some(0.0))
            .await;
        let mut command = servelab(&["serve", "--port", &port]);
        command.args(REPLICA);
        Server::spawn(command)
    };
    let (statuses, _back) = tokio::join!(ask_all(&router, 12), dying);
    assert_eq!(statuses, [200; 12], "{}", router.log());
}

/// Its machine answers for it, and the process does nothing: no connection breaks.
#[tokio::test]
async fn a_replica_that_freezes_keeps_no_request_that_waits() {
    let (frozen, other) = tokio::join!(replica(), replica());
    let flags = ["--health-timeout", "300ms"];
    let router = router(&[&frozen.base, &other.base], &flags).await;
    until_ready(&router, 2).await;
    let freezing = async {
        until_it_works(&router, &frozen).await;
        frozen.signal("STOP");
    };
    let (statuses, ()) = tokio::join!(ask_all(&router, 12), freezing);
    assert_eq!(statuses, [200; 12], "{}", router.log());
    frozen.signal("CONT");
    until_ready(&router, 2).await;
    frozen.until_idle().await;
}

#[tokio::test]
async fn a_request_waits_for_the_first_replica() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let router = router(&[&format!("http://127.0.0.1:{port}")], &[]).await;
    let starting = async {
        let held = async || router.metric("servelab_router_requests_held").await == Some(1.0);
        router.until("a request is held", held).await;
        let mut command = servelab(&["serve", "--port", &port.to_string()]);
        command.args(REPLICA);
        Server::spawn(command)
    };
    let body = body(1);
    let asked = tokio::time::timeout(PATIENCE, router.post("/v1/completions", &body));
    let (answer, _replica) = tokio::join!(asked, starting);
    assert_eq!(answer.unwrap().0, 200, "{}", router.log());
}

#[tokio::test]
async fn a_later_turn_goes_to_the_replica_that_holds_the_earlier_one() {
    let (one, other) = tokio::join!(replica(), replica());
    let router = router(&[&one.base, &other.base], &[]).await;
    until_ready(&router, 2).await;
    // Until it knows their tokens it matches by text, and forgets that when it does.
    for replica in [&one, &other] {
        until_parity(&router, replica, 1.0).await;
    }
    until_precise(&router).await;
    for conversation in 0..4 {
        let system = format!("Conversation {conversation}. ") + &"You answer in few words. ".repeat(12);
        let mut messages =
            json!([{"role": "system", "content": system}, {"role": "user", "content": "What is a block?"}]);
        let ask = async |messages: &Value| {
            let body = json!({"messages": messages, "max_tokens": 8, "temperature": 0});
            let request =
                router.client.post(router.url("/v1/chat/completions")).header("x-servelab-decision", "1");
            let answer = request.json(&body).send().await.unwrap();
            let decision = answer.headers()["x-servelab-decision"].to_str().unwrap().to_owned();
            (decision, answer.json::<Value>().await.unwrap())
        };
        let (first, answer) = ask(&messages).await;
        let list = messages.as_array_mut().unwrap();
        list.push(json!({"role": "assistant", "content": answer["choices"][0]["message"]["content"]}));
        list.push(json!({"role": "user", "content": "And a step?"}));
        let (second, answer) = ask(&messages).await;
        assert_eq!(first.split(';').next(), second.split(';').next(), "{first} then {second}");
        assert!(second.contains("reason=prefix"), "{second}");
        assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0, "{answer}");
    }
}

async fn until_parity(router: &Server, replica: &Server, value: f64) {
    let series = format!("servelab_router_token_parity{{replica=\"{}\"}}", replica.base);
    router.until("the canaries are back", async || router.metric(&series).await == Some(value)).await;
}

/// What replicas say they hold takes the place of what was guessed until then.
async fn until_precise(router: &Server) {
    let is_precise = async || {
        let all: Value = serde_json::from_str(&router.get("/replicas").await.1).unwrap();
        all["replicas"].as_array().unwrap().iter().all(|replica| replica["kv_events"] == "precise")
    };
    router.until("all replicas tell what they hold", is_precise).await;
}

/// Asks a chat and gives what the router expected to be there, and what the replica says was.
async fn predicted_and_confirmed(router: &Server, system: &str, question: &str) -> (String, u64) {
    let messages = json!([{"role": "system", "content": system}, {"role": "user", "content": question}]);
    let body = json!({"messages": messages, "max_tokens": 4, "temperature": 0});
    let request = router.client.post(router.url("/v1/chat/completions")).header("x-servelab-decision", "1");
    let answer = request.json(&body).send().await.unwrap();
    let decision = answer.headers()["x-servelab-decision"].to_str().unwrap().to_owned();
    let answer: Value = answer.json().await.unwrap();
    (decision, answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap())
}

#[tokio::test]
async fn with_token_parity_the_hits_predicted_are_those_confirmed() {
    let replica = replica().await;
    let router = router(&[&replica.base], &[]).await;
    until_ready(&router, 1).await;
    until_parity(&router, &replica, 1.0).await;
    until_precise(&router).await;
    let mut hits = 0;
    for number in 0..8 {
        let system =
            format!("You are number {}. ", number % 2) + &"Grüße, and answer in few words. ".repeat(7);
        let question = ["What is a block?", "What is a step, and why is it planned?"][number / 4];
        let (decision, cached) = predicted_and_confirmed(&router, &system, question).await;
        assert!(
            decision.contains(&format!("matched={cached}/")) && decision.contains("hashing=tokens"),
            "{decision} {cached}"
        );
        hits += cached;
    }
    assert!(hits > 0);
    for series in ["servelab_router_predicted_hit_tokens_total", "servelab_router_confirmed_hit_tokens_total"]
    {
        assert_eq!(router.metric(series).await, Some(hits as f64), "{series}");
    }
    assert_eq!(router.metric("servelab_router_token_count_mismatches_total").await, Some(0.0));
}

/// Fault 2 of the peers, with real processes: a router that was given another template than the replica has.
#[tokio::test]
async fn a_router_with_another_tokenizer_says_so_and_matches_by_text() {
    let folder = tempfile::tempdir().unwrap();
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/demo");
    std::fs::copy(format!("{demo}/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let replica = replica().await;
    let router = router(&[&replica.base], &["--tokenizer", folder.path().to_str().unwrap()]).await;
    until_ready(&router, 1).await;
    until_parity(&router, &replica, 0.0).await;
    assert!(router.log().contains("TOKEN PARITY LOST"), "{}", router.log());
    let system = "You answer in few words. ".repeat(12);
    predicted_and_confirmed(&router, &system, "What is a block?").await;
    let (decision, cached) = predicted_and_confirmed(&router, &system, "And a step?").await;
    assert!(decision.contains("hashing=text") && !decision.contains("matched=0/"), "{decision}");
    assert!(cached > 0);
}

#[tokio::test]
async fn the_router_drains_and_ends_with_0() {
    let replica = replica().await;
    let mut router = router(&[&replica.base], &[]).await;
    until_ready(&router, 1).await;
    let draining = async {
        router.until("it works", async || replica.engine_state().await["running"] != json!([])).await;
        router.signal("TERM");
    };
    let (statuses, ()) = tokio::join!(ask_all(&router, 4), draining);
    assert!(
        statuses.iter().all(|status| [200, 503].contains(status)) && statuses.contains(&200),
        "{statuses:?}"
    );
    assert!(router.ended().await.success());
}

#[test]
fn without_replicas_it_says_what_to_give() {
    let (code, _, errors) = crate::util::run(servelab(&["route"]));
    assert_eq!(code, 2);
    assert!(errors.contains("no replica is named; give --replica URL"), "{errors}");
}
