//! A long prompt beside others: an answer that is under way, and requests of one token that come while the prompt is
//! computed. Once with a budget that takes the prompt in a single step, once with a budget that cuts it in chunks.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use servelab_sim::numbers::{seconds, whole};

use super::ExperimentError;
use super::lab::{Lab, Said};
use super::measurement::PredictionKind;
use super::pace::{median, ttft};
use crate::client::{Client, Failure, Observed, Outgoing};
use crate::ledger::Unit;
use crate::live::Live;
use crate::stats;

const REPEATS: usize = 3;
/// Budget of a step that cuts the prompt.
const CHUNK_TOKENS: u32 = 64;
const SHORT_PROMPT: u32 = 16;
const ANSWER_TOKENS: u32 = 400;
/// Tokens of the answer that come before the long prompt does.
const UNDER_WAY: u64 = 16;
const PROBES: u32 = 24;
const MOST_PROMPT: u32 = 8192;
const PROMPT_SECONDS: f64 = 2.0;

/// What one run showed.
#[derive(Clone, Copy, Debug, Default)]
struct Suffered {
    /// Longest wait between two tokens of the answer.
    gap: f64,
    /// The usual one, before.
    usual_gap: f64,
    /// Worst TTFT of the small requests.
    probe: f64,
}

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    lab.replica(&[]).await?;
    let pace = lab.pace().await?;
    let least = ANSWER_TOKENS + SHORT_PROMPT;
    if lab.max_model_len() < least {
        return Err(ExperimentError::ShortContext { max_model_len: lab.max_model_len(), wanted: least });
    }
    let room = MOST_PROMPT.min(lab.max_model_len() - 1);
    let prompt = Lab::fitting(PROMPT_SECONDS, pace.prefill_seconds_per_token, 4 * CHUNK_TOKENS, room);
    let prefill = lab.prefill()?;
    let all = pace.mfu.prefill_seconds(prefill, 0, prompt);
    // The last chunk attends to the whole prompt.
    let last_chunk = pace.mfu.prefill_seconds(prefill, prompt - CHUNK_TOKENS, CHUNK_TOKENS);
    let part = last_chunk + pace.step_seconds;
    let mfu = pace.mfu;
    let in_one = format!("F5 of {} tokens at an MFU of {mfu}, in one step", whole(prompt.into()));
    let in_chunks = format!("F5 of the last {CHUNK_TOKENS} tokens at an MFU of {mfu}, and a decode step");
    let last = format!(
        "F5 of {} tokens at an MFU of {mfu}: the running prompt comes first in every step's budget",
        whole(prompt.into())
    );
    let gap_whole =
        said(lab, "gap_whole_seconds", "longest gap of an answer, prompt in one step", all, in_one.clone());
    let gap_chunked = said(lab, "gap_chunked_seconds", "the same, chunks of 64", part, in_chunks);
    let probe_whole =
        said(lab, "probe_whole_seconds", "worst TTFT of a small request, prompt in one step", all, in_one);
    let probe_chunked = said(lab, "probe_chunked_seconds", "the same, chunks of 64", all, last);
    let (budget, chunk) = ((prompt + CHUNK_TOKENS).to_string(), CHUNK_TOKENS.to_string());
    let at_once = measure(lab, &["--max-running", "32", "--max-batched-tokens", &budget], prompt).await?;
    let cut = measure(lab, &["--max-running", "32", "--max-batched-tokens", &chunk], prompt).await?;
    let usual = |suffered: Suffered| format!("usually {}; median of {REPEATS}", seconds(suffered.usual_gap));
    lab.found(gap_whole, at_once.gap, None, Some(usual(at_once)));
    lab.found(gap_chunked, cut.gap, None, Some(usual(cut)));
    lab.found(probe_whole, at_once.probe, None, None);
    lab.found(probe_chunked, cut.probe, None, None);
    Ok(())
}

fn said(lab: &mut Lab<'_>, key: &'static str, label: &str, value: f64, because: String) -> Said {
    lab.predict(key, label, Unit::Seconds, PredictionKind::Equal, value, because)
}

async fn measure(lab: &mut Lab<'_>, flags: &[&str], prompt: u32) -> Result<Suffered, ExperimentError> {
    lab.replica(flags).await?;
    let mut runs = Vec::new();
    for repeat in 1..=REPEATS {
        lab.progress(&format!("{}, repeat {repeat} of {REPEATS}", flags.join(" ")));
        runs.push(once(lab, prompt).await?);
    }
    let of = |part: fn(&Suffered) -> f64| median(&mut runs.iter().map(part).collect::<Vec<_>>());
    Ok(Suffered { gap: of(|run| run.gap), usual_gap: of(|run| run.usual_gap), probe: of(|run| run.probe) })
}

async fn once(lab: &mut Lab<'_>, prompt: u32) -> Result<Suffered, ExperimentError> {
    let request = |lab: &mut Lab<'_>, input, output| {
        let segment = lab.fresh(input);
        lab.write(vec![segment], output)
    };
    let answer = request(lab, SHORT_PROMPT, ANSWER_TOKENS)?;
    let long = request(lab, prompt, 1)?;
    let probes: Vec<Outgoing> =
        (0..PROBES).map(|_| request(lab, SHORT_PROMPT, 1)).collect::<Result<_, _>>()?;
    let pace = lab.pace().await?;
    let apart =
        Duration::from_secs_f64(f64::from(prompt) * pace.prefill_seconds_per_token / f64::from(PROBES));
    let client = &lab.running()?.client;
    let (live, mut victim) = (Live::default(), blank(client));
    let others = async {
        while live.view().deltas < UNDER_WAY {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        intrude(client, &long, &probes, apart).await
    };
    let ((), (long, worst_probe)) = tokio::try_join!(client.stream(&answer, &mut victim, &live), others)?;
    suffered(&victim, &long, worst_probe)
}

fn blank(client: &Client) -> Observed {
    Observed::scheduled(client.clock().now())
}

/// Sends the long prompt, and small requests until its first token is there. Returns what was seen of it, and the
/// worst TTFT of the others.
async fn intrude(
    client: &Client,
    long: &Outgoing,
    probes: &[Outgoing],
    apart: Duration,
) -> Result<(Observed, f64), Failure> {
    let live = Live::default();
    let ask = async |outgoing: &Outgoing| {
        let mut observed = blank(client);
        client.stream(outgoing, &mut observed, &live).await.map(|()| observed)
    };
    let mut long = pin!(ask(long));
    let (mut under_way, mut waits) = (FuturesUnordered::new(), Vec::new());
    let mut ticks = tokio::time::interval(apart.max(Duration::from_millis(1)));
    let mut next = probes.iter();
    let seen = loop {
        tokio::select! {
            seen = &mut long => break seen?,
            _ = ticks.tick(), if next.len() > 0 => under_way.extend(next.next().map(&ask)),
            Some(probe) = under_way.next() => waits.push(ttft(&probe?)),
        }
    };
    while let Some(probe) = under_way.next().await {
        waits.push(ttft(&probe?));
    }
    Ok((seen, waits.into_iter().fold(0.0, f64::max)))
}

fn suffered(answer: &Observed, long: &Observed, probe: f64) -> Result<Suffered, ExperimentError> {
    let (Some(mut at), Some(from), Some(until)) = (answer.first_token, long.sent, long.first_token) else {
        return Err(ExperimentError::DoesNotStand("an answer had no token".to_owned()));
    };
    // Tokens may come in pairs, so that the mean tells more of single gaps than their median.
    let (mut gap, mut before) = (Duration::ZERO, Vec::new());
    for micros in &answer.gaps_micros {
        let this = Duration::from_micros(u64::from(*micros));
        if at + this > from && at < until {
            gap = gap.max(this);
        } else if at < from {
            before.push(this.as_secs_f64());
        }
        at += this;
    }
    if at < until {
        return Err(ExperimentError::DoesNotStand(
            "the answer ended before the long prompt was computed".to_owned(),
        ));
    }
    Ok(Suffered { gap: gap.as_secs_f64(), usual_gap: stats::mean(&before), probe })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(sent: u64, first: u64, gaps: &[u32]) -> Observed {
        let mut observed = Observed::scheduled(Duration::ZERO);
        observed.sent = Some(Duration::from_millis(sent));
        observed.first_token = Some(Duration::from_millis(first));
        observed.gaps_micros = gaps.iter().map(|ms| 1000 * ms).collect();
        observed
    }

    /// A token each 10 ms from 100 ms on; a prompt sent at 125 ms makes one of them wait for 80 ms.
    #[test]
    fn the_gap_that_counts_is_that_during_the_prompt() {
        let long = observed(125, 200, &[]);
        let found = suffered(&observed(90, 100, &[10, 10, 80, 10, 10, 300]), &long, 0.5).unwrap();
        assert!((found.gap - 0.08).abs() < 1e-9 && (found.usual_gap - 0.01).abs() < 1e-9, "{found:?}");
        let early = suffered(&observed(90, 100, &[10, 10]), &long, 0.5).unwrap_err().to_string();
        assert!(early.contains("ended before"), "{early}");
    }
}
