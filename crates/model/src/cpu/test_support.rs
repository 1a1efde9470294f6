//! What the tests of several kernels share.

use super::level::{Kernels, Level};
pub(super) use super::random::Random;

impl Random {
    /// Values that bf16 holds exactly.
    pub fn bf16_vec(&mut self, len: usize) -> Vec<f32> {
        self.vec(len).into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect()
    }
}

/// Kernels at each level that this CPU has.
pub(super) fn kernels_of_all_levels(threads: usize) -> Vec<Kernels> {
    Level::ALL.into_iter().filter_map(|level| Kernels::with_level(level, threads).ok()).collect()
}

/// Equal up to `tolerance` times the greatest value wanted; NaN is never equal.
#[track_caller]
pub(super) fn assert_close(out: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(out.len(), want.len());
    let scale = want.iter().fold(1e-6f32, |scale, want| scale.max(want.abs()));
    for (index, (out, want)) in out.iter().zip(want).enumerate() {
        let close = (out - want).abs() <= tolerance * scale;
        assert!(close, "at {index}: {out}, not {want} (scale {scale})");
    }
}
