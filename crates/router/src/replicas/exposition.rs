//! What the router reads of a replica's `/metrics`: Prometheus' text format, names as vLLM's after any prefix.

use std::time::Duration;

use crate::choice::load::Report;
use crate::choice::rates::Counters;

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Exposition {
    /// `None` unless running, waiting and the share of the cache were all there.
    pub report: Option<Report>,
    pub counters: Counters,
    /// Tokens per block of the KV cache.
    pub block_size: Option<u32>,
    /// Tokens that the KV cache holds.
    pub capacity_tokens: Option<u64>,
    /// When the process began, in seconds since the Unix epoch: another value is another process.
    pub process_start_seconds: Option<f64>,
}

#[derive(Default)]
struct Found {
    running: Option<f64>,
    waiting: Option<f64>,
    kv_usage: Option<f64>,
    prompt_tokens: f64,
    cached_tokens: f64,
}

/// Reads the text; lines that it does not know or cannot read are skipped. Series that differ in labels only are
/// added up, except the share of the cache, of which the largest counts. `at` is the caller's clock.
pub fn read(text: &str, prefixes: &[String], at: Duration) -> Exposition {
    let (mut found, mut read) = (Found::default(), Exposition::default());
    read.counters.at = at;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = sample(line) else { continue };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        if name == "process_start_time_seconds" {
            read.process_start_seconds = Some(value);
        }
        let Some(name) = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix.as_str())) else {
            continue;
        };
        let add = |sum: &mut Option<f64>| *sum = Some(sum.unwrap_or(0.0) + value);
        match name {
            "num_requests_running" => add(&mut found.running),
            "num_requests_waiting" => add(&mut found.waiting),
            "kv_cache_usage_perc" => found.kv_usage = Some(found.kv_usage.unwrap_or(0.0).max(value)),
            "prompt_tokens_total" => found.prompt_tokens += value,
            "prompt_tokens_cached_total" => found.cached_tokens += value,
            "request_prefill_time_seconds_sum" => read.counters.prefill_seconds += value,
            "inter_token_latency_seconds_sum" => read.counters.token_gap_seconds += value,
            "inter_token_latency_seconds_count" => read.counters.token_gaps += value,
            "cache_config_info" => {
                read.capacity_tokens = capacity(labels).or(read.capacity_tokens);
                let block_size = label(labels, "block_size").and_then(|size| u32::try_from(size).ok());
                read.block_size = block_size.filter(|size| *size > 0).or(read.block_size);
            }
            _ => {}
        }
    }
    read.counters.computed_prompt_tokens = found.prompt_tokens - found.cached_tokens;
    read.report = found.report();
    read
}

impl Found {
    fn report(&self) -> Option<Report> {
        // A float that is no count becomes 0 or the largest count.
        let (running, waiting) = (self.running? as u32, self.waiting? as u32);
        Some(Report { running, waiting, kv_usage: self.kv_usage? })
    }
}

/// The series and its value; labels may hold spaces, and a time stamp may follow.
fn sample(line: &str) -> Option<(&str, f64)> {
    let end = line.rfind('}').map_or_else(|| line.find(' '), |brace| Some(brace + 1))?;
    let value: f64 = line[end..].split_whitespace().next()?.parse().ok()?;
    value.is_finite().then_some((&line[..end], value))
}

fn capacity(labels: &str) -> Option<u64> {
    label(labels, "block_size")?.checked_mul(label(labels, "num_gpu_blocks")?)
}

fn label(labels: &str, name: &str) -> Option<u64> {
    let at = labels.find(&format!("{name}=\""))? + name.len() + 2;
    labels[at..].split('"').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes() -> Vec<String> {
        vec!["servelab_".into(), "vllm:".into()]
    }

    const TEXT: &str = r#"# HELP vllm:num_requests_running Sequences in the running batch.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a model, {odd}"} 3.0
vllm:num_requests_running{engine="1",model_name="a model, {odd}"} 4
vllm:num_requests_waiting{engine="0"} 2 1700000000000
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:prompt_tokens_total{} 1000
vllm:prompt_tokens_cached_total 400
vllm:request_prefill_time_seconds_sum 2.5
vllm:inter_token_latency_seconds_sum 9.5
vllm:inter_token_latency_seconds_count 700
vllm:inter_token_latency_seconds_bucket{le="+Inf"} 700
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1000"} 1
process_start_time_seconds 1.7e9
"#;

    #[test]
    fn what_the_choice_needs_is_found() {
        let read = read(TEXT, &prefixes(), Duration::from_secs(7));
        assert_eq!(read.report, Some(Report { running: 7, waiting: 2, kv_usage: 0.5 }));
        assert_eq!((read.capacity_tokens, read.block_size), (Some(16_000), Some(16)));
        assert_eq!(read.process_start_seconds, Some(1.7e9));
        let counters = read.counters;
        assert_eq!((counters.at.as_secs(), counters.computed_prompt_tokens), (7, 600.0));
        assert_eq!(
            (counters.prefill_seconds, counters.token_gap_seconds, counters.token_gaps),
            (2.5, 9.5, 700.0)
        );
    }

    #[test]
    fn garbage_is_no_report() {
        for text in
            ["", "\0\u{fffd}", "vllm:num_requests_running", "}{ }", "vllm:num_requests_waiting NaN", "} 1"]
        {
            assert_eq!(read(text, &prefixes(), Duration::ZERO), Exposition::default());
        }
        let huge = "vllm:num_requests_running 1e300\nvllm:num_requests_waiting -5\nvllm:kv_cache_usage_perc 1e9\n\
                    vllm:cache_config_info{block_size=\"18446744073709551615\",num_gpu_blocks=\"9\"} 1";
        let read = read(huge, &prefixes(), Duration::ZERO);
        assert_eq!(read.report, Some(Report { running: u32::MAX, waiting: 0, kv_usage: 1e9 }));
        assert_eq!(read.capacity_tokens, None);
    }
}
