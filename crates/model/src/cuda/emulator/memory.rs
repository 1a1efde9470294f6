//! Device memory that shows misuse: fresh memory is NaN in every format, and guard zones around each
//! allocation tell of writes beyond it.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::Mutex;

use super::super::gpu::{GpuError, Span};
use super::lock;

/// All ones: NaN as bf16, f16, f32 and e4m3, and an index far beyond everything.
const POISON: u8 = 0xff;
/// Of each side. Keeps the alignment that the driver promises.
const GUARD: usize = 256;

/// The memory of one allocation with its guards.
pub struct Block {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is only an address and a length; who touches the memory is ordered by streams.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes + 2 * GUARD, GUARD).expect("sizes are below the emulated memory's")
    }

    fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: the layout has at least the two guards.
        let start = unsafe { alloc(layout) };
        assert!(!start.is_null(), "no memory for {bytes} emulated bytes");
        // SAFETY: as long as the layout.
        unsafe { std::ptr::write_bytes(start, POISON, layout.size()) };
        Self { start, bytes }
    }

    pub fn address(&self) -> u64 {
        self.start as u64 + GUARD as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout.
        unsafe { dealloc(self.start, Self::layout(self.bytes)) };
    }
}

/// All live allocations: start and length.
pub struct Allocations {
    total_bytes: u64,
    live: Mutex<BTreeMap<u64, u64>>,
}

impl Allocations {
    pub fn new(total_bytes: u64) -> Self {
        Self { total_bytes, live: Mutex::default() }
    }

    pub fn free_bytes(&self) -> u64 {
        self.total_bytes - lock(&self.live).values().sum::<u64>()
    }

    pub fn add(&self, bytes: usize) -> Result<Block, GpuError> {
        let (wanted_bytes, free_bytes) = (bytes as u64, self.free_bytes());
        if wanted_bytes > free_bytes {
            return Err(GpuError::OutOfMemory { wanted_bytes, free_bytes });
        }
        let block = Block::new(bytes);
        lock(&self.live).insert(block.address(), wanted_bytes);
        Ok(block)
    }

    pub fn remove(&self, block: &Block) {
        lock(&self.live).remove(&block.address());
    }

    /// Whether a span lies within one allocation.
    pub fn holds(&self, span: Span<'_>) -> bool {
        let live = lock(&self.live);
        let before = live.range(..=span.address()).next_back();
        before.is_some_and(|(start, bytes)| span.address() + span.bytes() as u64 <= start + bytes)
    }

    /// Begin and end of each, ascending.
    pub fn ranges(&self) -> Vec<[u64; 2]> {
        lock(&self.live).iter().map(|(start, bytes)| [*start, start + bytes]).collect()
    }

    /// Says which allocation was written beyond.
    pub fn broken_guard(&self) -> Option<String> {
        let live = lock(&self.live);
        let broken = |start: u64| {
            // SAFETY: the guards before and behind a live allocation.
            let guard = unsafe { std::slice::from_raw_parts(start as *const u8, GUARD) };
            guard.iter().any(|byte| *byte != POISON)
        };
        let found =
            live.iter().find(|(start, bytes)| broken(**start - GUARD as u64) || broken(*start + *bytes));
        found.map(|(start, bytes)| format!("wrote beyond the {bytes} bytes at {start:#x}"))
    }
}
