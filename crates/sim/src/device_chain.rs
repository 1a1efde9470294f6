//! The KV memory of a simulated device: one number a slot.
//!
//! The number of a token depends on the token and on the number of the one before it, so on all before it, and takes
//! one step to compute whatever the context. It is read and written through the block table, as attention does: a
//! stale block, a missed copy or somebody else's prefix changes it.

use servelab_engine::{BlockId, Step, StepSequence, TokenId};

/// Where every sequence begins.
const START: u64 = 0x5EED_1AB5_0F5E_12E5;

/// `[num_blocks * block_size]` numbers. Memory that was never written costs nothing.
pub struct Chain {
    block_size: usize,
    values: Vec<u64>,
}

impl Chain {
    pub fn new(num_blocks: u32, block_size: u32) -> Self {
        Self { block_size: block_size as usize, values: vec![0; num_blocks as usize * block_size as usize] }
    }

    pub fn copy(&mut self, copies: &[(BlockId, BlockId)]) {
        for (from, to) in copies {
            let (from, to) = (from.0 as usize * self.block_size, to.0 as usize * self.block_size);
            self.values.copy_within(from..from + self.block_size, to);
        }
    }

    /// Stores the tokens of one sequence of the step.
    pub fn write(&mut self, step: &Step, sequence: &StepSequence, tokens: &[TokenId]) {
        let first = step.positions[sequence.tokens.start];
        let mut value = match first.checked_sub(1) {
            Some(before) => self.read(step, sequence, before),
            None => START,
        };
        for index in sequence.tokens.clone() {
            value = mix(value, u64::from(tokens[index]));
            self.values[step.slots[index] as usize] = value;
        }
    }

    /// What is stored at a position of a sequence.
    pub fn read(&self, step: &Step, sequence: &StepSequence, position: u32) -> u64 {
        let position = position as usize;
        let block = step.blocks[sequence.blocks.start + position / self.block_size];
        self.values[block.0 as usize * self.block_size + position % self.block_size]
    }
}

/// The finaliser of SplitMix64 (Steele et al. 2014) over both numbers.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0x1234_5678_9ABC_DEF1);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
