//! How a GPU's memory is divided, once, before the first request: weights and activations are there already,
//! the rest of the share that was asked for becomes the KV pool.

use super::geometry::{self, DecodeWorkspace};
use super::kernels::Specialisation;

/// What the pool's size depends on. All in bytes where nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolDemand {
    /// Of the whole GPU.
    pub total_bytes: u64,
    /// Free after weights, activations and a step of the largest size, so that what the driver and the libraries
    /// took for themselves is counted, and what other processes hold too.
    pub free_bytes: u64,
    /// Of the whole GPU, for everything: 0 to 1.
    pub utilization: f64,
    /// What will be allocated besides the pool whatever its size: recorded graphs, workspaces, step words.
    pub reserved_bytes: u64,
    /// Keys and values of one block, all layers.
    pub block_bytes: u64,
    /// What each block needs besides: workspaces that grow with the pool.
    pub bytes_beside_block: u64,
    pub block_size: u32,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
}

/// The outcome.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolPlan {
    pub blocks: u32,
    pub pool_bytes: u64,
    pub tokens: u64,
    /// How many sequences of the longest length fit at once.
    pub concurrency: f64,
}

/// The pool has no room for one block.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "--gpu-memory-utilization {utilization} allows {allowed_bytes} bytes of the GPU, {taken_bytes} are taken and \
     {reserved_bytes} reserved, so that no block of {block_bytes} bytes is left for keys and values; raise it, choose \
     a smaller model or a narrower dtype, or lower --max-batched-tokens"
)]
pub struct NoRoom {
    pub utilization: f64,
    pub allowed_bytes: u64,
    pub taken_bytes: u64,
    pub reserved_bytes: u64,
    pub block_bytes: u64,
}

impl PoolDemand {
    /// The largest pool that fits.
    ///
    /// # Errors
    /// If not even one block does.
    pub fn plan(&self) -> Result<PoolPlan, NoRoom> {
        let allowed_bytes = (self.total_bytes as f64 * self.utilization.clamp(0.0, 1.0)) as u64;
        let taken_bytes = self.total_bytes.saturating_sub(self.free_bytes);
        let room = allowed_bytes.saturating_sub(taken_bytes).saturating_sub(self.reserved_bytes);
        let blocks = room / (self.block_bytes + self.bytes_beside_block).max(1);
        match blocks {
            0 => Err(NoRoom {
                utilization: self.utilization,
                allowed_bytes,
                taken_bytes,
                reserved_bytes: self.reserved_bytes,
                block_bytes: self.block_bytes,
            }),
            _ => Ok(self.of_blocks(blocks.min(u64::from(most_blocks(self.block_size))) as u32)),
        }
    }

    /// A pool of that many blocks, whether it fits or not.
    pub fn of_blocks(&self, blocks: u32) -> PoolPlan {
        let tokens = u64::from(blocks) * u64::from(self.block_size);
        // A sequence takes whole blocks.
        let of_sequence = self.max_model_len.div_ceil(self.block_size).max(1);
        PoolPlan {
            blocks,
            pool_bytes: u64::from(blocks) * self.block_bytes,
            tokens,
            concurrency: f64::from(blocks) / f64::from(of_sequence),
        }
    }
}

/// Slots are numbered with 32 bits, and the last number stands for "none".
pub fn most_blocks(block_size: u32) -> u32 {
    (u32::MAX - 1) / block_size
}

/// Bytes of the decode kernel's workspaces that each block of the pool adds: one item for every
/// [`geometry::SPLIT_TOKENS`] tokens.
pub fn workspace_bytes_per_block(specialisation: &Specialisation, kv_heads: u32) -> u64 {
    let thousand = DecodeWorkspace::new(specialisation, kv_heads, 0, 1000);
    let per_item = (thousand.items + thousand.partial_values + thousand.partial_sums) as u64 / 1000;
    (per_item * u64::from(specialisation.block_size)).div_ceil(u64::from(geometry::SPLIT_TOKENS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// An 8-billion-parameter model with 128 KiB of keys and values a token.
    fn demand() -> PoolDemand {
        PoolDemand {
            total_bytes: 80 * GIB,
            free_bytes: 60 * GIB,
            utilization: 0.9,
            reserved_bytes: GIB,
            block_bytes: 2 << 20,
            bytes_beside_block: 1 << 10,
            block_size: 16,
            max_model_len: 8192,
        }
    }

    #[test]
    fn the_pool_takes_what_is_left_of_the_share() {
        let plan = demand().plan().unwrap();
        // 72 GiB are allowed, 20 taken, 1 reserved.
        assert_eq!(u64::from(plan.blocks), 51 * GIB / ((2 << 20) + (1 << 10)));
        assert_eq!(plan.tokens, u64::from(plan.blocks) * 16);
        assert_eq!(plan.pool_bytes, u64::from(plan.blocks) << 21);
        assert!((plan.concurrency - plan.tokens as f64 / 8192.0).abs() < 1e-9);
    }

    #[test]
    fn more_of_the_gpu_is_never_a_smaller_pool() {
        let of = |utilization| PoolDemand { utilization, ..demand() }.plan().map_or(0, |plan| plan.blocks);
        let pools: Vec<u32> = (0..=20).map(|twentieth| of(f64::from(twentieth) / 20.0)).collect();
        assert!(pools.is_sorted() && pools[5] == 0 && pools[20] > pools[18], "{pools:?}");
        assert_eq!(of(7.0), of(1.0));
    }

    #[test]
    fn no_room_is_told_in_numbers() {
        let error = PoolDemand { utilization: 0.25, ..demand() }.plan().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("--gpu-memory-utilization 0.25 allows 21474836480 bytes"), "{text}");
        assert!(text.contains("21474836480 are taken and 1073741824 reserved"), "{text}");
    }

    #[test]
    fn blocks_can_all_be_numbered() {
        let tiny = PoolDemand { block_bytes: 1, bytes_beside_block: 0, ..demand() };
        assert_eq!(tiny.plan().unwrap().blocks, most_blocks(16));
        assert!(u64::from(most_blocks(16)) * 16 < u64::from(u32::MAX));
    }
}
