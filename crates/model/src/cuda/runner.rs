//! The runner that the engine drives: steps put on the GPU, decode steps as recorded graphs, answers collected
//! later.
//!
//! A step of a large model is several hundred launches, each of which costs the host a few microseconds: for a
//! small batch that is longer than the GPU works. A step in which every sequence computes one token and wants
//! the next is the same launches every time, so it is recorded once for each of a ladder of batch sizes and
//! replayed with one call. A batch between two sizes runs in the larger, its last rows padded.

use std::sync::Arc;

use servelab_engine::{
    BlockId, Draw, LogitsRow, ModelRunner, RunnerError, SamplingParams, SequenceId, Step, StepOutput,
    StepSequence, Submitted, Want,
};

use super::geometry::graph_ladder;
use super::gpu::{Gpu, GpuError};
use super::ops::{CudaOps, CudaOptions, GpuTime, STEPS_AT_ONCE};
use super::plan::{PoolDemand, workspace_bytes_per_block};
use super::upload::StepSize;
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::load::Progress;
use crate::ops::{Ops, Pass};
use crate::weights::Weights;

/// Tokens of the sequences that the largest step is tried with.
const TRIAL_TOKENS: u32 = 512;

/// Ways to run steps, which can be switched off to see what they are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ways {
    /// Decode steps are recorded once and replayed.
    pub graphs: bool,
    /// The host prepares a step while the one before runs.
    pub overlap: bool,
}

impl Default for Ways {
    fn default() -> Self {
        Self { graphs: true, overlap: true }
    }
}

/// A model on a GPU that has no pool yet.
pub struct CudaModel<G: Gpu> {
    ops: CudaOps<G>,
    decoder: Decoder<CudaOps<G>>,
    /// What one recorded step takes of the GPU's memory.
    graph_bytes: u64,
}

impl<G: Gpu> CudaModel<G> {
    /// Compiles kernels, brings the weights to the GPU and makes the activations.
    ///
    /// # Errors
    /// If model or GPU are not supported, a weight is missing, or there is no memory.
    pub fn load(
        gpu: Arc<G>,
        config: &ModelConfig,
        weights: &Weights,
        options: CudaOptions,
        progress: Progress,
    ) -> Result<Self, ModelError> {
        let mut ops = CudaOps::new(gpu, config, options)?;
        ops.watch(progress);
        let decoder = Decoder::load(&mut ops, config, weights, options.max_batched_tokens)?;
        ops.loaded()?;
        Ok(Self { ops, decoder, graph_bytes: 0 })
    }

    pub fn weight_bytes(&self) -> u64 {
        self.ops.weight_bytes()
    }

    pub fn activation_bytes(&self) -> u64 {
        self.ops.activation_bytes()
    }

    /// Runs a step of every size for which products are chosen, the largest included, in a small pool that is
    /// gone afterwards: what the driver and the libraries take for themselves they have taken then.
    ///
    /// # Errors
    /// [`ModelError::WarmUp`] if a step fails, [`ModelError::Gpu`] if there is no memory.
    pub fn try_all_sizes(&mut self, ways: Ways) -> Result<(), ModelError> {
        let options = *self.ops.options();
        let sequences = options.max_sequences as u32;
        let longest = options.max_batched_tokens as u32;
        let context = longest.div_ceil(sequences).max(TRIAL_TOKENS).min(options.max_model_len);
        // No step has more than all sequences at their longest.
        let most_tokens = longest.min(context.saturating_mul(sequences));
        self.ops.make_pool(context.div_ceil(options.block_size) as usize)?;
        let ladder = ladder(&options, self.ops.logits_rows());
        for rows in &ladder {
            self.run(&decode_step(*rows as usize))?;
        }
        let mut tokens = TRIAL_TOKENS;
        while tokens < most_tokens {
            self.run(&prompt_step(tokens, context, options.block_size))?;
            tokens *= 2;
        }
        self.run(&prompt_step(most_tokens, context, options.block_size))?;
        if ways.graphs {
            self.measure_graph(ladder.last().copied().unwrap_or(1) as usize)?;
        }
        self.ops.drop_pool()?;
        Ok(())
    }

    fn run(&mut self, step: &Step) -> Result<(), ModelError> {
        let outcome = self.decoder.run(&mut self.ops, step);
        outcome.map(drop).map_err(|error| ModelError::WarmUp(error.to_string()))
    }

    fn measure_graph(&mut self, rows: usize) -> Result<(), ModelError> {
        let gpu = Arc::clone(self.ops.gpu());
        let before = gpu.free_bytes()?;
        let graph = record(&mut self.ops, &mut self.decoder, rows)?;
        self.graph_bytes = before.saturating_sub(gpu.free_bytes()?);
        drop(graph);
        Ok(())
    }

    /// What the pool's size depends on, to be asked after [`CudaModel::try_all_sizes`].
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    pub fn pool_demand(&self, utilization: f64, ways: Ways) -> Result<PoolDemand, GpuError> {
        let options = self.ops.options();
        let graphs = if ways.graphs { ladder(options, self.ops.logits_rows()).len() as u64 } else { 0 };
        let beside = workspace_bytes_per_block(self.ops.specialisation(), self.ops.kv_heads());
        Ok(PoolDemand {
            total_bytes: self.ops.gpu().info().memory_bytes,
            free_bytes: self.ops.gpu().free_bytes()?,
            utilization,
            reserved_bytes: graphs * self.graph_bytes + self.ops.bytes_beside_pool(0) as u64,
            block_bytes: self.ops.block_bytes() as u64,
            bytes_beside_block: beside,
            block_size: options.block_size,
            max_model_len: options.max_model_len,
        })
    }

    /// Makes the pool and records the decode steps.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn into_runner(mut self, blocks: usize, ways: Ways) -> Result<CudaRunner<G>, ModelError> {
        self.ops.make_pool(blocks)?;
        let mut graphs = Vec::new();
        if ways.graphs {
            for rows in ladder(self.ops.options(), self.ops.logits_rows()) {
                // Once as it is, so that nothing is loaded or chosen while it is recorded.
                self.run(&decode_step(rows as usize))?;
                graphs.push((rows as usize, record(&mut self.ops, &mut self.decoder, rows as usize)?));
            }
        }
        self.ops.restart_clock();
        Ok(CudaRunner { graphs, ops: self.ops, decoder: self.decoder, ways })
    }
}

/// Batch sizes that are recorded: those whose logits are computed in one pass.
fn ladder(options: &CudaOptions, logits_rows: usize) -> Vec<u32> {
    graph_ladder(options.max_sequences.min(logits_rows).min(options.max_batched_tokens) as u32)
}

/// Records a decode step of `rows` sequences.
fn record<G: Gpu>(
    ops: &mut CudaOps<G>,
    decoder: &mut Decoder<CudaOps<G>>,
    rows: usize,
) -> Result<G::Graph, ModelError> {
    let step = decode_step(rows);
    let passes = Pass::split(&step.rows, ops.logits_rows());
    let failed = |error: RunnerError| ModelError::WarmUp(error.to_string());
    ops.begin_padded(&step, &passes, StepSize::decode(rows)).map_err(failed)?;
    let (gpu, stream) = (Arc::clone(ops.gpu()), Arc::clone(ops.stream()));
    let graph = gpu.capture(&stream, &mut || {
        decoder.compute(ops, &step, &passes).map_err(|error| GpuError::Refused {
            what: format!("recording a step of {rows} rows"),
            reason: error.to_string(),
        })
    });
    ops.abandon();
    Ok(graph?)
}

/// `rows` sequences of one token, each in the first slot, which nobody reads later.
fn decode_step(rows: usize) -> Step {
    let sampling = Arc::new(SamplingParams::greedy());
    let want = |row| LogitsRow {
        row,
        sequence: SequenceId(row as u64),
        want: Want::Sample(Draw {
            sampling: Arc::clone(&sampling),
            choice: 0,
            output_index: 0,
            banned: [].into(),
            history: None,
        }),
    };
    Step {
        tokens: vec![0; rows],
        positions: vec![0; rows],
        slots: vec![0; rows],
        blocks: vec![BlockId(0)],
        sequences: (0..rows)
            .map(|row| StepSequence {
                id: SequenceId(row as u64),
                tokens: row..row + 1,
                blocks: 0..1,
                context_len: 1,
            })
            .collect(),
        rows: (0..rows).map(want).collect(),
        ..Step::default()
    }
}

/// Prompts of `context` tokens and a rest, `tokens` in all, which share their blocks; the last token of each is
/// answered.
fn prompt_step(tokens: u32, context: u32, block_size: u32) -> Step {
    let mut step =
        Step { blocks: (0..context.div_ceil(block_size)).map(BlockId).collect(), ..Step::default() };
    let mut draws = decode_step(tokens.div_ceil(context) as usize).rows;
    for (index, first) in (0..tokens).step_by(context as usize).enumerate() {
        let length = context.min(tokens - first);
        step.positions.extend(0..length);
        step.slots.extend(0..length);
        step.sequences.push(StepSequence {
            id: SequenceId(index as u64),
            tokens: first as usize..(first + length) as usize,
            blocks: 0..length.div_ceil(block_size) as usize,
            context_len: length,
        });
        draws[index].row = (first + length - 1) as usize;
    }
    step.tokens = vec![0; tokens as usize];
    step.rows = draws;
    step
}

/// Runs steps on a GPU.
pub struct CudaRunner<G: Gpu> {
    // Before the memory that they name.
    graphs: Vec<(usize, G::Graph)>,
    decoder: Decoder<CudaOps<G>>,
    ops: CudaOps<G>,
    ways: Ways,
}

impl<G: Gpu> CudaRunner<G> {
    pub fn pool_bytes(&self) -> u64 {
        self.ops.pool_bytes()
    }

    pub fn gpu(&self) -> &Arc<G> {
        self.ops.gpu()
    }

    /// How the GPU spent its time since the runner was made.
    pub fn time(&self) -> GpuTime {
        self.ops.time()
    }

    /// Puts a step on the GPU.
    fn put(&mut self, step: &Step) -> Result<(), RunnerError> {
        let passes = Pass::split(&step.rows, self.ops.logits_rows());
        let rows = self.ops.decode_rows(step, &passes);
        let graph = rows.and_then(|rows| self.graphs.iter().find(|(size, _)| *size >= rows));
        let size = graph.map_or_else(|| StepSize::of(step, &passes), |(size, _)| StepSize::decode(*size));
        self.ops.begin_padded(step, &passes, size)?;
        match graph {
            Some((_, graph)) if self.ops.samples_at_once() => {
                self.ops.gpu().replay(self.ops.stream(), graph)?;
            }
            _ if step.tokens.is_empty() => {}
            _ => self.decoder.compute(&mut self.ops, step, &passes)?,
        }
        self.ops.finish()
    }
}

impl<G: Gpu> Drop for CudaRunner<G> {
    /// What the two ways of running steps are worth shows here.
    fn drop(&mut self) {
        let GpuTime { steps, busy_seconds, idle_seconds } = self.time();
        if steps > 0 {
            let share = 100.0 * idle_seconds / (busy_seconds + idle_seconds);
            tracing::info!(
                steps,
                busy_seconds,
                idle_seconds,
                "the GPU computed {steps} steps in {busy_seconds:.2} s and waited {idle_seconds:.2} s between them \
                 ({share:.1} %)"
            );
        }
    }
}

impl<G: Gpu> ModelRunner for CudaRunner<G> {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        self.submit(step)?;
        self.collect()
    }

    fn steps_at_once(&self) -> usize {
        if self.ways.overlap { STEPS_AT_ONCE } else { 1 }
    }

    fn submit(&mut self, step: &Step) -> Result<Submitted, RunnerError> {
        let outcome = self.put(step);
        if outcome.is_err() {
            self.ops.abandon();
        }
        outcome.map(|()| Submitted::UnderWay)
    }

    fn collect(&mut self) -> Result<StepOutput, RunnerError> {
        self.ops.answers()
    }
}
