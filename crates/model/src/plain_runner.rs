//! The decoder on the CPU as a runner of the engine.

use servelab_engine::{ModelRunner, RunnerError, Step, StepOutput};

use crate::config::{ModelConfig, WeightDtype};
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::load::RunnerOptions;
use crate::plain::PlainOps;
use crate::weights::Weights;

pub struct CpuRunner {
    ops: PlainOps,
    decoder: Decoder<PlainOps>,
}

impl CpuRunner {
    pub fn new(
        config: &ModelConfig,
        weights: &Weights,
        dtype: WeightDtype,
        options: &RunnerOptions,
    ) -> Result<Self, ModelError> {
        let mut ops = PlainOps::new(config, options.num_blocks as usize, options.block_size as usize);
        let decoder = Decoder::load(&mut ops, config, weights, dtype, options.max_batched_tokens as usize)?;
        Ok(Self { ops, decoder })
    }
}

impl ModelRunner for CpuRunner {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        self.decoder.run(&mut self.ops, step)
    }
}
