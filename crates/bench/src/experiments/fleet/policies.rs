//! The policies of the router one by one on the same conversations, all of which share their first block.

use servelab_sim::numbers::seconds;

use super::{Outcome, simulate_one};
use crate::experiments::ExperimentError;
use crate::experiments::lab::Lab;
use crate::experiments::measurement::PredictionKind;
use crate::ledger::Unit;

/// Policy, and the keys of its hit rate and its TTFT.
const POLICIES: [(&str, &str, &str); 4] = [
    ("longest_prefix", "longest_prefix_hits", "longest_prefix_ttft_seconds"),
    ("round_robin", "round_robin_hits", "round_robin_ttft_seconds"),
    ("least_requests", "least_requests_hits", "least_requests_ttft_seconds"),
    ("cost", "cost_hits", "cost_ttft_seconds"),
];
/// Sees into every cache: no router finds more.
const ORACLE: &str = "oracle";

pub async fn run(lab: &mut Lab<'_>) -> Result<(), ExperimentError> {
    let (hits, _) = route(lab, ORACLE).await?;
    let mut said = Vec::new();
    for (policy, key, _) in POLICIES {
        let because = "the same cost with a look into every cache".to_owned();
        said.push(lab.predict(
            key,
            format!("hit rate of {policy}"),
            Unit::Share,
            PredictionKind::Ceiling,
            hits,
            because,
        ));
    }
    for (said, (policy, _, ttft_key)) in said.into_iter().zip(POLICIES) {
        let (hits, outcome) = route(lab, policy).await?;
        let ttft = Outcome::percentiles(outcome.ttft_seconds)?;
        let lost = outcome.requests - outcome.completed;
        let note = (lost > 0).then(|| format!("{lost} of {} requests were refused", outcome.requests));
        lab.found(said, hits, None, note);
        let said = Lab::unpredicted(ttft_key, format!("p95 TTFT of {policy}"), Unit::Seconds);
        lab.found(said, ttft.p95, None, Some(format!("p50 {}", seconds(ttft.p50))));
    }
    Ok(())
}

async fn route(lab: &mut Lab<'_>, policy: &str) -> Result<(f64, Outcome), ExperimentError> {
    lab.progress(policy);
    let load = ["--replicas", "8", "--workload", "mooncake-conversation", "--rate", "8", "--duration", "10m"];
    let outcome = simulate_one(lab, &[&load[..], &["--policy", policy]].concat()).await?;
    let hits = outcome.hit_rate.ok_or(ExperimentError::NotUnderstood("a hit rate"))?;
    Ok((hits, outcome))
}
