//! What the hardware allows beside what was measured. Every bound is one that no schedule can beat, so that a figure
//! beyond it means a wrong measurement, another model, or other hardware than stated.

use servelab_sim::{Roofline, SequenceWork};

use crate::result::{LimitRow, Limits, Metrics};

/// A bound is beaten if it is by more than that: peaks in data sheets are rounded.
const TOLERANCE: f64 = 0.02;

/// The rows that the figures allow. `None` if no request completed.
pub fn limits(roofline: &Roofline, model: &str, hardware: &str, metrics: &Metrics) -> Option<Limits> {
    if metrics.completed == 0 {
        return None;
    }
    let rows = vec![tpot(roofline, metrics), ttft(roofline, metrics), output(roofline, metrics)];
    Some(Limits {
        hardware: hardware.to_owned(),
        model: model.to_owned(),
        rows: rows.into_iter().flatten().collect(),
    })
}

fn row(metric: &str, measured: f64, limit: f64, is_floor: bool, because: String) -> Option<LimitRow> {
    let beaten = match is_floor {
        true => measured < limit * (1.0 - TOLERANCE),
        false => measured > limit * (1.0 + TOLERANCE),
    };
    let sensible = measured > 0.0 && limit > 0.0 && limit.is_finite();
    sensible.then(|| LimitRow { metric: metric.into(), limit, measured, is_floor, because, beaten })
}

/// No token of a sequence comes before its weights and its own keys and values have been read.
fn tpot(roofline: &Roofline, metrics: &Metrics) -> Option<LimitRow> {
    let context = metrics.input_tokens.min + 1.0;
    let cost = roofline.step([SequenceWork::decode(context as u64)]);
    let because = format!(
        "one step of a single sequence at {context:.0} tokens reads {:.3} GB; {} bound",
        cost.memory_bytes / 1e9,
        cost.limit().name()
    );
    row("median_tpot_ms", metrics.tpot_ms.median, 1000.0 * cost.floor_seconds(), true, because)
}

/// Prompt tokens of a request, on average, that were computed: not found in a cache.
fn computed_tokens(metrics: &Metrics) -> f64 {
    (metrics.input_tokens.mean - metrics.cached_prompt_tokens as f64 / metrics.completed as f64).max(1.0)
}

/// No first token comes before its prompt has been computed. Attention to what was cached is left out: the bound is
/// of a mean, and only what is convex in the length may be taken at the mean length.
fn ttft(roofline: &Roofline, metrics: &Metrics) -> Option<LimitRow> {
    let new = computed_tokens(metrics);
    let cost = roofline.step([SequenceWork::prefill(0, new as u64)]);
    let because = format!(
        "{new:.0} tokens of prompt to compute on average, {:.2} GFLOP; {} bound",
        cost.flops / 1e9,
        cost.limit().name()
    );
    row("mean_ttft_ms", metrics.ttft_ms.mean, 1000.0 * cost.floor_seconds(), true, because)
}

/// With as many sequences as were ever in flight, all decoding in every step, and the prompts of as many new ones
/// computed along: no schedule makes more of a step.
fn output(roofline: &Roofline, metrics: &Metrics) -> Option<LimitRow> {
    let sequences = u64::from(metrics.peak_in_flight.max(1));
    let context = (metrics.input_tokens.mean + metrics.output_tokens.mean / 2.0).max(1.0) as u64;
    let per_output = computed_tokens(metrics) / metrics.output_tokens.mean.max(1.0);
    let decodes = (0..sequences).map(|_| SequenceWork::decode(context));
    // One by one, which leaves their attention out: how prompts are cut is the schedule's business.
    let prompts = (0..(per_output * sequences as f64) as u64).map(|_| SequenceWork::chunk(0, 1));
    let cost = roofline.step(decodes.chain(prompts));
    let because = format!(
        "{sequences} sequences at {context} tokens and {per_output:.2} prompt tokens for each one out; {} bound",
        cost.limit().name()
    );
    row(
        "output_throughput",
        metrics.output_throughput,
        sequences as f64 / cost.floor_seconds(),
        false,
        because,
    )
}

#[cfg(test)]
mod tests {
    use servelab_sim::{Dtype, HardwareProfile, ModelShape};

    use super::*;
    use crate::result::Distribution;

    /// 1 G parameters of 2 bytes at 1 TB/s and 100 TFLOP/s: a step reads for 2 ms, a token computes for 0.02 ms.
    fn roofline() -> Roofline {
        let shape = ModelShape {
            name: "round".into(),
            layers: 1,
            hidden: 1000,
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            intermediate: 1000,
            vocabulary: 1000,
            tied_embeddings: true,
            max_context_tokens: 100_000,
            sliding_window: None,
            parameters: 1_000_000_000,
            weight_dtype: Dtype::Bf16,
            kv_dtype: Dtype::Bf16,
        };
        let hardware = HardwareProfile::measured(1e11, 1e12, Dtype::Bf16, 1e14).unwrap();
        Roofline::new(&shape, &hardware, 1).unwrap()
    }

    fn metrics(tpot_ms: f64, ttft_ms: f64, output_throughput: f64) -> Metrics {
        let of = |value: f64| Distribution {
            count: 4,
            min: value,
            mean: value,
            median: value,
            ..Default::default()
        };
        Metrics {
            completed: 4,
            output_throughput,
            peak_in_flight: 4,
            tpot_ms: of(tpot_ms),
            ttft_ms: of(ttft_ms),
            input_tokens: of(1000.0),
            output_tokens: of(100.0),
            ..Metrics::default()
        }
    }

    #[test]
    fn the_limits_are_the_rooflines() {
        let limits = limits(&roofline(), "round", "measured", &metrics(4.0, 40.0, 1000.0)).unwrap();
        let [tpot, ttft, output] = &limits.rows[..] else { panic!("{limits:?}") };
        assert!((tpot.limit - 2.0).abs() < 0.01 && tpot.is_floor && !tpot.beaten, "{tpot:?}");
        // 1000 tokens at 2 GFLOP each.
        assert!((ttft.limit - 20.0).abs() < 0.2 && !ttft.beaten, "{ttft:?}");
        // 4 decodes and 40 prompt tokens are computed in 0.88 ms, in the shade of the 2 ms of reading.
        assert!((output.limit - 2000.0).abs() < 10.0 && !output.is_floor && !output.beaten, "{output:?}");
    }

    #[test]
    fn faster_than_physics_is_flagged() {
        let limits = limits(&roofline(), "round", "measured", &metrics(1.9, 19.0, 2100.0)).unwrap();
        assert!(limits.rows.iter().all(|row| row.beaten), "{limits:?}");
    }

    #[test]
    fn nothing_completed_has_no_limits() {
        assert_eq!(super::limits(&roofline(), "m", "h", &Metrics::default()), None);
    }
}
