//! From records to figures: which requests and tokens lie in the measured window, and what they say.
//!
//! The window goes from the first measured arrival to the end of the last measured request. Rates count whatever
//! arrived within it, whichever request it belongs to: warm-up and cool-down keep the server as busy at the edges of
//! the window as in its middle. A request counts by the share of its tokens that arrived within: with requests that
//! end together, which closed loops often have, counting ends would take in a whole batch too many or too few.
//! Latencies are those of the measured requests that completed.

use std::collections::BTreeMap;

use crate::result::{
    Bucket, ClientCheck, FailureCount, LittlesLaw, Metrics, Outcome, Phase, RequestRecord, Series, Slo,
};
use crate::run::RunLog;
use crate::stats::{distribution, mean, percentile, spread};

/// Client lag above that fails the run,
const MAX_LAG_MS: f64 = 5.0;
/// or above that share of the median TTFT.
const MAX_LAG_SHARE: f64 = 0.01;
/// How far the two sides of Little's law may be apart.
const LITTLE_TOLERANCE: f64 = 0.02;
/// The two sides look at the clock one after the other. That much of a request's time may lie in between, which matters
/// only where requests fail at once.
const LITTLE_SLACK_SECONDS: f64 = 1e-4;
/// About as many points as a plot is wide.
const MAX_BUCKETS: f64 = 200.0;

/// The measured window, in seconds; `None` if no measured request ended.
pub fn window(records: &[RequestRecord]) -> Option<(f64, f64)> {
    let measured =
        records.iter().filter(|record| record.phase == Phase::Measured && record.outcome != Outcome::Cut);
    measured.fold(None, |window: Option<(f64, f64)>, record| {
        let (start, end) = window.unwrap_or((f64::INFINITY, 0.0));
        Some((start.min(record.scheduled_seconds), end.max(record.end_seconds)))
    })
}

/// Everything that [`Metrics`] are made of; tallies of repeats can be added.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    seconds: f64,
    completed: u64,
    failed: u64,
    cut: u64,
    /// Requests of any phase, each by the share of its tokens that arrived within the window: all, those that
    /// completed, and those of them that kept the SLO.
    answered: f64,
    answered_whole: f64,
    answered_good: f64,
    has_slo: bool,
    measured_good: u64,
    input_tokens: f64,
    output_tokens: f64,
    prompt_tokens: u64,
    cached_tokens: u64,
    peak_tokens: f64,
    peak_in_flight: u32,
    in_flight_seconds: f64,
    without_gaps: u64,
    samples: Samples,
}

#[derive(Clone, Debug, Default)]
struct Samples {
    ttft: Vec<f64>,
    ttft_from_send: Vec<f64>,
    tpot: Vec<f64>,
    itl: Vec<f64>,
    e2el: Vec<f64>,
    send_lag: Vec<f64>,
    client_queue: Vec<f64>,
    connect: Vec<f64>,
    input: Vec<f64>,
    output: Vec<f64>,
}

impl Tally {
    /// Counts one repeat.
    pub fn of(records: &[RequestRecord], slo: Option<&Slo>) -> Self {
        let mut tally = Self { has_slo: slo.is_some(), ..Self::default() };
        for record in records.iter().filter(|record| record.phase == Phase::Measured) {
            tally.measured(record, slo);
        }
        if let Some(window) = window(records) {
            tally.seconds = window.1 - window.0;
            tally.window(records, window, slo);
        }
        tally
    }

    fn measured(&mut self, record: &RequestRecord, slo: Option<&Slo>) {
        match record.outcome {
            Outcome::Completed => self.completed += 1,
            Outcome::Failed { .. } => self.failed += 1,
            Outcome::Cut => self.cut += 1,
        }
        self.measured_good += u64::from(slo.is_some_and(|slo| slo.is_kept_by(record)));
        let samples = &mut self.samples;
        // Lag is the client's own, so that it counts for requests that failed as well.
        samples.send_lag.extend(record.send_lag_seconds());
        if !record.is_completed() {
            return;
        }
        samples.ttft.extend(record.ttft_seconds());
        samples.ttft_from_send.extend(record.ttft_from_send_seconds());
        samples.tpot.extend(record.tpot_seconds());
        samples.e2el.extend(record.e2el_seconds());
        samples.client_queue.push(record.due_seconds - record.scheduled_seconds);
        samples.connect.extend(record.connect_seconds);
        samples.itl.extend(record.gaps_micros.iter().map(|micros| f64::from(*micros) / 1e6));
        self.without_gaps += u64::from(lacks_gaps(record));
        if let Some(usage) = record.usage {
            samples.input.push(f64::from(usage.prompt_tokens));
            samples.output.push(f64::from(usage.completion_tokens));
            self.prompt_tokens += u64::from(usage.prompt_tokens);
            self.cached_tokens += u64::from(usage.cached_tokens);
        }
    }

    fn window(&mut self, records: &[RequestRecord], (start, end): (f64, f64), slo: Option<&Slo>) {
        let within = |at: f64| start <= at && at <= end;
        let tokens_per_delta = tokens_per_delta(records);
        let mut seconds = vec![0.0; (end - start).floor() as usize + 1];
        for record in records {
            if record.first_token_seconds.is_some_and(within) && !record.is_failed() {
                let tokens = record.usage.map_or(record.wanted_input_tokens, |usage| usage.prompt_tokens);
                self.input_tokens += f64::from(tokens);
            }
            let mut arrived = 0.0;
            for (at, tokens) in tokens(record, tokens_per_delta).filter(|(at, _)| within(*at)) {
                arrived += tokens;
                seconds[(at - start) as usize] += tokens;
            }
            self.output_tokens += arrived;
            // One that was given up would have had as many as were asked for.
            let whole = record.usage.map_or(record.wanted_output_tokens, |usage| usage.completion_tokens);
            self.answer(record, arrived / f64::from(whole.max(1)), slo);
        }
        self.peak_tokens = seconds.into_iter().fold(0.0, f64::max);
        let (mean, peak) = in_flight(records, start, end);
        self.in_flight_seconds = mean * (end - start);
        self.peak_in_flight = peak;
    }

    fn answer(&mut self, record: &RequestRecord, share: f64, slo: Option<&Slo>) {
        self.answered += share;
        if record.is_completed() {
            self.answered_whole += share;
            self.answered_good += if slo.is_some_and(|slo| slo.is_kept_by(record)) { share } else { 0.0 };
        }
    }

    /// Of the requests that arrived within the window, as many as of those whose end is known kept the SLO.
    fn good(&self) -> f64 {
        if self.answered_whole > 0.0 { self.answered * self.answered_good / self.answered_whole } else { 0.0 }
    }

    /// Adds another repeat of the same load.
    pub fn merge(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.completed += other.completed;
        self.failed += other.failed;
        self.cut += other.cut;
        self.answered += other.answered;
        self.answered_whole += other.answered_whole;
        self.answered_good += other.answered_good;
        self.has_slo |= other.has_slo;
        self.measured_good += other.measured_good;
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.peak_tokens = self.peak_tokens.max(other.peak_tokens);
        self.peak_in_flight = self.peak_in_flight.max(other.peak_in_flight);
        self.in_flight_seconds += other.in_flight_seconds;
        self.without_gaps += other.without_gaps;
        self.samples.merge(other.samples);
    }

    pub fn metrics(mut self) -> Metrics {
        let per_second = |amount: f64| if self.seconds > 0.0 { amount / self.seconds } else { 0.0 };
        let requests = self.completed + self.failed;
        let share = |part: u64| if requests > 0 { part as f64 / requests as f64 } else { 0.0 };
        let ms = |sample: &mut Vec<f64>| {
            sample.iter_mut().for_each(|seconds| *seconds *= 1000.0);
            distribution(sample)
        };
        let good = self.good();
        let samples = &mut self.samples;
        Metrics {
            duration_seconds: self.seconds,
            requests,
            completed: self.completed,
            failed: self.failed,
            cut: self.cut,
            request_throughput: per_second(self.answered),
            input_throughput: per_second(self.input_tokens),
            output_throughput: per_second(self.output_tokens),
            total_token_throughput: per_second(self.input_tokens + self.output_tokens),
            request_goodput: self.has_slo.then(|| per_second(good)),
            slo_attainment: self.has_slo.then(|| share(self.measured_good)),
            total_input_tokens: self.input_tokens.round() as u64,
            total_output_tokens: self.output_tokens.round() as u64,
            prompt_tokens: self.prompt_tokens,
            cached_prompt_tokens: self.cached_tokens,
            peak_output_tokens_per_second: self.peak_tokens,
            peak_in_flight: self.peak_in_flight,
            mean_in_flight: per_second(self.in_flight_seconds),
            ttft_ms: ms(&mut samples.ttft),
            ttft_from_send_ms: ms(&mut samples.ttft_from_send),
            tpot_ms: ms(&mut samples.tpot),
            itl_ms: ms(&mut samples.itl),
            e2el_ms: ms(&mut samples.e2el),
            send_lag_ms: ms(&mut samples.send_lag),
            client_queue_ms: ms(&mut samples.client_queue),
            connect_ms: ms(&mut samples.connect),
            input_tokens: distribution(&mut samples.input),
            output_tokens: distribution(&mut samples.output),
            requests_without_gaps: self.without_gaps,
        }
    }
}

impl Samples {
    fn merge(&mut self, other: Self) {
        self.ttft.extend(other.ttft);
        self.ttft_from_send.extend(other.ttft_from_send);
        self.tpot.extend(other.tpot);
        self.itl.extend(other.itl);
        self.e2el.extend(other.e2el);
        self.send_lag.extend(other.send_lag);
        self.client_queue.extend(other.client_queue);
        self.connect.extend(other.connect);
        self.input.extend(other.input);
        self.output.extend(other.output);
    }
}

fn lacks_gaps(record: &RequestRecord) -> bool {
    record.chunks > 1 && record.gaps_micros.is_empty()
}

/// Mean tokens behind a delta, from the usage of the requests that completed: what is assumed of those that were
/// given up before their usage came.
fn tokens_per_delta(records: &[RequestRecord]) -> f64 {
    let completed = records.iter().filter(|record| record.is_completed());
    let (tokens, deltas) = completed.fold((0.0, 0.0), |(tokens, deltas), record| {
        let usage = record.usage.unwrap_or_default();
        (tokens + f64::from(usage.completion_tokens), deltas + f64::from(record.chunks))
    });
    if deltas > 0.0 { tokens / deltas } else { 1.0 }
}

/// When tokens came and how many. A request that failed yields none.
fn tokens(record: &RequestRecord, assumed_per_delta: f64) -> impl Iterator<Item = (f64, f64)> {
    let counts = !record.is_failed() && record.first_token_seconds.is_some();
    let deltas = if counts { record.chunks } else { 0 };
    let per_delta = match record.usage {
        Some(usage) if deltas > 0 => f64::from(usage.completion_tokens) / f64::from(deltas),
        _ => assumed_per_delta,
    };
    let first = record.first_token_seconds.unwrap_or_default();
    let even = match (lacks_gaps(record), record.last_token_seconds) {
        (true, Some(last)) => (last - first) / f64::from(record.chunks - 1),
        _ => 0.0,
    };
    // Rounded gaps must not add up to more than there was.
    let last = record.last_token_seconds.unwrap_or(first);
    let gaps = &record.gaps_micros;
    let mut at = first;
    (0..deltas).map(move |delta| {
        if delta > 0 {
            at += gaps.get(delta as usize - 1).map_or(even, |micros| f64::from(*micros) / 1e6);
        }
        (at.min(last), per_delta)
    })
}

/// Mean and peak of the requests in flight between two points in time, from their records.
fn in_flight(records: &[RequestRecord], start: f64, end: f64) -> (f64, u32) {
    let mut steps: Vec<(f64, i32)> = Vec::with_capacity(2 * records.len());
    for record in records {
        if let Some(sent) = record.sent_seconds.filter(|sent| *sent < end && record.end_seconds > start) {
            steps.push((sent.max(start), 1));
            steps.push((record.end_seconds.min(end), -1));
        }
    }
    // At one moment a request leaves before another comes, as vLLM counts it.
    steps.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut count, mut peak, mut integral, mut last) = (0_i32, 0_i32, 0.0, start);
    for (at, step) in steps {
        integral += f64::from(count) * (at - last);
        last = at;
        count += step;
        peak = peak.max(count);
    }
    let mean = if end > start { integral / (end - start) } else { 0.0 };
    (mean, u32::try_from(peak).unwrap_or(0))
}

/// How often requests failed in which way, most frequent first.
pub fn failures(records: &[RequestRecord]) -> Vec<FailureCount> {
    let mut counts: BTreeMap<(_, Option<u16>), FailureCount> = BTreeMap::new();
    for record in records {
        let Outcome::Failed { class, status, message } = &record.outcome else { continue };
        let entry = counts.entry((*class, *status)).or_insert_with(|| FailureCount {
            class: *class,
            name: status.map_or_else(|| class.name().to_owned(), |code| format!("{}_{code}", class.name())),
            measured: 0,
            all: 0,
            example: message.clone(),
        });
        entry.all += 1;
        entry.measured += u64::from(record.phase == Phase::Measured);
    }
    let mut counts: Vec<FailureCount> = counts.into_values().collect();
    counts.sort_by_key(|count| std::cmp::Reverse(count.all));
    counts
}

/// Whether the client could follow.
pub fn client_check(log: &RunLog) -> ClientCheck {
    let measured = log.records.iter().filter(|record| record.phase == Phase::Measured);
    let mut lags: Vec<f64> = measured.clone().filter_map(RequestRecord::send_lag_seconds).collect();
    let mut ttfts: Vec<f64> =
        measured.filter(|record| record.is_completed()).filter_map(RequestRecord::ttft_seconds).collect();
    lags.sort_unstable_by(f64::total_cmp);
    ttfts.sort_unstable_by(f64::total_cmp);
    let lag = 1000.0 * percentile(&lags, 99.0);
    let ttft = 1000.0 * percentile(&ttfts, 50.0);
    let limit = if ttfts.is_empty() { MAX_LAG_MS } else { MAX_LAG_MS.min(MAX_LAG_SHARE * ttft) };
    let read_lag = log.reads.as_ref().map_or(0.0, |reads| 1000.0 * reads.lag.percentile(99.0).as_secs_f64());
    let bound = if log.reads.is_none() {
        // Offline there is no client that could be late: arrivals are taken in between two steps.
        None
    } else if lag > limit {
        let rule = if limit < MAX_LAG_MS { "1 % of the median TTFT" } else { "the bound" };
        Some(format!(
            "p99 of the lag from schedule to sending is {lag:.3} ms, more than {limit:.3} ms ({rule})"
        ))
    } else if read_lag > MAX_LAG_MS {
        Some(format!("p99 of the lag from arrival to reading is {read_lag:.3} ms, more than {MAX_LAG_MS} ms"))
    } else {
        None
    };
    ClientCheck {
        send_lag_p99_ms: lag,
        send_lag_limit_ms: limit,
        read_lag_p99_ms: read_lag,
        clock: log.reads.as_ref().map_or(crate::result::ArrivalClock::Step, |reads| reads.clock()),
        bound,
    }
}

/// The count kept live against the records, over the whole repeat.
pub fn littles_law(log: &RunLog) -> LittlesLaw {
    let seconds = log.live.now.as_secs_f64();
    let residences: Vec<f64> = log
        .records
        .iter()
        .filter_map(|record| record.sent_seconds.map(|sent| record.end_seconds - sent))
        .collect();
    if seconds <= 0.0 || residences.is_empty() {
        return LittlesLaw { holds: true, ..LittlesLaw::default() };
    }
    let rate = residences.len() as f64 / seconds;
    let rate_times_residence = rate * mean(&residences);
    let mean_in_flight = log.live.mean_in_flight;
    let deviation = (mean_in_flight - rate_times_residence).abs() / mean_in_flight.max(f64::MIN_POSITIVE);
    let apart_seconds = (mean_in_flight - rate_times_residence).abs() / rate;
    let holds = deviation <= LITTLE_TOLERANCE || apart_seconds <= LITTLE_SLACK_SECONDS;
    LittlesLaw { mean_in_flight, rate_times_residence, deviation, holds }
}

/// The repeat over time.
pub fn series(records: &[RequestRecord]) -> Series {
    let end = records.iter().map(|record| record.end_seconds).fold(0.0, f64::max);
    let width = round_width(end / MAX_BUCKETS);
    let count = (end / width).floor() as usize + 1;
    let mut buckets = vec![Bucket::default(); count];
    let mut ttfts = vec![Vec::new(); count];
    let mut gaps = vec![Vec::new(); count];
    let at = |seconds: f64| ((seconds / width) as usize).min(count - 1);
    let tokens_per_delta = tokens_per_delta(records);
    for record in records {
        buckets[at(record.scheduled_seconds)].arrived += 1;
        match record.outcome {
            Outcome::Completed => buckets[at(record.end_seconds)].completed += 1,
            Outcome::Failed { .. } => buckets[at(record.end_seconds)].failed += 1,
            Outcome::Cut => {}
        }
        if let (Some(first), Some(ttft)) = (record.first_token_seconds, record.ttft_seconds()) {
            ttfts[at(first)].push(1000.0 * ttft);
        }
        for (delta, (time, tokens)) in tokens(record, tokens_per_delta).enumerate() {
            buckets[at(time)].output_tokens += tokens;
            if let Some(micros) = delta.checked_sub(1).and_then(|gap| record.gaps_micros.get(gap)) {
                gaps[at(time)].push(f64::from(*micros) / 1000.0);
            }
        }
    }
    spread_in_flight(records, width, &mut buckets);
    for ((bucket, ttfts), gaps) in buckets.iter_mut().zip(&mut ttfts).zip(&mut gaps) {
        bucket.ttft_ms = spread(ttfts);
        bucket.itl_ms = spread(gaps);
    }
    Series { bucket_seconds: width, buckets }
}

fn spread_in_flight(records: &[RequestRecord], width: f64, buckets: &mut [Bucket]) {
    for record in records {
        let Some(sent) = record.sent_seconds else { continue };
        let (first, last) = ((sent / width) as usize, (record.end_seconds / width) as usize);
        for (at, bucket) in buckets.iter_mut().enumerate().take(last + 1).skip(first) {
            let (start, end) = (at as f64 * width, (at + 1) as f64 * width);
            bucket.mean_in_flight += (record.end_seconds.min(end) - sent.max(start)).max(0.0) / width;
        }
    }
}

/// The next of 0.1, 0.2, 0.5, 1, 2, 5, ... seconds.
fn round_width(seconds: f64) -> f64 {
    let mut width = 0.1;
    for factor in [2.0, 2.5, 2.0].into_iter().cycle() {
        if width >= seconds || !seconds.is_finite() {
            break;
        }
        width *= factor;
    }
    width
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Clock;
    use crate::live::{Live, LiveView};
    use crate::result::{FailureClass, UsageCounts};

    /// Scheduled at `at`, sent 1 ms later, first token after 0.1 s, `tokens` tokens every 10 ms.
    fn record(index: u64, phase: Phase, at: f64, tokens: u32) -> RequestRecord {
        let mut record = crate::run::blank(index, phase, Duration::from_secs_f64(at));
        let first = at + 0.1;
        let last = first + 0.01 * f64::from(tokens - 1);
        record.sent_seconds = Some(at + 0.001);
        record.first_token_seconds = Some(first);
        record.last_token_seconds = Some(last);
        record.end_seconds = last;
        record.gaps_micros = vec![10_000; tokens as usize - 1];
        record.wanted_output_tokens = tokens;
        record.chunks = tokens;
        record.usage = Some(UsageCounts { prompt_tokens: 50, completion_tokens: tokens, cached_tokens: 16 });
        record.outcome = Outcome::Completed;
        record
    }

    fn failed(mut record: RequestRecord, class: FailureClass, status: Option<u16>) -> RequestRecord {
        record.outcome = Outcome::Failed { class, status, message: "why".into() };
        record
    }

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-6 * expected.abs().max(1.0), "{got}, expected {expected}");
    }

    #[test]
    fn without_warm_up_the_figures_are_vllms() {
        let records: Vec<_> = (0..4).map(|i| record(i, Phase::Measured, i as f64, 11)).collect();
        let metrics = Tally::of(&records, None).metrics();
        close(metrics.duration_seconds, 3.2);
        assert_eq!((metrics.requests, metrics.completed, metrics.total_output_tokens), (4, 4, 44));
        close(metrics.request_throughput, 4.0 / 3.2);
        close(metrics.output_throughput, 44.0 / 3.2);
        close(metrics.total_token_throughput, (200.0 + 44.0) / 3.2);
        close(metrics.ttft_ms.mean, 100.0);
        close(metrics.ttft_from_send_ms.mean, 99.0);
        close(metrics.tpot_ms.mean, 10.0);
        close(metrics.itl_ms.median, 10.0);
        assert_eq!(metrics.itl_ms.count, 40);
        close(metrics.e2el_ms.mean, 200.0);
        close(metrics.mean_in_flight, 4.0 * 0.199 / 3.2);
        assert_eq!((metrics.prompt_tokens, metrics.cached_prompt_tokens), (200, 64));
        assert_eq!(metrics.request_goodput, None);
    }

    #[test]
    fn a_window_counts_all_that_happens_in_it_and_measures_only_its_own() {
        // The warm-up's tokens from 1.0 s on are within: its first comes at 0.9 s.
        let warm_up = record(0, Phase::WarmUp, 0.8, 21);
        let measured = record(1, Phase::Measured, 1.0, 11);
        let mut cool_down = record(2, Phase::CoolDown, 1.05, 100);
        cool_down.outcome = Outcome::Cut;
        cool_down.usage = None;
        let metrics = Tally::of(&[warm_up, measured, cool_down], None).metrics();
        close(metrics.duration_seconds, 0.2);
        assert_eq!((metrics.completed, metrics.requests, metrics.cut), (1, 1, 0));
        // 11 of the warm-up (1.00 to 1.10), 11 measured, 6 of the cool-down (1.15 to 1.20).
        assert_eq!(metrics.total_output_tokens, 28);
        close(metrics.request_throughput, (11.0 / 21.0 + 1.0 + 6.0 / 100.0) / 0.2);
        assert_eq!(metrics.ttft_ms.count, 1);
    }

    /// Four clients in step, 4 requests every 0.2 s. The first measured request arrives a moment before the others of
    /// the warm-up end, so that three of them too many end within the window.
    #[test]
    fn requests_that_end_together_are_not_counted_twice() {
        let slo = Slo { limits: vec!["ttft=1s".parse().unwrap()] };
        let batch = |number: u64, phase| {
            (0..4).map(move |i| record(4 * number + i, phase, 0.2 * number as f64 + 1e-6 * i as f64, 11))
        };
        let records: Vec<RequestRecord> =
            (0..7).flat_map(|n| batch(n, if n == 0 { Phase::WarmUp } else { Phase::Measured })).collect();
        let metrics = Tally::of(&records, Some(&slo)).metrics();
        assert!((metrics.request_throughput - 20.0).abs() < 0.4, "{}", metrics.request_throughput);
        assert_eq!(metrics.request_goodput, Some(metrics.request_throughput));
    }

    #[test]
    fn failures_are_counted_by_class_and_stay_in_the_denominator() {
        let slo = Slo { limits: vec!["ttft=1s".parse().unwrap()] };
        let mut records = vec![record(0, Phase::Measured, 0.0, 5), record(1, Phase::Measured, 0.1, 5)];
        records.push(failed(record(2, Phase::Measured, 0.2, 5), FailureClass::Status, Some(429)));
        records.push(failed(record(3, Phase::WarmUp, 0.0, 5), FailureClass::Status, Some(429)));
        records.push(failed(record(4, Phase::Measured, 0.2, 5), FailureClass::Stall, None));
        let metrics = Tally::of(&records, Some(&slo)).metrics();
        assert_eq!((metrics.requests, metrics.completed, metrics.failed), (4, 2, 2));
        assert_eq!(metrics.slo_attainment, Some(0.5));
        assert_eq!(metrics.total_output_tokens, 10, "the tokens of failed requests do not count");
        let failures = failures(&records);
        assert_eq!(failures[0].name, "status_429");
        assert_eq!((failures[0].measured, failures[0].all), (1, 2));
        assert_eq!((failures[1].name.as_str(), failures[1].all), ("stall", 1));
    }

    #[test]
    fn a_delta_of_several_tokens_counts_as_many() {
        let mut speculated = record(0, Phase::Measured, 0.0, 5);
        speculated.usage = Some(UsageCounts { completion_tokens: 15, ..UsageCounts::default() });
        let metrics = Tally::of(&[speculated], None).metrics();
        assert_eq!(metrics.total_output_tokens, 15);
        close(metrics.tpot_ms.mean, 40.0 / 14.0);
        assert_eq!(metrics.itl_ms.count, 4);
    }

    #[test]
    fn gaps_that_were_not_kept_are_spread_and_told() {
        let mut long = record(0, Phase::Measured, 0.0, 101);
        long.gaps_micros = Vec::new();
        let metrics = Tally::of(&[long], None).metrics();
        assert_eq!((metrics.total_output_tokens, metrics.requests_without_gaps), (101, 1));
        assert_eq!(metrics.itl_ms.count, 0);
        close(metrics.tpot_ms.mean, 10.0);
    }

    #[test]
    fn repeats_are_pooled() {
        let mut tally = Tally::of(&[record(0, Phase::Measured, 0.0, 11)], None);
        tally.merge(Tally::of(&[record(0, Phase::Measured, 0.0, 31)], None));
        let metrics = tally.metrics();
        close(metrics.duration_seconds, 0.2 + 0.4);
        close(metrics.output_throughput, 42.0 / 0.6);
        assert_eq!((metrics.completed, metrics.itl_ms.count), (2, 40));
    }

    #[test]
    fn nothing_measured_is_all_zero() {
        let metrics = Tally::of(&[record(0, Phase::WarmUp, 0.0, 5)], None).metrics();
        assert_eq!((metrics.requests, metrics.output_throughput, metrics.duration_seconds), (0, 0.0, 0.0));
        assert_eq!(Tally::of(&[], None).metrics(), Metrics::default());
    }

    #[test]
    fn the_series_adds_up_to_the_whole() {
        let records: Vec<_> = (0..50).map(|i| record(i, Phase::Measured, 0.3 * i as f64, 20)).collect();
        let series = series(&records);
        assert_eq!(series.bucket_seconds, 0.1);
        let sum = |of: fn(&Bucket) -> f64| series.buckets.iter().map(of).sum::<f64>();
        close(sum(|bucket| f64::from(bucket.arrived)), 50.0);
        close(sum(|bucket| f64::from(bucket.completed)), 50.0);
        close(sum(|bucket| bucket.output_tokens), 1000.0);
        close(0.1 * sum(|bucket| bucket.mean_in_flight), 50.0 * (0.1 + 0.19 - 0.001));
        assert!(
            series.buckets.iter().flat_map(|bucket| bucket.itl_ms).all(|itl| (itl.p99 - 10.0).abs() < 1e-9)
        );
    }

    fn log(records: Vec<RequestRecord>, live: LiveView) -> RunLog {
        let reads = Some(crate::client::ReadStats::default());
        RunLog { records, live, reads, interrupted: false, clock: Clock::start() }
    }

    #[test]
    fn littles_law_holds_for_an_honest_count_and_not_for_one_that_lost_a_request() {
        let records: Vec<_> = (0..20).map(|i| record(i, Phase::Measured, 0.05 * i as f64, 20)).collect();
        let honest = Live::default();
        let mut steps: Vec<(f64, bool)> =
            records.iter().flat_map(|r| [(r.sent_seconds.unwrap(), true), (r.end_seconds, false)]).collect();
        steps.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (at, sent) in steps {
            let at = Duration::from_secs_f64(at);
            if sent { honest.sent(at) } else { honest.ended(at, Duration::ZERO, Some(true)) }
        }
        let mut log = log(records, honest.view());
        let law = littles_law(&log);
        assert!(law.holds && law.deviation < 1e-6, "{law:?}");
        log.records.pop();
        assert!(!littles_law(&log).holds);
    }

    /// A request that failed within 20 us, of which the live count saw 10 us more.
    #[test]
    fn littles_law_leaves_room_for_two_looks_at_the_clock() {
        let mut record = failed(record(0, Phase::Measured, 0.0, 5), FailureClass::Unreachable, None);
        record.sent_seconds = Some(100e-6);
        record.end_seconds = 120e-6;
        let live = Live::default();
        live.sent(Duration::from_micros(95));
        live.ended(Duration::from_micros(125), Duration::ZERO, Some(false));
        let law = littles_law(&log(vec![record], live.view()));
        assert!(law.holds && law.deviation > 0.02, "{law:?}");
    }

    #[test]
    fn a_client_that_sends_late_is_bound() {
        // TTFT is 100 ms, so that 1 ms of lag is the bound: exactly kept.
        let records: Vec<_> = (0..20).map(|i| record(i, Phase::Measured, i as f64, 5)).collect();
        let mut log = log(records, LiveView::default());
        let check = client_check(&log);
        close(check.send_lag_limit_ms, 1.0);
        for record in &mut log.records {
            record.sent_seconds = Some(record.due_seconds + 0.0011);
        }
        let check = client_check(&log);
        assert!(check.bound.as_ref().is_some_and(|why| why.contains("1 % of the median TTFT")), "{check:?}");
        for record in &mut log.records {
            record.first_token_seconds = record.first_token_seconds.map(|first| first + 10.0);
            record.sent_seconds = Some(record.due_seconds + 0.0051);
        }
        let check = client_check(&log);
        close(check.send_lag_limit_ms, 5.0);
        assert!(check.bound.is_some(), "{check:?}");
    }

    #[test]
    fn bucket_widths_are_round() {
        for (seconds, width) in [(0.0, 0.1), (0.11, 0.2), (0.3, 0.5), (0.6, 1.0), (3.0, 5.0), (7.0, 10.0)] {
            close(round_width(seconds), width);
        }
    }
}
