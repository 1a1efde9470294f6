//! A server with an exact schedule writes down when it sent each token. The client's error is the distance between
//! what it measured and what the server wrote down, so that a busy machine, which makes the server itself late, does
//! not count against the client.
//!
//! The server notes the time before and after each write, and the packet arrives in between: wherever its thread is
//! interrupted, the true time lies in that interval. An error is what lies outside of it.
//!
//! The kernel tells one time for each read, that of the last packet in it. A client that does not get a processor
//! until the next token of a stream has come finds both in one read, and can tell no better; the gap of nothing between
//! two tokens that were sent apart shows it. A run on a machine that is as busy as that is repeated.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::measure::{Tally, littles_law};
use servelab_bench::result::{ArrivalClock, RequestRecord};
use servelab_bench::run::{LoadShape, RunLog};
use servelab_bench::stats::{mean, percentile};
use tokio_util::sync::CancellationToken;

use crate::server::{HEAD, last_token_and_usage, measure, plan, serve, timeouts, token};

/// When a token was sent: not before the first, not after the second.
type Sent = (Instant, Instant);
/// Tokens of each request, by its `max_tokens`.
type Log = Arc<Mutex<HashMap<u32, Vec<Sent>>>>;

/// Answers with `tokens` tokens, the first `ttft` after the request came in and the others `itl` apart.
fn exact(ttft: Duration, itl: Duration, tokens: u32) -> (std::net::SocketAddr, Log) {
    let log = Log::default();
    let server_log = log.clone();
    let address = serve(move |conversation| {
        let received = Instant::now();
        let mut sent = Vec::new();
        for at in 0..tokens {
            let due = received + ttft + at * itl;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let head = if at == 0 { HEAD } else { "" };
            let text = if at + 1 < tokens { token() } else { last_token_and_usage(tokens) };
            let before = Instant::now();
            conversation.send(&format!("{head}{text}"));
            sent.push((before, Instant::now()));
        }
        server_log.lock().unwrap().insert(conversation.max_tokens, sent);
    });
    (address, log)
}

/// What was measured, and the bounds between which it must lie.
#[derive(Default)]
struct Compared {
    measured: Vec<f64>,
    least: Vec<f64>,
    most: Vec<f64>,
}

impl Compared {
    fn push(&mut self, measured: f64, least: f64, most: f64) {
        self.measured.push(1000.0 * measured);
        self.least.push(1000.0 * least);
        self.most.push(1000.0 * most);
    }

    /// Mean within 2 ms, percentiles within 3 ms.
    fn check(mut self, what: &str) {
        for values in [&mut self.measured, &mut self.least, &mut self.most] {
            values.sort_by(f64::total_cmp);
        }
        self.within(&format!("mean {what}"), mean, 2.0);
        for percent in [50.0, 90.0, 99.0] {
            self.within(&format!("p{percent} {what}"), |values| percentile(values, percent), 3.0);
        }
    }

    fn within(&self, what: &str, of: impl Fn(&[f64]) -> f64, tolerance_ms: f64) {
        let (got, least, most) = (of(&self.measured), of(&self.least), of(&self.most));
        assert!(
            got >= least - tolerance_ms && got <= most + tolerance_ms,
            "{what} is {got:.3} ms; the server's own is between {least:.3} and {most:.3}"
        );
    }
}

/// What the server wrote down of all these requests. It does so after the last write of each, which the client may
/// be ahead of.
async fn written_down(run: &RunLog, log: &Log) -> HashMap<u32, Vec<Sent>> {
    for _ in 0..2000 {
        let log = log.lock().unwrap().clone();
        if run.records.iter().all(|record| log.contains_key(&record.wanted_output_tokens)) {
            return log;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the server never ended its answers");
}

/// Whether two tokens were read at once that were sent more than the tolerance apart.
fn was_starved(run: &RunLog, log: &HashMap<u32, Vec<Sent>>) -> bool {
    run.records.iter().any(|record| {
        let sent = log[&record.wanted_output_tokens].windows(2);
        let mut pairs = record.gaps_micros.iter().zip(sent);
        pairs.any(|(gap, pair)| {
            *gap < 100 && pair[1].0.saturating_duration_since(pair[0].1) > Duration::from_millis(3)
        })
    })
}

/// TTFT from the schedule and the gaps, of client and server.
fn compare(run: &RunLog, log: &HashMap<u32, Vec<Sent>>) -> (Compared, Compared) {
    let (mut ttft, mut itl) = (Compared::default(), Compared::default());
    for record in &run.records {
        let sent = &log[&record.wanted_output_tokens];
        let since_scheduled = |at: Instant| run.clock.at(at).as_secs_f64() - record.scheduled_seconds;
        ttft.push(record.ttft_seconds().unwrap(), since_scheduled(sent[0].0), since_scheduled(sent[0].1));
        for (gap, pair) in record.gaps_micros.iter().zip(sent.windows(2)) {
            let least = pair[1].0.saturating_duration_since(pair[0].1).as_secs_f64();
            let most = pair[1].1.duration_since(pair[0].0).as_secs_f64();
            itl.push(f64::from(*gap) / 1e6, least, most);
        }
    }
    (ttft, itl)
}

/// Elsewhere the client's clock is that of its reads, and a busy machine makes those late.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn at_32_streams_the_client_measures_what_the_server_did() {
    let plan = plan(LoadShape::Closed { concurrency: 32, think_time: Duration::ZERO }, 96);
    let mut attempts = 0;
    let (run, log) = loop {
        let (address, log) = exact(Duration::from_millis(50), Duration::from_millis(10), 20);
        let run = measure(address, timeouts(), &plan, 1000, CancellationToken::new()).await;
        assert!(run.records.iter().all(RequestRecord::is_completed), "{:?}", run.records[0].outcome);
        let log = written_down(&run, &log).await;
        attempts += 1;
        if !was_starved(&run, &log) {
            break (run, log);
        }
        assert!(attempts < 20, "in none of {attempts} runs did the client get a processor in time");
    };
    assert_eq!(run.records.len(), 96);
    assert!(run.records.iter().all(|record| record.chunks == 20 && record.gaps_micros.len() == 19));
    assert_eq!(run.reads.as_ref().unwrap().clock(), ArrivalClock::Kernel);
    let (ttft, itl) = compare(&run, &log);
    assert!(ttft.measured.iter().all(|ms| *ms > 49.0), "no token can be there before it was sent");
    ttft.check("TTFT");
    itl.check("ITL");
    let law = littles_law(&run);
    assert!(law.holds, "{law:?}");
    let metrics = Tally::of(&run.records, None).metrics();
    assert_eq!(metrics.total_output_tokens, 96 * 20);
}

/// Requests are due at 200 a second and 4 may be in flight, each for some 50 ms: most wait in the client. Who
/// counts from the schedule sees what a user would; who counts from sending sees a server at its best. Answers have one
/// token, so that no read holds two.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn under_overload_the_schedule_tells_the_truth_and_sending_does_not() {
    let (address, log) = exact(Duration::from_millis(50), Duration::ZERO, 1);
    let arrivals = ArrivalShape::Constant { rate: 200.0 };
    let plan = plan(LoadShape::Open { arrivals, max_concurrency: Some(4) }, 100);
    let run = measure(address, timeouts(), &plan, 1000, CancellationToken::new()).await;
    assert!(run.records.len() == 100 && run.records.iter().all(RequestRecord::is_completed));
    let (ttft, _) = compare(&run, &written_down(&run, &log).await);
    ttft.check("TTFT under overload");
    let metrics = Tally::of(&run.records, None).metrics();
    // 100 requests at 4 every 50 ms take 1.25 s, and the last was due after 0.5 s.
    assert!(metrics.ttft_ms.p99 > 500.0, "{:?}", metrics.ttft_ms);
    assert!(metrics.ttft_from_send_ms.p99 < metrics.ttft_ms.p99 / 2.0, "{:?}", metrics.ttft_from_send_ms);
    assert!(metrics.client_queue_ms.p99 > 400.0, "{:?}", metrics.client_queue_ms);
    assert!(metrics.peak_in_flight <= 4);
}

/// Warm-up and cool-down surround the measured requests, and what is under way at the end is given up.
#[tokio::test]
async fn the_load_is_kept_up_around_the_measured_requests() {
    use servelab_bench::phases::{Extent, PhasePlan};
    use servelab_bench::result::{Outcome, Phase};
    let (address, _) = exact(Duration::from_millis(5), Duration::from_millis(1), 10);
    let mut plan = plan(LoadShape::Closed { concurrency: 8, think_time: Duration::from_millis(1) }, 0);
    plan.phases = PhasePlan { warm_up: Extent::Requests(8), measured: Extent::Requests(37), cool_down: true };
    let run = measure(address, timeouts(), &plan, 1000, CancellationToken::new()).await;
    let count = |phase| run.records.iter().filter(|record| record.phase == phase).count();
    assert_eq!((count(Phase::WarmUp), count(Phase::Measured)), (8, 37));
    assert!(count(Phase::CoolDown) > 0);
    assert!(!run.interrupted);
    let measured = run.records.iter().filter(|record| record.phase == Phase::Measured);
    assert!(measured.clone().all(RequestRecord::is_completed));
    let end = measured.map(|record| record.end_seconds).fold(0.0, f64::max);
    for record in run.records.iter().filter(|record| record.outcome == Outcome::Cut) {
        assert_eq!(record.phase, Phase::CoolDown);
        assert!(record.end_seconds >= end);
    }
}
