//! A formula with its inputs, as the ledger's data names it. `evaluate` puts numbers in.

use serde::Deserialize;
use servelab_sim::Dtype;

/// A model on GPUs.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct On {
    /// A model of the ledger; absent: the one that the reader chose.
    pub model: Option<String>,
    /// A known GPU; absent: the one that the reader chose.
    pub hardware: Option<String>,
    /// Degree of tensor parallelism; absent: the fewest that hold the model and one request.
    pub gpus: Option<u32>,
    /// Absent: the model's own.
    pub weight_dtype: Option<Dtype>,
    pub kv_dtype: Option<Dtype>,
}

/// Which closed form of `servelab_sim::formulas`, with which inputs. Lengths that exceed the model's context
/// are cut to it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(tag = "formula", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Calculation {
    /// F1, in bytes a token.
    KvBytes { on: On },
    /// How many times more `2 * layers * hidden * bytes` is than F1.
    KvWithoutGqa { on: On },
    /// Memory of all weights.
    Weights { on: On },
    /// F2, in seconds a step.
    DecodeStep { on: On, sequences: f64, context_tokens: f64 },
    /// F3, per GPU.
    DecodeThroughput { on: On, sequences: f64, context_tokens: f64 },
    /// F3 at the batch that F4 allows, per GPU.
    DecodeCeiling { on: On, input_tokens: u64, output_tokens: u64 },
    /// F3 for an infinite batch while memory binds, per GPU.
    Asymptote { on: On, context_tokens: f64 },
    /// F3: the batch with half of the asymptote.
    HalfBatch { on: On, context_tokens: f64 },
    /// F3: the batch from which arithmetic binds.
    Ridge { on: On },
    /// F3 of a batch over F3 of one sequence.
    BatchingGain { on: On, sequences: f64, context_tokens: f64 },
    /// F3 with half of the weights and the same keys and values, over F3.
    HalvingGain { on: On, sequences: f64, context_tokens: f64 },
    /// How often the weights that a step streams are those of `than`.
    WeightRatio { on: On, than: String },
    /// How often the KV bytes of a token are those of `than`.
    KvRatio { on: On, than: String },
    /// What is left of a GPU's memory beside its share of the weights, with figures as somebody took them.
    Room { gpus: u32, memory_bytes_per_gpu: f64, weight_bytes: f64 },
    /// First half of F4, in tokens.
    PoolTokens { on: On, utilisation: f64, activation_bytes_per_gpu: f64 },
    /// F4.
    Capacity { on: On, utilisation: f64, activation_bytes_per_gpu: f64, tokens_per_request: u64 },
    /// F4 turned around: the fewest GPUs that hold so many requests, over the degrees of tensor parallelism.
    GpusToHold { on: On, requests: u64, tokens_per_request: u64 },
    /// F5 of a whole prompt on one replica.
    Prefill { on: On, tokens: u64 },
    /// F6 over its second term: by how much prefill raises the GPU-seconds of a request.
    PrefillFactor {
        on: On,
        input_tokens: u64,
        output_tokens: u64,
        mfu: f64,
        decode_tokens_per_second_per_gpu: f64,
    },
    /// All of it: `servelab plan` with its default assumptions.
    Plan { on: On },
    /// F7.
    InFlight { arrivals_per_second: f64, residence_seconds: f64 },
    /// The residence of F7.
    Residence { ttft_seconds: f64, output_tokens: f64, tpot_seconds: f64 },
    /// A step for the first token, and F2 for each of the others, for one sequence alone.
    AnswerFloor { on: On, tokens: f64 },
    /// F8 turned around, without overhead: how many times earlier the first token of a prefix hit can come.
    HitGain { on: On, uncached_tokens: u64, total_tokens: u64 },
    /// F9 with the bytes alone.
    WeightsFromStorage { on: On, storage_bytes_per_second: f64 },
    /// F10.
    Price { dollars_per_gpu_hour: f64, tokens_per_second_per_gpu: f64 },
    /// F10 at [`Calculation::DecodeCeiling`], with the price of the hardware profile.
    PriceFloor { on: On, input_tokens: u64, output_tokens: u64 },
    /// Mean over a day times a factor, in tokens a second.
    TokenRate { users: f64, tokens_per_user: f64, peak_factor: f64 },
    /// Mean over a day times a factor, in requests a second.
    RequestRate { users: f64, requests_per_user: f64, peak_factor: f64 },
    /// GPUs for such a rate of tokens.
    GpusForRate {
        users: f64,
        tokens_per_user: f64,
        peak_factor: f64,
        tokens_per_second_per_gpu: f64,
        headroom: f64,
    },
    /// Hit rate of a cache of answers that saves `saved_share` of the work, when a look-up costs
    /// `lookup_share` of a request.
    HitsForSaving { saved_share: f64, lookup_share: f64 },
    /// How far a quoted value is from another calculation.
    Deviation { quoted: f64, from: Box<Calculation> },
}
