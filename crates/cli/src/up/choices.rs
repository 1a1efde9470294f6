//! What the router chose last, summed up by replica.

use std::collections::BTreeMap;

use serde::Deserialize;

/// What `GET /decisions` answers, as far as it is needed here.
#[derive(Debug, Default, Deserialize)]
pub struct Decisions {
    pub decisions: Vec<Decision>,
}

#[derive(Debug, Deserialize)]
pub struct Decision {
    replica: String,
    reason: String,
    prompt_tokens: u64,
    matched_tokens: u64,
}

#[derive(Debug, Default)]
struct Sum {
    requests: usize,
    prompt_tokens: u64,
    matched_tokens: u64,
    reasons: BTreeMap<String, usize>,
}

/// A line for each replica; empty if nothing was chosen. `names` are the replicas' names by their addresses.
pub fn lines(decisions: &Decisions, names: &BTreeMap<String, String>) -> Vec<String> {
    let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
    for decision in &decisions.decisions {
        let name = names.get(&decision.replica).unwrap_or(&decision.replica);
        let sum = sums.entry(name).or_default();
        sum.requests += 1;
        sum.prompt_tokens += decision.prompt_tokens;
        sum.matched_tokens += decision.matched_tokens;
        *sum.reasons.entry(decision.reason.clone()).or_default() += 1;
    }
    let all = decisions.decisions.len();
    let line = |(name, sum): (&str, Sum)| {
        let share = |part: f64, whole: f64| 100.0 * part / whole.max(1.0);
        let hits = share(sum.matched_tokens as f64, sum.prompt_tokens as f64);
        let requests = share(sum.requests as f64, all as f64);
        let reasons: Vec<String> =
            sum.reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        format!(
            "{name:<12}{:>6} requests ({requests:.0} %), {hits:.0} % of their prompt tokens expected there; {}",
            sum.requests,
            reasons.join(", ")
        )
    };
    sums.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_summed_by_replica() {
        let json = r#"{"decisions": [
            {"replica": "http://a:1", "reason": "prefix", "prompt_tokens": 100, "matched_tokens": 96, "table": []},
            {"replica": "http://a:1", "reason": "load", "prompt_tokens": 100, "matched_tokens": 0},
            {"replica": "http://b:1", "reason": "load", "prompt_tokens": 50, "matched_tokens": 0},
            {"replica": "http://a:1", "reason": "prefix", "prompt_tokens": 0, "matched_tokens": 0}]}"#;
        let decisions: Decisions = serde_json::from_str(json).unwrap();
        let names = BTreeMap::from([("http://a:1".to_owned(), "replica 1".to_owned())]);
        assert_eq!(
            lines(&decisions, &names),
            [
                "http://b:1       1 requests (25 %), 0 % of their prompt tokens expected there; load 1",
                "replica 1        3 requests (75 %), 48 % of their prompt tokens expected there; load 1, prefix 2",
            ]
        );
        assert!(lines(&Decisions::default(), &names).is_empty());
    }
}
