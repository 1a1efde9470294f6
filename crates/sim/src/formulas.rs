//! The closed forms of LLM serving, F1 to F10, as pure functions.
//!
//! They are limits of the hardware where they say "floor" and bookkeeping elsewhere. All inputs are positive
//! and finite, which whoever reads them from outside has checked; time is in seconds, memory in bytes. The
//! roofline goes back to Williams, Waterman and Patterson, "Roofline" (CACM 2009); its use for one step of a
//! transformer is that of Pope et al., "Efficiently Scaling Transformer Inference" (2022).
//!
//! [`crate::roofline`] counts a step more finely; a test holds the two together.

pub const SECONDS_PER_DAY: f64 = 86_400.0;

/// Operations for one parameter and one token: a multiplication and an addition.
const FLOPS_PER_PARAMETER: f64 = 2.0;

/// What one token leaves in the KV cache.
#[derive(Clone, Copy, Debug)]
pub struct KvLayout {
    pub layers: u64,
    /// Heads of keys and values, not of queries: a model with grouped-query attention has fewer of them.
    pub kv_heads: u64,
    pub head_dim: u64,
    pub bytes_per_element: u64,
}

/// The GPUs of one replica. The rates are those of one GPU.
#[derive(Clone, Copy, Debug)]
pub struct Gpus {
    /// Degree of tensor parallelism (TP).
    pub count: u32,
    pub bandwidth_bytes_per_second: f64,
    pub flops_per_second: f64,
}

impl Gpus {
    fn bandwidth(self) -> f64 {
        f64::from(self.count) * self.bandwidth_bytes_per_second
    }

    fn flops(self) -> f64 {
        f64::from(self.count) * self.flops_per_second
    }
}

/// What a step reads and computes of a model.
#[derive(Clone, Copy, Debug)]
pub struct DecodeModel {
    /// P: parameters that a step multiplies, the input embedding left out.
    pub streamed_parameters: f64,
    /// W: bytes of them.
    pub streamed_bytes: f64,
    /// F1, in all GPUs together.
    pub kv_bytes_per_token: f64,
}

/// B sequences that decode together, each at a context of L tokens.
#[derive(Clone, Copy, Debug)]
pub struct DecodeBatch {
    pub sequences: f64,
    /// The mean over the sequences. Over the life of a request that is ISL + OSL/2.
    pub context_tokens: f64,
}

/// F1: bytes of keys and values of one token, `2 * layers * kv_heads * head_dim * bytes`. Tensor parallelism
/// divides it over the GPUs, up to one GPU for each kv head.
pub fn kv_bytes_per_token(layout: KvLayout) -> f64 {
    let KvLayout { layers, kv_heads, head_dim, bytes_per_element } = layout;
    2.0 * layers as f64 * kv_heads as f64 * head_dim as f64 * bytes_per_element as f64
}

/// First term of F2: seconds to read the weights and all keys and values, `(W + B*L*kv) / (TP*BW)`.
pub fn decode_memory_seconds(model: DecodeModel, batch: DecodeBatch, gpus: Gpus) -> f64 {
    let kv_bytes = batch.sequences * batch.context_tokens * model.kv_bytes_per_token;
    (model.streamed_bytes + kv_bytes) / gpus.bandwidth()
}

/// Second term of F2: seconds to multiply each parameter with each sequence, `2*P*B / (TP*FLOPs)`.
pub fn decode_compute_seconds(model: DecodeModel, batch: DecodeBatch, gpus: Gpus) -> f64 {
    FLOPS_PER_PARAMETER * model.streamed_parameters * batch.sequences / gpus.flops()
}

/// F2: no decode step is faster than this, the larger of its two terms.
pub fn decode_step_floor_seconds(model: DecodeModel, batch: DecodeBatch, gpus: Gpus) -> f64 {
    decode_memory_seconds(model, batch, gpus).max(decode_compute_seconds(model, batch, gpus))
}

/// F3: tokens a second of one replica at most, `B / t(B,L)`. While memory binds it is
/// `BW / (W/B + L*kv)`, a hyperbola in B.
pub fn decode_tokens_per_second(model: DecodeModel, batch: DecodeBatch, gpus: Gpus) -> f64 {
    batch.sequences / decode_step_floor_seconds(model, batch, gpus)
}

/// F3: what the hyperbola tends to for large batches, `TP*BW / (L*kv)`, in tokens a second of one replica.
/// Arithmetic may bind before.
pub fn asymptotic_tokens_per_second(model: DecodeModel, context_tokens: f64, gpus: Gpus) -> f64 {
    gpus.bandwidth() / (context_tokens * model.kv_bytes_per_token)
}

/// F3: the batch that gets half of [`asymptotic_tokens_per_second`], `B_half = W / (L*kv)`. What people call
/// the knee; it depends on the model and the context and on nothing else.
pub fn half_batch(model: DecodeModel, context_tokens: f64) -> f64 {
    model.streamed_bytes / (context_tokens * model.kv_bytes_per_token)
}

/// F3: the batch from which multiplying the weights takes longer than reading them (short contexts), the
/// ridge of the roofline: `FLOPs/BW * (W/P) / 2`.
pub fn ridge_batch(model: DecodeModel, gpus: Gpus) -> f64 {
    let bytes_per_parameter = model.streamed_bytes / model.streamed_parameters;
    gpus.flops() / gpus.bandwidth() * bytes_per_parameter / FLOPS_PER_PARAMETER
}

/// The memory of one replica and what it is needed for.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaMemory {
    pub gpus: u32,
    pub memory_bytes_per_gpu: f64,
    /// Share that the engine may use.
    pub utilisation: f64,
    /// All weights, the input embedding too.
    pub weight_bytes: f64,
    /// Activations, graphs and workspaces.
    pub activation_bytes_per_gpu: f64,
}

/// First half of F4: bytes that are left for keys and values,
/// `memory*utilisation*TP - W - activations*TP`. Negative: the model does not fit.
pub fn kv_pool_bytes(memory: ReplicaMemory) -> f64 {
    let per_gpu = memory.memory_bytes_per_gpu * memory.utilisation - memory.activation_bytes_per_gpu;
    f64::from(memory.gpus) * per_gpu - memory.weight_bytes
}

/// F4: requests that a pool of keys and values holds at their full length, `pool / ((ISL+OSL)*kv)`. Not
/// rounded. A paged engine may run somewhat more at once, since most are not yet at their full length.
pub fn batch_capacity(pool_bytes: f64, tokens_per_request: f64, kv_bytes_per_token: f64) -> f64 {
    pool_bytes / (tokens_per_request * kv_bytes_per_token)
}

/// F5: GPU-seconds for one prompt token at least, `2*P/FLOPs`, without attention.
///
/// It counts the logits of every prompt token, as the rule of thumb does; engines compute those of the last
/// token only, which [`crate::roofline`] takes into account (7 % of an 8B with 128k words, 1.5 % of a 70B).
pub fn prefill_gpu_seconds_per_token(streamed_parameters: f64, flops_per_second: f64) -> f64 {
    FLOPS_PER_PARAMETER * streamed_parameters / flops_per_second
}

/// The attention of a prompt of which a part may come from the prefix cache.
#[derive(Clone, Copy, Debug)]
pub struct PromptAttention {
    pub layers: u64,
    pub heads: u64,
    pub head_dim: u64,
    pub cached_tokens: f64,
    pub uncached_tokens: f64,
}

/// F5: GPU-seconds of causal attention at least, `2*layers*heads*d*L^2/FLOPs` for a prompt of L tokens. With
/// C cached and N uncached tokens it is `2*layers*heads*d*(N^2 + 2*N*C)/FLOPs`.
pub fn causal_attention_gpu_seconds(attention: PromptAttention, flops_per_second: f64) -> f64 {
    let PromptAttention { layers, heads, head_dim, cached_tokens, uncached_tokens } = attention;
    let pairs = uncached_tokens * uncached_tokens + 2.0 * uncached_tokens * cached_tokens;
    2.0 * layers as f64 * heads as f64 * head_dim as f64 * pairs / flops_per_second
}

/// What F6 adds up.
#[derive(Clone, Copy, Debug)]
pub struct RequestCost {
    /// F5 for all uncached prompt tokens, attention included, in GPU-seconds.
    pub prefill_floor_gpu_seconds: f64,
    /// Model FLOPs utilisation: the share of the peak that prefill reaches.
    pub mfu: f64,
    pub output_tokens: f64,
    /// While decoding only.
    pub decode_tokens_per_second_per_gpu: f64,
}

/// F6: GPU-seconds of one request, `uncached ISL * F5/MFU + OSL/throughput`. Quoted estimates leave the first
/// term out.
pub fn gpu_seconds_per_request(cost: RequestCost) -> f64 {
    cost.prefill_floor_gpu_seconds / cost.mfu + cost.output_tokens / cost.decode_tokens_per_second_per_gpu
}

/// How long a request stays, in means: Little's law does not take percentiles.
#[derive(Clone, Copy, Debug)]
pub struct MeanResidence {
    pub ttft_seconds: f64,
    pub output_tokens: f64,
    pub tpot_seconds: f64,
}

impl MeanResidence {
    /// `TTFT + OSL*TPOT`.
    pub fn seconds(self) -> f64 {
        self.ttft_seconds + self.output_tokens * self.tpot_seconds
    }
}

/// F7: requests in flight, `arrival rate * mean(TTFT + OSL*TPOT)`. Little, "A Proof for the Queuing Formula
/// L = lambda W" (1961).
pub fn in_flight(arrivals_per_second: f64, residence: MeanResidence) -> f64 {
    arrivals_per_second * residence.seconds()
}

/// A prompt whose first part may be in the prefix cache.
#[derive(Clone, Copy, Debug)]
pub struct PrefixHit {
    /// What a request takes besides its prefill: queue, network, one step.
    pub overhead_seconds: f64,
    pub uncached_tokens: f64,
    pub total_tokens: f64,
    pub prefill_seconds_per_token: f64,
}

/// F8: TTFT of a prefix hit over that of a miss, `(overhead + uncached*F5) / (overhead + total*F5)`.
pub fn hit_ttft_ratio(hit: PrefixHit) -> f64 {
    let ttft = |tokens: f64| hit.overhead_seconds + tokens * hit.prefill_seconds_per_token;
    ttft(hit.uncached_tokens) / ttft(hit.total_tokens)
}

/// The stages of a replica's start.
#[derive(Clone, Copy, Debug)]
pub struct ColdStart {
    pub image_pull_seconds: f64,
    pub weight_bytes: f64,
    pub storage_bytes_per_second: f64,
    /// Process, imports, CUDA context.
    pub init_seconds: f64,
    pub compile_seconds: f64,
    pub graph_capture_seconds: f64,
    pub first_request_seconds: f64,
}

/// F9: seconds from nothing to the first answer:
/// `image pull + bytes/storage bandwidth + init + compile + graph capture + first request`.
pub fn cold_start_seconds(start: ColdStart) -> f64 {
    start.image_pull_seconds
        + start.weight_bytes / start.storage_bytes_per_second
        + start.init_seconds
        + start.compile_seconds
        + start.graph_capture_seconds
        + start.first_request_seconds
}

/// F10: dollars for 1,000,000 output tokens, `$/GPU-hour / (tok/s/GPU * 3600) * 1e6`. The unit is per
/// million, not per thousand.
pub fn dollars_per_million_tokens(dollars_per_gpu_hour: f64, tokens_per_second_per_gpu: f64) -> f64 {
    dollars_per_gpu_hour / (tokens_per_second_per_gpu * 3600.0) * 1e6
}

/// The mean rate of something that happens so many times a day.
pub fn mean_per_second(per_day: f64) -> f64 {
    per_day / SECONDS_PER_DAY
}
