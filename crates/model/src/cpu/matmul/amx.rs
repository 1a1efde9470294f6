//! The register tile in AMX: 16 rows by 32 outputs, 32 inputs per instruction, activations in bf16.
//!
//! Rust has no stable intrinsics for AMX, so the tile instructions stand in inline assembly. Tiles 0 and
//! 1 hold the sums of 16 outputs each, 2 the activations, 3 and 4 the weights. Linux hands the tile
//! state to a process on request only (Linux, Documentation/arch/x86/xstate.rst).

use std::arch::asm;
use std::sync::OnceLock;

use super::PANEL;
use super::micro::Block;

/// Inputs of one instruction.
const INPUTS: usize = 32;

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
    fn new(rows: u8) -> Self {
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..5].fill(64);
        config.rows[..5].copy_from_slice(&[rows, rows, rows, 16, 16]);
        config
    }
}

/// # Safety
/// [`is_available`] said yes; the block's addresses are valid for its shapes; at most 16 rows; inputs in
/// whole multiples of 32.
pub(super) unsafe fn tile(block: &Block) {
    debug_assert!(block.rows <= 16 && block.inputs.is_multiple_of(INPUTS));
    let config = Config::new(block.rows as u8);
    // SAFETY: the configuration is valid for palette 1: at most 16 rows of 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack)) };
    for panel in 0..block.panels {
        // SAFETY: the caller's.
        unsafe { one_panel(block, panel) };
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
    let mut config = Config::new(16);
    config.row_bytes[..8].fill(64);
    config.rows[..8].fill(16);
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

unsafe fn one_panel(block: &Block, panel: usize) {
    // SAFETY: the caller's: the block's addresses are valid for its shapes.
    unsafe {
        let mut weights = block.weights.add(panel * block.panel_bytes);
        let mut x = block.x;
        let out = block.out.add(panel * PANEL);
        if block.first {
            start_rows(block, panel, out);
        }
        asm!(
            "tileloadd tmm0, [{out} + {stride}]",
            "tileloadd tmm1, [{out} + {stride} + 64]",
            out = in(reg) out,
            stride = in(reg) block.out_stride * 4,
            options(nostack),
        );
        for _ in 0..block.inputs / INPUTS {
            prefetch(weights, block);
            asm!(
                "tileloadd tmm2, [{x} + {x_stride}]",
                "tileloadd tmm3, [{w} + {w_stride}]",
                "tileloadd tmm4, [{w} + {w_stride} + 64]",
                "tdpbf16ps tmm0, tmm2, tmm3",
                "tdpbf16ps tmm1, tmm2, tmm4",
                x = in(reg) x,
                x_stride = in(reg) block.x_row_bytes,
                w = in(reg) weights,
                w_stride = in(reg) PANEL * 4,
                options(nostack, readonly),
            );
            x = x.add(INPUTS * 2);
            weights = weights.add(INPUTS * PANEL * 2);
        }
        asm!(
            "tilestored [{out} + {stride}], tmm0",
            "tilestored [{out} + {stride} + 64], tmm1",
            out = in(reg) out,
            stride = in(reg) block.out_stride * 4,
            options(nostack),
        );
    }
}

/// Sums start from the bias or zero: written to `out`, whence the tiles are loaded.
unsafe fn start_rows(block: &Block, panel: usize, out: *mut f32) {
    for row in 0..block.rows {
        // SAFETY: the caller's.
        unsafe {
            let target = out.add(row * block.out_stride);
            if block.bias.is_null() {
                target.write_bytes(0, PANEL);
            } else {
                target.copy_from_nonoverlapping(block.bias.add(panel * PANEL), PANEL);
            }
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
