//! What a plan takes for granted, and the defaults.

use serde::Serialize;

use crate::planner::PlanError;

/// All that a plan takes for granted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Assumptions {
    pub daily_users: f64,
    pub sessions_per_user: f64,
    pub requests_per_session: f64,
    /// Mean prompt (ISL).
    pub input_tokens: u64,
    /// Share of the input that the prefix cache holds already.
    pub cached_share: f64,
    /// Mean answer (OSL).
    pub output_tokens: u64,
    /// Rate of the busiest minutes over the mean. `None`: nobody knows, [`ASSUMED_PEAK_FACTOR`].
    pub peak_factor: Option<f64>,
    /// Share of the GPU's memory that the engine may use; vLLM's `gpu-memory-utilization`.
    pub memory_utilisation: f64,
    /// Activations, graphs and workspaces.
    pub activation_bytes_per_gpu: f64,
    /// Share of the peak FLOP/s that prefill reaches.
    pub mfu: f64,
    /// Floor of a decode step over what it really takes.
    pub decode_efficiency: f64,
    /// GPUs beyond those that the peak keeps busy: queueing, failures, deployments.
    pub headroom: f64,
    /// `None`: the fewest that hold the model and one request.
    pub gpus_per_replica: Option<u32>,
    /// Most requests that run at once on a replica. `None`: what its memory holds.
    pub max_running: Option<u32>,
    /// `None`: that of the hardware profile.
    pub dollars_per_gpu_hour: Option<f64>,
}

/// The peak factor where nobody knows a better one; three to five are usually quoted.
pub const ASSUMED_PEAK_FACTOR: f64 = 3.0;

impl Assumptions {
    /// A million users, five sessions of ten requests, 2,000 tokens in and 300 out.
    ///
    /// `mfu` and `decode_efficiency`: at low load, TPOT of the 8B and the 70B on H100 is 1.6 to 2.0 times its
    /// floor measured, and 1.4 times as NVIDIA's AIConfigurator predicts; the tests hold the two shares against
    /// its throughputs. 0.9 of the memory is vLLM's old default, 1.25 GB of activations a usual value.
    pub const DEFAULT: Self = Self {
        daily_users: 1e6,
        sessions_per_user: 5.0,
        requests_per_session: 10.0,
        input_tokens: 2000,
        cached_share: 0.0,
        output_tokens: 300,
        peak_factor: None,
        memory_utilisation: 0.9,
        activation_bytes_per_gpu: 1.25e9,
        mfu: 0.5,
        decode_efficiency: 0.6,
        headroom: 1.3,
        gpus_per_replica: None,
        max_running: None,
        dollars_per_gpu_hour: None,
    };

    pub fn requests_per_day(&self) -> f64 {
        self.daily_users * self.sessions_per_user * self.requests_per_session
    }

    pub fn peak_factor(&self) -> f64 {
        self.peak_factor.unwrap_or(ASSUMED_PEAK_FACTOR)
    }

    /// Prompt tokens that are computed: even a full hit computes one.
    pub fn uncached_tokens(&self) -> f64 {
        let input = self.input_tokens as f64;
        (input * (1.0 - self.cached_share)).round().max(1.0)
    }

    /// ISL + OSL: what a request takes in the KV cache in the end.
    pub fn tokens_per_request(&self) -> u64 {
        self.input_tokens + self.output_tokens
    }

    /// # Errors
    /// [`PlanError::Range`] for the first assumption that cannot be.
    pub fn validate(&self) -> Result<(), PlanError> {
        let tokens = "from 1 to 1e9";
        within("daily_users", self.daily_users, 1.0, 1e10, "from 1 to 1e10")?;
        within("sessions_per_user", self.sessions_per_user, 1e-3, 1000.0, "from 0.001 to 1000")?;
        within("requests_per_session", self.requests_per_session, 1e-3, 1000.0, "from 0.001 to 1000")?;
        // A thousand for everybody on earth.
        within("requests_per_day", self.requests_per_day(), 0.0, 1e13, "at most 1e13")?;
        within("input_tokens", self.input_tokens as f64, 1.0, 1e9, tokens)?;
        within("output_tokens", self.output_tokens as f64, 1.0, 1e9, tokens)?;
        within("cached_share", self.cached_share, 0.0, 1.0, "from 0 to 1")?;
        within("peak_factor", self.peak_factor(), 1.0, 100.0, "from 1 to 100")?;
        within("memory_utilisation", self.memory_utilisation, 0.01, 1.0, "from 0.01 to 1")?;
        within("activation_bytes_per_gpu", self.activation_bytes_per_gpu, 0.0, 1e15, "from 0 to 1e15 bytes")?;
        within("mfu", self.mfu, 0.01, 1.0, "from 0.01 to 1")?;
        within("decode_efficiency", self.decode_efficiency, 0.01, 1.0, "from 0.01 to 1")?;
        within("headroom", self.headroom, 1.0, 10.0, "from 1 to 10")?;
        let gpus = self.gpus_per_replica.map_or(1.0, f64::from);
        within("gpus_per_replica", gpus, 1.0, 1024.0, "from 1 to 1024")?;
        let running = self.max_running.map_or(1.0, f64::from);
        within("max_running", running, 1.0, 1e9, "from 1 to 1e9")?;
        within(
            "dollars_per_gpu_hour",
            self.dollars_per_gpu_hour.unwrap_or(0.0),
            0.0,
            1e5,
            "from 0 to 100000 dollars",
        )
    }
}

impl Default for Assumptions {
    fn default() -> Self {
        Self::DEFAULT
    }
}

fn within(
    field: &'static str,
    value: f64,
    least: f64,
    most: f64,
    rule: &'static str,
) -> Result<(), PlanError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(PlanError::Range { field, value, rule }) }
}
