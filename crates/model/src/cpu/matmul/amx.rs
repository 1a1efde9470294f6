//! The register tile in AMX: up to 32 rows by 32 outputs, 32 inputs per instruction, activations in bf16.
//!
//! Rust has no stable intrinsics for AMX, so the tile instructions stand in inline assembly. Tiles 0 to 3 hold
//! the sums, of 16 rows and 16 outputs each, 4 and 5 the activations, 6 and 7 the weights: four loads for four
//! products. Up to 16 rows make do with half of the sums. Linux hands the tile state to a process on request
//! only (Linux, Documentation/arch/x86/xstate.rst).

use std::arch::asm;
use std::sync::OnceLock;

use super::micro::Block;
use super::{MOST_TILE_ROWS, PANEL};

/// Inputs of one instruction.
const INPUTS: usize = 32;
/// Most rows of a tile; a block has up to two of them.
const ROWS: usize = MOST_TILE_ROWS / 2;

/// Whether the CPU has AMX with bf16 and the system lets this process use it.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cpu_has_amx() && permitted())
}

fn cpu_has_amx() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 0b11 << 17;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV with ECX = 0 is defined where CPUID reports OSXSAVE.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    let enabled = u64::from(high) << 32 | u64::from(low);
    let features = __cpuid_count(7, 0).edx;
    enabled & TILE_STATE == TILE_STATE && features & AMX_BF16 != 0 && features & AMX_TILE != 0
}

/// Asks the system for the tile state, for all threads of the process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this system call only changes what the process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The operand of `ldtilecfg` (Intel SDM, LDTILECFG).
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Two tiles of activations with so many rows, their sums, and the weights.
    fn new(upper: u8, lower: u8) -> Self {
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, 16, 16]);
        // A tile without rows has to be without columns.
        for (bytes, rows) in config.row_bytes.iter_mut().zip(config.rows) {
            *bytes = if rows > 0 { 64 } else { 0 };
        }
        config
    }
}

/// # Safety
/// [`is_available`] said yes; the block's addresses are valid for its shapes; at most [`MOST_TILE_ROWS`] rows; inputs in
/// whole multiples of [`INPUTS`].
pub(super) unsafe fn tile(block: &Block) {
    debug_assert!(block.rows <= MOST_TILE_ROWS && block.inputs.is_multiple_of(INPUTS));
    let upper = if block.rows <= ROWS { block.rows } else { block.rows.div_ceil(2) };
    let lower = block.rows - upper;
    let config = Config::new(upper as u8, lower as u8);
    // SAFETY: the configuration is valid for palette 1: at most 16 rows of 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack)) };
    for panel in 0..block.panels {
        // SAFETY: the caller's, and the configuration is the one for these rows.
        unsafe {
            match lower {
                0 => one_panel::<false>(block, panel, upper),
                _ => one_panel::<true>(block, panel, upper),
            }
        }
    }
    // SAFETY: gives the tile state back, so that no context switch has to save it.
    unsafe { asm!("tilerelease", options(nomem, nostack)) };
}

/// Operations of one round of [`rate`]: four products of 16 rows by 16 outputs by 32 inputs.
pub(in crate::cpu) const ROUND_FLOPS: usize = 4 * 16 * 16 * INPUTS * 2;

/// Nothing but `tdpbf16ps` on tiles of zeros, to measure how many the CPU does.
///
/// # Safety
/// [`is_available`] said yes.
pub(in crate::cpu) unsafe fn rate(rounds: usize) -> f32 {
    let config = Config::new(16, 16);
    // SAFETY: the configuration is valid for palette 1: at most 16 rows of 64 bytes; it zeroes the tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack)) };
    for _ in 0..rounds {
        // SAFETY: changes nothing but tiles.
        unsafe {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nomem, nostack),
            );
        }
    }
    // SAFETY: gives the tile state back.
    unsafe { asm!("tilerelease", options(nomem, nostack)) };
    0.0
}

/// Where the sums of a panel start from: the bias, the same for all rows, or what is there already.
#[derive(Clone, Copy)]
struct Start {
    at: *const f32,
    /// Bytes from one row to the next: none where all start from the same.
    stride: usize,
}

impl Start {
    /// # Safety
    /// As [`tile`]; `out` is where the panel's sums of the first row go.
    unsafe fn of(block: &Block, panel: usize, out: *const f32) -> Self {
        static ZEROS: [f32; PANEL] = [0.0; PANEL];
        match (block.first, block.bias.is_null()) {
            (true, true) => Self { at: ZEROS.as_ptr(), stride: 0 },
            // SAFETY: the caller's: there is a bias for each output.
            (true, false) => Self { at: unsafe { block.bias.add(panel * PANEL) }, stride: 0 },
            (false, _) => Self { at: out, stride: block.out_stride * 4 },
        }
    }
}

/// `upper` rows, and with `LOWER` the rest of the block's.
///
/// # Safety
/// As [`tile`], with the tiles configured for these rows.
unsafe fn one_panel<const LOWER: bool>(block: &Block, panel: usize, upper: usize) {
    // SAFETY: the caller's: the block's addresses are valid for its shapes.
    unsafe {
        let mut weights = block.weights.add(panel * block.panel_bytes);
        let mut x = block.x;
        let out = block.out.add(panel * PANEL);
        let start = Start::of(block, panel, out);
        asm!(
            "tileloadd tmm0, [{start} + {stride}]",
            "tileloadd tmm1, [{start} + {stride} + 64]",
            start = in(reg) start.at,
            stride = in(reg) start.stride,
            options(nostack, readonly),
        );
        if LOWER {
            asm!(
                "tileloadd tmm2, [{start} + {stride}]",
                "tileloadd tmm3, [{start} + {stride} + 64]",
                start = in(reg) start.at.byte_add(upper * start.stride),
                stride = in(reg) start.stride,
                options(nostack, readonly),
            );
        }
        for _ in 0..block.inputs / INPUTS {
            prefetch(weights, block);
            asm!(
                "tileloadd tmm6, [{w} + {w_stride}]",
                "tileloadd tmm4, [{x} + {x_stride}]",
                "tileloadd tmm7, [{w} + {w_stride} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                x = in(reg) x,
                x_stride = in(reg) INPUTS * 2,
                w = in(reg) weights,
                w_stride = in(reg) PANEL * 4,
                options(nostack, readonly),
            );
            if LOWER {
                asm!(
                    "tileloadd tmm5, [{x} + {x_stride}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    x = in(reg) x.add(upper * INPUTS * 2),
                    x_stride = in(reg) INPUTS * 2,
                    options(nostack, readonly),
                );
            }
            x = x.add(block.rows * INPUTS * 2);
            weights = weights.add(INPUTS * PANEL * 2);
        }
        let stride = block.out_stride * 4;
        asm!(
            "tilestored [{out} + {stride}], tmm0",
            "tilestored [{out} + {stride} + 64], tmm1",
            out = in(reg) out,
            stride = in(reg) stride,
            options(nostack),
        );
        if LOWER {
            asm!(
                "tilestored [{out} + {stride}], tmm2",
                "tilestored [{out} + {stride} + 64], tmm3",
                out = in(reg) out.byte_add(upper * stride),
                stride = in(reg) stride,
                options(nostack),
            );
        }
    }
}

/// Asks for the weights ahead that correspond to one instruction's, see [`super::Prefetch`].
fn prefetch(weights: *const u8, block: &Block) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in (0..INPUTS * PANEL * 2).step_by(128) {
        // SAFETY: a prefetch takes any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(block.prefetch.even + line).cast());
            _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(block.prefetch.odd + line).cast());
        }
    }
}
