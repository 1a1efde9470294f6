//! The tables of metrics, of a replica and of the router ([`router`]): name, type, help text and buckets of each
//! series, and nothing else.
//!
//! Names of a replica follow vLLM's after the prefix, so that what people know carries over. Prometheus' rules
//! hold otherwise: base units, counters end in `_total`. Three of vLLM's names break them and are kept:
//! `kv_cache_usage_perc` is a share, `iteration_tokens_total` a histogram, and `cache_config_info`
//! calls the blocks `num_gpu_blocks` whatever the device, because scalers and endpoint pickers look there.

/// One metric of the table.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Without the prefix.
    pub name: &'static str,
    pub help: &'static str,
    pub kind: Kind,
}

/// What Prometheus calls the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Gauge,
    Counter,
    Histogram(Buckets),
}

/// Upper bounds of a histogram's buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buckets {
    /// Time to first token, in seconds.
    FirstToken,
    /// Time between tokens, in seconds.
    BetweenTokens,
    /// A whole request or a part of it, in seconds.
    Latency,
    /// Tokens of a request: 1, 2, 5, 10, ... up to the context length.
    RequestTokens,
    /// Tokens of a step: powers of two up to 16384.
    StepTokens,
    /// Preemptions of a request.
    Preemptions,
    /// What the router itself takes, from a microsecond, in seconds.
    RouterOwn,
    /// What a request waits for at the router, up to minutes, in seconds.
    RouterWait,
}

/// vLLM's.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];

/// vLLM's begin at 0.01, where a small model or a fast GPU has all its tokens in the first bucket.
const BETWEEN_TOKENS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// vLLM's begin at 0.3, which says nothing about a queue.
const LATENCY: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
    20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];

const PREEMPTIONS: &[f64] = &[0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0];

const ROUTER_OWN: &[f64] =
    &[1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0];

const ROUTER_WAIT: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

impl Buckets {
    /// The upper bounds, for a model with a context of `max_model_len` tokens.
    pub fn bounds(self, max_model_len: u32) -> Vec<f64> {
        match self {
            Self::FirstToken => FIRST_TOKEN.to_vec(),
            Self::BetweenTokens => BETWEEN_TOKENS.to_vec(),
            Self::Latency => LATENCY.to_vec(),
            Self::RequestTokens => one_two_five(max_model_len),
            Self::StepTokens => (0..=14).map(|power| f64::from(1_u32 << power)).collect(),
            Self::Preemptions => PREEMPTIONS.to_vec(),
            Self::RouterOwn => ROUTER_OWN.to_vec(),
            Self::RouterWait => ROUTER_WAIT.to_vec(),
        }
    }
}

fn one_two_five(largest: u32) -> Vec<f64> {
    let decades = (0..10).map(|exponent| 10_u64.pow(exponent));
    let series = decades.flat_map(|decade| [decade, 2 * decade, 5 * decade]);
    series.take_while(|&bound| bound == 1 || bound <= u64::from(largest)).map(|bound| bound as f64).collect()
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { name, help, kind: Kind::Gauge }
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric { name, help, kind: Kind::Counter }
}

const fn histogram(name: &'static str, buckets: Buckets, help: &'static str) -> Metric {
    Metric { name, help, kind: Kind::Histogram(buckets) }
}

macro_rules! table {
    ($($constant:ident = $metric:expr;)+) => {
        $(pub const $constant: Metric = $metric;)+
        /// Every metric of the table.
        pub const ALL: &[Metric] = &[$($constant),+];
    };
}

table! {
    NUM_REQUESTS_RUNNING = gauge("num_requests_running", "Sequences in the running batch.");
    NUM_REQUESTS_WAITING = gauge("num_requests_waiting", "Requests in the queue.");
    MAX_RUNNING = gauge("max_running", "Most sequences that run at once; 0 until the model is loaded.");
    KV_CACHE_USAGE_PERC = gauge("kv_cache_usage_perc", "Share of the KV blocks that sequences hold; 1 is full.");
    CACHE_CONFIG_INFO = gauge("cache_config_info", "Always 1; its labels tell the layout of the KV cache.");
    BUILD_INFO = gauge("build_info", "Always 1; its labels tell version and commit.");
    DEVICE_INFO = gauge("device_info", "Always 1; its labels tell what computes, and whether it is simulated.");
    MODEL_MEMORY_BYTES = gauge("model_memory_bytes", "Memory that the model takes, by what it holds.");
    KV_CACHE_CAPACITY_TOKENS = gauge("kv_cache_capacity_tokens", "Tokens that the KV cache holds.");
    KV_CACHE_MAX_CONCURRENCY = gauge("kv_cache_max_concurrency",
        "Sequences of the longest length allowed that the KV cache holds at once.");
    MODEL_LOAD_SECONDS = gauge("model_load_seconds", "Time that loading the model took, by stage.");

    PREFIX_CACHE_QUERIES = counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.");
    PREFIX_CACHE_HITS = counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.");
    NUM_PREEMPTIONS = counter("num_preemptions_total", "Sequences that lost their KV blocks and were computed again.");
    PROMPT_TOKENS = counter("prompt_tokens_total", "Prompt tokens of requests that reached their first token.");
    PROMPT_TOKENS_CACHED = counter("prompt_tokens_cached_total", "Prompt tokens of such requests that the prefix cache supplied.");
    GENERATION_TOKENS = counter("generation_tokens_total", "Tokens generated.");
    REQUEST_SUCCESS = counter("request_success_total", "Requests that ended, by reason.");
    ADMISSION_REJECTIONS = counter("admission_rejections_total", "Requests that were not taken, by reason.");
    HTTP_REQUESTS = counter("http_requests_total", "HTTP requests answered, by route and class of status.");
    TRACE_SPANS_EXPORTED = counter("trace_spans_exported_total", "Spans that the collector of traces took.");
    TRACE_SPANS_DROPPED = counter("trace_spans_dropped_total", "Spans that were not exported, by reason.");

    TIME_TO_FIRST_TOKEN_SECONDS = histogram("time_to_first_token_seconds", Buckets::FirstToken,
        "From a request's arrival at the HTTP front to its first token.");
    INTER_TOKEN_LATENCY_SECONDS = histogram("inter_token_latency_seconds", Buckets::BetweenTokens,
        "Each gap between two successive tokens of a choice.");
    REQUEST_TIME_PER_OUTPUT_TOKEN_SECONDS = histogram("request_time_per_output_token_seconds", Buckets::BetweenTokens,
        "Mean time per output token of a request after the first.");
    E2E_REQUEST_LATENCY_SECONDS = histogram("e2e_request_latency_seconds", Buckets::Latency,
        "From a request's arrival at the HTTP front to its end.");
    REQUEST_QUEUE_TIME_SECONDS = histogram("request_queue_time_seconds", Buckets::Latency,
        "From a request's arrival in the queue to the last time it was scheduled before its first token.");
    REQUEST_PREFILL_TIME_SECONDS = histogram("request_prefill_time_seconds", Buckets::Latency,
        "From being scheduled to the first token.");
    REQUEST_DECODE_TIME_SECONDS = histogram("request_decode_time_seconds", Buckets::Latency,
        "From the first token to the last.");
    REQUEST_INFERENCE_TIME_SECONDS = histogram("request_inference_time_seconds", Buckets::Latency,
        "From being scheduled to the last token.");
    REQUEST_PROMPT_TOKENS = histogram("request_prompt_tokens", Buckets::RequestTokens,
        "Prompt tokens of a request.");
    REQUEST_GENERATION_TOKENS = histogram("request_generation_tokens", Buckets::RequestTokens,
        "Tokens generated for a request, over all its choices.");
    REQUEST_NUM_PREEMPTIONS = histogram("request_num_preemptions", Buckets::Preemptions,
        "How often sequences of a request were preempted.");
    ITERATION_TOKENS = histogram("iteration_tokens_total", Buckets::StepTokens,
        "Tokens computed in a step, prompt and decoded ones together.");
}

/// The router's metrics. Their names begin with `router_`, so that one prefix does for both processes.
pub mod router {
    use super::{Buckets, Metric, counter, gauge, histogram};

    table! {
        REQUESTS = counter("router_requests_total", "Requests, by how they ended.");
        FAULTS = counter("router_faults_total", "Attempts at a replica that gave no answer, by what was wrong.");
        CHOICES = counter("router_choices_total", "Choices, by policy and reason.");
        RETRIES = counter("router_retries_total", "Attempts after the first.");
        RETRIES_OVER_BUDGET = counter("router_retries_over_budget_total", "Attempts that were not made since too many were.");
        HEDGES = counter("router_hedges_total", "Second attempts beside a slow first one.");
        HEDGES_WON = counter("router_hedges_won_total", "Such attempts that answered first.");
        LIMITED = counter("router_limited_total", "Requests refused by a limit.");
        LIMITS_REDIS_AWAY = counter("router_limits_redis_away_total",
            "Requests whose limits were not decided by Redis, since it did not answer in time.");
        LIMITS_REDIS_UNSETTLED = counter("router_limits_redis_unsettled_total",
            "Answers whose tokens could not be settled in Redis; what they had reserved stays taken.");
        IDEMPOTENT_ANSWERS = counter("router_idempotent_answers_total", "Requests that got the answer of an earlier one.");
        KV_EVENT_BATCHES = counter("router_kv_event_batches_total", "Batches of KV events of a replica.");
        KV_EVENT_GAPS = counter("router_kv_event_gaps_total", "Times that KV events of a replica were missed.");
        KV_EVENT_RESYNCS = counter("router_kv_event_resyncs_total",
            "Times that what a replica holds was learnt anew after a stream had been lost.");
        TOKENISED = counter("router_tokenised_total", "Requests whose prompt was to be tokenised, by what became of it.");
        TOKEN_COUNT_MISMATCHES = counter("router_token_count_mismatches_total",
            "Answers of replicas with token parity that counted other prompt tokens than the router.");
        PROMPT_TOKENS = counter("router_prompt_tokens_total", "Prompt tokens of answers that told their usage.");
        PREDICTED_HIT_TOKENS = counter("router_predicted_hit_tokens_total",
            "Prompt tokens that the replicas were expected to hold, by the router's count.");
        CONFIRMED_HIT_TOKENS = counter("router_confirmed_hit_tokens_total", "Prompt tokens that the replicas say they held.");
        TRACE_SPANS_EXPORTED = counter("router_trace_spans_exported_total", "Spans that the collector of traces took.");
        TRACE_SPANS_DROPPED = counter("router_trace_spans_dropped_total", "Spans that were not exported, by reason.");

        REQUESTS_HELD = gauge("router_requests_held", "Requests that wait because no replica is ready.");
        REQUESTS_WAITING = gauge("router_requests_waiting", "Requests that wait in the router, for whatever reason.");
        REQUESTS_IN_FLIGHT = gauge("router_requests_in_flight", "Requests inside the router.");
        INDEX_BYTES = gauge("router_index_bytes", "Bytes that the index of prefixes takes.");
        REPLICAS = gauge("router_replicas", "Replicas, by health.");
        REPLICA_IN_FLIGHT = gauge("router_replica_in_flight", "Requests in flight at a replica.");
        REPLICA_INDEX_BLOCKS = gauge("router_replica_index_blocks", "Blocks that a replica is believed to hold.");
        KV_EVENTS_STATE = gauge("router_kv_events_state",
            "Stream of a replica's KV events: 0 there is none, 1 connecting, 2 without its beginning, 3 precise.");
        TOKEN_PARITY = gauge("router_token_parity",
            "Whether the router tokenises as a replica: 1 yes, 0 no, -1 not known; if not 1, it is matched by text.");
        BREAKER_STATE = gauge("router_breaker_state", "Circuit breaker of a replica: 0 closed, 1 half open, 2 open.");
        IMBALANCE = gauge("router_imbalance", "Most requests in flight at a ready replica over their mean.");

        HELD_SECONDS = histogram("router_held_seconds", Buckets::RouterWait, "How long requests were held.");
        TOKENISE_SECONDS = histogram("router_tokenise_seconds", Buckets::RouterOwn,
            "Tokenising a prompt, with the wait for it.");
        DECISION_SECONDS = histogram("router_decision_seconds", Buckets::RouterOwn, "Choosing a replica.");
        ADDED_LATENCY_SECONDS = histogram("router_added_latency_seconds", Buckets::RouterOwn,
            "From the last byte of a request to its first attempt, without waiting.");
        LIMITS_REDIS_SECONDS = histogram("router_limits_redis_seconds", Buckets::RouterOwn,
            "How long Redis took to decide about the limits of a request.");
        TIME_TO_FIRST_BYTE_SECONDS = histogram("router_time_to_first_byte_seconds", Buckets::RouterWait,
            "From sending a request to the first byte of its answer's body.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_only_they_end_in_total() {
        for metric in ALL.iter().chain(router::ALL) {
            let kept_from_vllm = metric.name == ITERATION_TOKENS.name;
            let is_counter = metric.kind == Kind::Counter;
            assert_eq!(metric.name.ends_with("_total"), is_counter || kept_from_vllm, "{}", metric.name);
        }
    }

    #[test]
    fn names_are_unique_and_helped() {
        let all: Vec<&Metric> = ALL.iter().chain(router::ALL).collect();
        for (index, metric) in all.iter().enumerate() {
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            let earlier = all[..index].iter().any(|other| other.name == metric.name);
            assert!(!earlier, "{} is there twice", metric.name);
        }
        assert!(router::ALL.iter().all(|metric| metric.name.starts_with("router_")));
    }

    #[test]
    fn bounds_ascend_strictly() {
        let histograms = ALL.iter().chain(router::ALL).filter_map(|metric| match metric.kind {
            Kind::Histogram(buckets) => Some(buckets),
            Kind::Gauge | Kind::Counter => None,
        });
        for buckets in histograms {
            for context in [1, 512, 131_072, u32::MAX] {
                let bounds = buckets.bounds(context);
                assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{buckets:?}: {bounds:?}");
            }
        }
    }

    #[test]
    fn token_buckets_stop_at_the_context_length() {
        assert_eq!(
            Buckets::RequestTokens.bounds(512),
            [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]
        );
        assert_eq!(Buckets::RequestTokens.bounds(0), [1.0]);
        assert_eq!(Buckets::StepTokens.bounds(512).last(), Some(&16384.0));
    }
}
