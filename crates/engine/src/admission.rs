//! What is refused at the door, with the reason: a request that could never be served, and one too
//! many.

use crate::config::EngineConfig;
use crate::request::{Request, RequestId};

/// Why a request was not taken. Nothing of it remains in the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    #[error("{field} is 0; give at least 1")]
    Zero { field: &'static str },
    #[error("n {n} exceeds the {max_running} sequences that run at once; lower n to {max_running} or less")]
    TooManyChoices { n: u32, max_running: u32 },
    #[error(
        "max_tokens {max_tokens} + prompt {prompt} exceeds the context length {max_model_len}; {}",
        advice_for_context(*prompt, *max_model_len)
    )]
    ContextLength { prompt: u32, max_tokens: u32, max_model_len: u32 },
    #[error(
        "the request needs {needed} KV blocks and the pool has {num_blocks}; shorten the prompt, lower \
         max_tokens or n, or start the server with more KV memory"
    )]
    NeverFits { needed: u32, num_blocks: u32 },
    #[error("{max_waiting} requests are already waiting; try again later")]
    QueueFull { max_waiting: u32 },
    #[error("request id {0:?} is already in use")]
    DuplicateId(RequestId),
}

fn advice_for_context(prompt: u32, max_model_len: u32) -> String {
    match max_model_len.saturating_sub(prompt) {
        0 => format!("shorten the prompt to {} tokens or less", max_model_len.saturating_sub(1)),
        room => format!("lower max_tokens to {room} or less"),
    }
}

/// Checks all that does not depend on what else is in the engine.
pub(crate) fn check_request(request: &Request, config: &EngineConfig) -> Result<(), AdmissionError> {
    if request.prompt.is_empty() {
        return Err(AdmissionError::EmptyPrompt);
    }
    let (n, max_tokens) = (request.n, request.stop.max_tokens);
    if n == 0 {
        return Err(AdmissionError::Zero { field: "n" });
    }
    if max_tokens == 0 {
        return Err(AdmissionError::Zero { field: "max_tokens" });
    }
    if n > config.max_running {
        return Err(AdmissionError::TooManyChoices { n, max_running: config.max_running });
    }
    let max_model_len = config.max_model_len;
    if request.prompt.len() as u64 + u64::from(max_tokens) > u64::from(max_model_len) {
        let prompt = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        return Err(AdmissionError::ContextLength { prompt, max_tokens, max_model_len });
    }
    let needed = blocks_needed(request, config.block_size);
    if needed > u64::from(config.num_blocks) {
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        return Err(AdmissionError::NeverFits { needed, num_blocks: config.num_blocks });
    }
    Ok(())
}

/// The most blocks that the request ever holds: its choices share the full blocks of the prompt and
/// nothing else. The last token of a choice is never computed and needs no slot.
fn blocks_needed(request: &Request, block_size: u32) -> u64 {
    let block_size = u64::from(block_size);
    let prompt = request.prompt.len() as u64;
    let longest = (prompt + u64::from(request.stop.max_tokens) - 1).div_ceil(block_size);
    let shared = prompt / block_size;
    shared + u64::from(request.n) * (longest - shared)
}
