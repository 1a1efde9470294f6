//! One line a step, in fixed columns, so that a run reads like a table.

use std::fmt;

use crate::request::Timestamp;

/// What one step did and the state that it left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTrace {
    /// Counts the calls of `Engine::step`, from 1.
    pub step: u64,
    pub now: Timestamp,
    /// Sequences admitted, preempted, and choices ended.
    pub admitted: u32,
    pub preempted: u32,
    pub finished: u32,
    /// Tokens computed.
    pub decode_tokens: u32,
    pub prefill_tokens: u32,
    /// Blocks copied on write.
    pub copies: u32,
    /// The runner failed.
    pub failed: bool,
    /// After the step.
    pub running: u32,
    pub waiting: u32,
    pub blocks_held: u32,
    pub blocks_cached: u32,
    pub blocks_free: u32,
}

impl StepTrace {
    /// The heading of the columns.
    pub const HEADER: &str =
        "  step    seconds | admit preem  end | decode prefill copy | run  wait |  held cached  free |";
}

impl fmt::Display for StepTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>6} {:>10.3} |", self.step, self.now.as_secs_f64())?;
        write!(f, " {:>5} {:>5} {:>4} |", self.admitted, self.preempted, self.finished)?;
        write!(f, " {:>6} {:>7} {:>4} |", self.decode_tokens, self.prefill_tokens, self.copies)?;
        write!(f, " {:>3} {:>5} |", self.running, self.waiting)?;
        write!(f, " {:>5} {:>6} {:>5} |", self.blocks_held, self.blocks_cached, self.blocks_free)?;
        if self.failed { write!(f, " failed") } else { Ok(()) }
    }
}
