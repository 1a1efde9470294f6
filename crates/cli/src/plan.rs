//! The sizes that depend on the model's shape and on the machine's memory, as a pure function of both.

use servelab_engine::EngineConfig;
use servelab_model::{EngineKind, KvDtype, RunnerOptions};

use crate::memory::{KvDemand, default_kv_blocks};
use crate::settings::{EngineSettings, KvSize};
use crate::size::ByteSize;

/// Longest sequence of the naive engine where nobody says: it computes a prompt in one piece, and its
/// largest step is run once at the start.
const NAIVE_CONTEXT: u32 = 2048;

/// What the sizes depend on besides the settings.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Longest context the model was made for, in tokens.
    pub context: u32,
    /// Of the KV cache, whether asked for or chosen.
    pub kv_dtype: KvDtype,
    /// Bytes of keys and values of one block.
    pub block_bytes: u64,
    pub weight_bytes: u64,
    /// Bytes of memory that the process may still take, where the system tells.
    pub free_bytes: Option<u64>,
}

/// The sizes of one replica.
#[derive(Clone, Debug)]
pub struct Plan {
    pub engine: EngineConfig,
    pub runner: RunnerOptions,
    /// What the operator should know about choices made for them.
    pub notes: Vec<String>,
}

/// Sizes that do not fit the model or the machine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error(
        "--max-model-len {asked} exceeds the model's context of {context} tokens; lower it to {context} or less"
    )]
    BeyondContext { asked: u32, context: u32 },
    #[error(
        "the KV cache of {bytes} holds no whole block ({block_bytes}); give --kv-memory {block_bytes} or more, \
         or a smaller --block-size"
    )]
    NoBlock { bytes: Size, block_bytes: Size },
    #[error(
        "the KV cache of {bytes} does not fit beside weights of {weight_bytes} into the {free_bytes} of memory that \
         are free; lower --kv-memory or --kv-blocks"
    )]
    NoMemory { bytes: Size, weight_bytes: Size, free_bytes: Size },
    #[error(
        "the KV cache of {blocks} blocks of {block_size} tokens exceeds the {most} blocks that can be addressed"
    )]
    TooManyBlocks { blocks: u64, block_size: u32, most: u32 },
}

/// Bytes, shown in a readable unit.
#[derive(Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl std::fmt::Display for Size {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        ByteSize(self.0).fmt(out)
    }
}

/// Decides the sizes. `max_model_len` is the setting, if it was given.
///
/// # Errors
/// If a size that was asked for cannot be had.
pub fn plan(settings: &EngineSettings, max_model_len: Option<u32>, facts: Facts) -> Result<Plan, PlanError> {
    if let Some(asked) = max_model_len.filter(|&asked| asked > facts.context) {
        return Err(PlanError::BeyondContext { asked, context: facts.context });
    }
    let mut notes = Vec::new();
    let num_blocks = blocks(settings, max_model_len, facts)?;
    let room = num_blocks.saturating_mul(settings.block_size);
    let context = wanted_context(settings, max_model_len, facts);
    let max_model_len = max_model_len.unwrap_or(context.min(room));
    if max_model_len > room {
        notes.push(format!(
            "the KV cache holds {room} tokens, less than one sequence of --max-model-len {max_model_len}: longer \
             requests are refused"
        ));
    } else if max_model_len < facts.context && max_model_len == room {
        notes.push(format!(
            "sequences are limited to {max_model_len} of the model's {} tokens, which is what the KV cache holds; \
             raise --kv-memory for longer ones",
            facts.context
        ));
    }
    Ok(sizes(settings, facts.kv_dtype, num_blocks, max_model_len, notes))
}

fn sizes(
    settings: &EngineSettings,
    kv_dtype: KvDtype,
    num_blocks: u32,
    max_model_len: u32,
    notes: Vec<String>,
) -> Plan {
    let max_batched_tokens = match settings.kind {
        EngineKind::Paged => settings.max_batched_tokens,
        EngineKind::Naive => max_model_len,
    };
    let engine = EngineConfig {
        block_size: settings.block_size,
        num_blocks,
        max_model_len,
        max_batched_tokens,
        max_running: settings.max_running,
        max_waiting: settings.max_waiting,
        prefix_cache: settings.prefix_cache,
    };
    let runner = RunnerOptions {
        engine: settings.kind,
        num_blocks,
        block_size: settings.block_size,
        max_model_len,
        max_batched_tokens,
        threads: settings.threads,
        kv_dtype,
    };
    Plan { engine, runner, notes }
}

/// The longest sequence that is worth preparing for.
fn wanted_context(settings: &EngineSettings, max_model_len: Option<u32>, facts: Facts) -> u32 {
    max_model_len.unwrap_or(match settings.kind {
        EngineKind::Paged => facts.context,
        EngineKind::Naive => facts.context.min(NAIVE_CONTEXT),
    })
}

fn blocks(settings: &EngineSettings, max_model_len: Option<u32>, facts: Facts) -> Result<u32, PlanError> {
    let block_size = settings.block_size;
    let most = u32::MAX / block_size;
    let context = wanted_context(settings, max_model_len, facts);
    let blocks = match settings.kv_size {
        KvSize::Blocks(blocks) => u64::from(blocks),
        KvSize::Bytes(bytes) => match bytes / facts.block_bytes.max(1) {
            0 => return Err(PlanError::NoBlock { bytes: Size(bytes), block_bytes: Size(facts.block_bytes) }),
            blocks => blocks,
        },
        KvSize::Suggested if settings.kind == EngineKind::Naive => u64::from(context.div_ceil(block_size)),
        KvSize::Suggested => {
            let max_running = settings.max_running;
            let Facts { block_bytes, weight_bytes, .. } = facts;
            let demand = KvDemand { block_bytes, block_size, context, max_running, weight_bytes };
            default_kv_blocks(demand, facts.free_bytes).min(u64::from(most))
        }
    };
    check_memory(blocks, facts)?;
    u32::try_from(blocks).ok().filter(|&blocks| blocks <= most).ok_or(PlanError::TooManyBlocks {
        blocks,
        block_size,
        most,
    })
}

fn check_memory(blocks: u64, facts: Facts) -> Result<(), PlanError> {
    let bytes = blocks.saturating_mul(facts.block_bytes);
    match facts.free_bytes {
        Some(free) if bytes.saturating_add(facts.weight_bytes) > free => Err(PlanError::NoMemory {
            bytes: Size(bytes),
            weight_bytes: Size(facts.weight_bytes),
            free_bytes: Size(free),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Engine, Typed};
    use crate::settings::Settings;

    const FACTS: Facts = Facts {
        context: 8192,
        kv_dtype: KvDtype::F32,
        block_bytes: 1 << 20,
        weight_bytes: 1 << 30,
        free_bytes: Some(9 << 30),
    };

    fn settings(change: impl FnOnce(&mut Typed)) -> EngineSettings {
        let mut typed = Typed::default();
        change(&mut typed);
        Settings::new(typed, None).unwrap().engine
    }

    #[test]
    fn the_default_takes_a_quarter_of_what_the_weights_leave() {
        let plan = plan(&settings(|_| ()), None, FACTS).unwrap();
        assert_eq!(plan.engine.num_blocks, 2048);
        assert_eq!(plan.engine.max_model_len, 8192);
        assert_eq!(plan.runner.num_blocks, plan.engine.num_blocks);
        assert!(plan.notes.is_empty(), "{:?}", plan.notes);
    }

    #[test]
    fn a_small_cache_shortens_the_default_length_and_says_so() {
        let small = settings(|typed| typed.kv_blocks = Some(10));
        let plan = plan(&small, None, FACTS).unwrap();
        assert_eq!(plan.engine.max_model_len, 160);
        assert!(plan.notes[0].contains("limited to 160 of the model's 8192"), "{:?}", plan.notes);
    }

    #[test]
    fn a_length_that_was_asked_for_stands_and_may_exceed_the_cache() {
        let small = settings(|typed| typed.kv_blocks = Some(10));
        let plan = plan(&small, Some(512), FACTS).unwrap();
        assert_eq!(plan.engine.max_model_len, 512);
        assert!(plan.notes[0].contains("longer requests are refused"), "{:?}", plan.notes);
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        let error = plan(&settings(|_| ()), Some(9000), FACTS).unwrap_err();
        assert_eq!(error, PlanError::BeyondContext { asked: 9000, context: 8192 });
        let tiny = settings(|typed| typed.kv_memory = Some(ByteSize(1000)));
        assert!(matches!(plan(&tiny, None, FACTS), Err(PlanError::NoBlock { .. })));
        let huge = settings(|typed| typed.kv_memory = Some(ByteSize(9 << 30)));
        let error = plan(&huge, None, FACTS).unwrap_err().to_string();
        assert!(error.contains("KV cache of 9.0 GiB does not fit beside weights of 1.0 GiB"), "{error}");
        let many = settings(|typed| typed.kv_blocks = Some(u32::MAX));
        let unknown = Facts { free_bytes: None, ..FACTS };
        assert!(matches!(plan(&many, None, unknown), Err(PlanError::TooManyBlocks { .. })));
    }

    #[test]
    fn the_naive_engine_computes_whole_sequences() {
        let naive = settings(|typed| typed.engine = Some(Engine::Naive));
        let engine = plan(&naive, None, FACTS).unwrap().engine;
        assert_eq!((engine.max_model_len, engine.max_batched_tokens), (2048, 2048));
        assert_eq!((engine.max_running, engine.num_blocks, engine.prefix_cache), (1, 128, false));
        assert_eq!(plan(&naive, Some(4096), FACTS).unwrap().engine.max_batched_tokens, 4096);
    }
}
