//! Routers that count together in a real Redis, and what they do while it is away.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use futures::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use servelab_router::RouterOptions;
use servelab_router::limits::KeyLimits;
use servelab_router::limits::bucket::Bucket;
use servelab_router::limits::redis::{Away, RedisOptions, SCRIPT};

use crate::redis_server::{self, RedisServer};
use crate::util::{Backend, Behaviour, PATIENCE, Routed, options, until};

const AWAY: &str = "servelab_router_limits_redis_away_total";

/// A router with these limits, which waits for Redis as long as a busy machine may need.
fn sharing(backend: &Backend, redis: &RedisServer, away: Away, limits: KeyLimits) -> RouterOptions {
    let address = redis.url().parse().unwrap();
    RouterOptions {
        anonymous_limits: limits,
        limits_redis: Some(RedisOptions { address, timeout: Duration::from_secs(5), away }),
        ..options(&[backend])
    }
}

fn requests(per_minute: u64) -> KeyLimits {
    KeyLimits { requests_per_minute: Some(per_minute), tokens_per_minute: None }
}

fn tokens(per_minute: u64) -> KeyLimits {
    KeyLimits { requests_per_minute: None, tokens_per_minute: Some(per_minute) }
}

async fn ask(routed: &Routed) -> reqwest::Response {
    routed.ask(false).send().await.unwrap()
}

async fn status(routed: &Routed) -> u16 {
    ask(routed).await.status().as_u16()
}

/// Fault 9 of the peers: the limit of a key, times the number of routers.
#[tokio::test]
async fn fault_9_limits_are_not_multiplied_by_the_number_of_routers() {
    if redis_server::is_missing() {
        return;
    }
    let (backend, redis) = (Backend::start(Behaviour::Answer), RedisServer::start());
    let start = async || Routed::start(sharing(&backend, &redis, Away::Refuse, requests(20)), 1).await;
    let (one, other) = tokio::join!(start(), start());
    let began = Instant::now();
    let statuses = join_all((0..60).map(|number| status(if number % 2 == 0 { &one } else { &other }))).await;
    // What flowed in meanwhile may have been used too.
    let most = 20 + (began.elapsed().as_secs_f64() / 3.0).ceil() as usize;
    let answered = statuses.iter().filter(|status| **status == 200).count();
    assert!((20..=most).contains(&answered), "{answered} were answered");
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    let refused = one.metric("servelab_router_limited_total{limit=\"requests\"}").await
        + other.metric("servelab_router_limited_total{limit=\"requests\"}").await;
    assert_eq!(refused, (60 - answered) as f64);
    assert_eq!((one.metric(AWAY).await, other.metric(AWAY).await), (0.0, 0.0));
}

#[tokio::test]
async fn tokens_are_reserved_at_one_router_and_what_was_not_used_is_there_at_the_other() {
    if redis_server::is_missing() {
        return;
    }
    let (backend, redis) = (Backend::start(Behaviour::Answer), RedisServer::start());
    let start = async || Routed::start(sharing(&backend, &redis, Away::Refuse, tokens(300)), 1).await;
    let (one, other) = tokio::join!(start(), start());
    let ask = async |routed: &Routed, max_tokens: u32| {
        let body = json!({"prompt": "x", "max_tokens": max_tokens});
        routed.client.post(format!("{}/v1/completions", routed.base)).json(&body).send().await.unwrap()
    };
    let first = ask(&one, 299).await;
    assert_eq!(first.status().as_u16(), 200);
    assert_eq!(first.headers()["x-ratelimit-limit-tokens"], "300");
    // 25 of 300 were used; the rest comes back a moment after the answer.
    until(async || ask(&other, 200).await.status().as_u16() == 200).await;
    let refused = ask(&other, 5000).await;
    assert_eq!((refused.status().as_u16(), refused.headers().get("retry-after")), (429, None));
    let message = refused.json::<Value>().await.unwrap()["error"]["message"].to_string();
    assert!(message.contains("lower max_tokens"), "{message}");
    assert_eq!(one.metric("servelab_router_limits_redis_unsettled_total").await, 0.0);
}

/// Away, each router has the limit for itself; back, they share it again. Nobody is started anew.
#[tokio::test]
async fn when_redis_is_killed_under_load_routers_count_for_themselves_until_it_is_back() {
    if redis_server::is_missing() {
        return;
    }
    let (backend, redis) = (Backend::start(Behaviour::Answer), RedisServer::start());
    let port = redis.port;
    let routed = Routed::start(sharing(&backend, &redis, Away::Local, requests(1_000_000)), 1).await;
    let killing = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(redis);
    };
    let load = async {
        let began = Instant::now();
        while routed.metric(AWAY).await < 50.0 {
            let statuses = join_all((0..8).map(|_| status(&routed))).await;
            assert_eq!(statuses, [200; 8]);
            assert!(began.elapsed() < PATIENCE, "nobody noticed");
        }
    };
    tokio::join!(load, killing);
    let back = RedisServer::on(port);
    until(async || {
        assert_eq!(status(&routed).await, 200);
        back.keys().contains(&"servelab:limits:anonymous".to_owned())
    })
    .await;
    let away = routed.metric(AWAY).await;
    assert_eq!(join_all((0..8).map(|_| status(&routed))).await, [200; 8]);
    assert_eq!(routed.metric(AWAY).await, away, "it is asked again");
}

#[tokio::test]
async fn while_redis_is_away_requests_are_counted_here_refused_or_let_through_as_asked() {
    if redis_server::is_missing() {
        return;
    }
    let backend = Backend::start(Behaviour::Answer);
    for (away, statuses) in
        [(Away::Local, [200, 200, 429]), (Away::Refuse, [503, 503, 503]), (Away::Allow, [200, 200, 200])]
    {
        let redis = RedisServer::start();
        let options = sharing(&backend, &redis, away, requests(2));
        drop(redis);
        let routed = Routed::start(options, 1).await;
        let mut told = Vec::new();
        for _ in 0..3 {
            told.push(status(&routed).await);
        }
        assert_eq!((told.as_slice(), routed.metric(AWAY).await), (statuses.as_slice(), 3.0), "{away:?}");
        if away == Away::Refuse {
            let refused = ask(&routed).await;
            assert_eq!(refused.headers()["retry-after"], "1");
            assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "limits_unavailable");
            assert_eq!(routed.metric("servelab_router_limited_total{limit=\"away\"}").await, 4.0);
        }
    }
}

/// Stopped in the middle: connections stand, and nothing comes back. Of the requests that are there only those wait that
/// were sent before it was noticed, and no longer than the time-out.
#[tokio::test]
async fn a_redis_that_stands_still_is_waited_for_once_and_not_by_every_request() {
    if redis_server::is_missing() {
        return;
    }
    let (backend, redis) = (Backend::start(Behaviour::Answer), RedisServer::start());
    let mut options = sharing(&backend, &redis, Away::Local, requests(1_000_000));
    options.limits_redis.as_mut().unwrap().timeout = Duration::from_secs(2);
    let routed = Routed::start(options, 1).await;
    assert_eq!((status(&routed).await, routed.metric(AWAY).await), (200, 0.0));
    redis.signal("STOP");
    let began = Instant::now();
    for _ in 0..50 {
        assert_eq!(status(&routed).await, 200);
    }
    // Fifty that each waited would take 100 s.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(40), "{took:?}");
    assert_eq!(routed.metric(AWAY).await, 50.0);
    redis.signal("CONT");
    until(async || {
        let before = routed.metric(AWAY).await;
        status(&routed).await == 200 && routed.metric(AWAY).await == before
    })
    .await;
}

#[tokio::test]
async fn keys_leave_redis_when_their_buckets_are_full_again() {
    if redis_server::is_missing() {
        return;
    }
    let (backend, redis) = (Backend::start(Behaviour::Answer), RedisServer::start());
    let routed = Routed::start(sharing(&backend, &redis, Away::Refuse, requests(60)), 1).await;
    assert_eq!(status(&routed).await, 200);
    assert!(redis.keys().contains(&"servelab:limits:anonymous".to_owned()), "{:?}", redis.keys());
    until(async || redis.keys().is_empty()).await;
}

/// The script and the bucket in this process, side by side: any take and any settlement, at any time, on whole seconds,
/// where both can count exactly.
#[test]
fn the_script_decides_as_the_bucket_in_this_process_does() {
    if redis_server::is_missing() {
        return;
    }
    let redis = RedisServer::start();
    let connection = RefCell::new(redis.connection());
    // The clock is the test's in place of that of Redis, and no key goes by that of Redis either.
    let replaced = [("redis.call('TIME')", "{ARGV[6], '0'}"), ("math.ceil(full) + 1000", "3600000")];
    let script = replaced.iter().fold(SCRIPT.to_owned(), |script, (from, to)| {
        assert_eq!(script.matches(from).count(), 1, "{from}");
        script.replace(from, to)
    });
    let script = redis::Script::new(&script);
    let operations = prop::collection::vec((0_u64..40, any::<bool>(), -80_i64..200), 1..60);
    let cases = Cell::new(0);
    let all = (1_u64..20, 1_u64..20, operations);
    let mut runner = TestRunner::new(Config { cases: 48, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&all, |(requests, tokens, operations)| {
        let (requests, tokens) = (60 * requests, 60 * tokens);
        cases.set(cases.get() + 1);
        let mut now = Duration::from_secs(1_000_000);
        let mut buckets = [Bucket::new(requests, now), Bucket::new(tokens, now)];
        for (seconds, settles, amount) in operations {
            now += Duration::from_secs(seconds);
            // A take is never of less than nothing.
            let amount = if settles { amount } else { amount.abs() };
            let wanted = [i64::from(!settles), amount];
            let (short, left_requests, left_tokens): (u8, f64, f64) = script
                .key(format!("case:{}", cases.get()))
                .arg(requests)
                .arg(tokens)
                .arg(wanted[0])
                .arg(wanted[1])
                .arg(if settles { "settle" } else { "take" })
                .arg(now.as_secs())
                .invoke(&mut *connection.borrow_mut())
                .unwrap();
            let lacks = |bucket: &mut Bucket, wanted: i64| {
                !bucket.level(now).wait(wanted.unsigned_abs()).is_some_and(|wait| wait.is_zero())
            };
            let [of_requests, of_tokens] = &mut buckets;
            let expected = match settles {
                true => 0,
                false if lacks(of_requests, wanted[0]) => 1,
                false if lacks(of_tokens, wanted[1]) => 2,
                false => 0,
            };
            if expected == 0 {
                for (bucket, wanted) in [(&mut *of_requests, wanted[0]), (&mut *of_tokens, wanted[1])] {
                    if wanted < 0 {
                        bucket.level(now);
                        bucket.give_back(wanted.unsigned_abs());
                    } else {
                        bucket.take(now, wanted.unsigned_abs());
                    }
                }
            }
            prop_assert_eq!(short, expected);
            let left = [of_requests.level(now).left, of_tokens.level(now).left];
            prop_assert_eq!([left_requests, left_tokens], left);
        }
        Ok(())
    });
    outcome.unwrap();
}
