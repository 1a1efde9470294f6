//! Sizes and limits of one engine, and the check that they fit together.

/// Sizes and limits of one engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens per KV block; a power of two.
    pub block_size: u32,
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Longest sequence, prompt and output together, in tokens.
    pub max_model_len: u32,
    /// Most tokens computed in one step.
    pub max_batched_tokens: u32,
    /// Most sequences that run at once.
    pub max_running: u32,
    /// Most requests that wait at once.
    pub max_waiting: u32,
    /// Keep the blocks of ended sequences and reuse them for equal prefixes.
    pub prefix_cache: bool,
}

/// Largest block in tokens: a block is the unit of waste, and of a prefix hit.
pub const MAX_BLOCK_SIZE: u32 = 1024;

/// Why an [`EngineConfig`] cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("block_size {0} is not a power of two between 1 and {MAX_BLOCK_SIZE}; 16 is usual")]
    BlockSize(u32),
    #[error("{field} {value} is too small; it must be at least {least}")]
    TooSmall { field: &'static str, value: u32, least: u32 },
    #[error(
        "num_blocks {num_blocks} of {block_size} tokens exceed the 2^32 slots that can be addressed; \
         lower num_blocks to {} or less", u32::MAX / block_size
    )]
    TooManySlots { num_blocks: u32, block_size: u32 },
    #[error(
        "max_batched_tokens {max_batched_tokens} is less than max_running {max_running}, so not every \
         running sequence could decode in each step; raise the one or lower the other"
    )]
    BatchSmallerThanRunning { max_batched_tokens: u32, max_running: u32 },
}

impl EngineConfig {
    /// # Errors
    /// The first setting that is impossible by itself or together with another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !self.block_size.is_power_of_two() || self.block_size > MAX_BLOCK_SIZE {
            return Err(ConfigError::BlockSize(self.block_size));
        }
        at_least("num_blocks", self.num_blocks, 1)?;
        at_least("max_model_len", self.max_model_len, 2)?;
        at_least("max_running", self.max_running, 1)?;
        at_least("max_waiting", self.max_waiting, 1)?;
        let (num_blocks, block_size) = (self.num_blocks, self.block_size);
        if u64::from(num_blocks) * u64::from(block_size) > u64::from(u32::MAX) {
            return Err(ConfigError::TooManySlots { num_blocks, block_size });
        }
        let (max_batched_tokens, max_running) = (self.max_batched_tokens, self.max_running);
        if max_batched_tokens < max_running {
            return Err(ConfigError::BatchSmallerThanRunning { max_batched_tokens, max_running });
        }
        Ok(())
    }
}

fn at_least(field: &'static str, value: u32, least: u32) -> Result<(), ConfigError> {
    if value < least { Err(ConfigError::TooSmall { field, value, least }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> EngineConfig {
        EngineConfig {
            block_size: 16,
            num_blocks: 8,
            max_model_len: 128,
            max_batched_tokens: 32,
            max_running: 4,
            max_waiting: 4,
            prefix_cache: true,
        }
    }

    #[test]
    fn impossible_settings_are_refused_by_name() {
        assert_eq!(good().validate(), Ok(()));
        let bad = [
            (EngineConfig { block_size: 0, ..good() }, "block_size 0"),
            (EngineConfig { block_size: 24, ..good() }, "block_size 24"),
            (EngineConfig { block_size: 2048, ..good() }, "block_size 2048"),
            (EngineConfig { num_blocks: 0, ..good() }, "num_blocks 0"),
            (EngineConfig { num_blocks: 1 << 29, ..good() }, "num_blocks 536870912"),
            (EngineConfig { max_model_len: 1, ..good() }, "max_model_len 1"),
            (EngineConfig { max_running: 0, ..good() }, "max_running 0"),
            (EngineConfig { max_waiting: 0, ..good() }, "max_waiting 0"),
            (EngineConfig { max_batched_tokens: 3, ..good() }, "max_batched_tokens 3"),
        ];
        for (config, start) in bad {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }
}
