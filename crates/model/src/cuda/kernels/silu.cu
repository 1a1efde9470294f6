// The gate of the feed-forward: out = silu(gate) * up, silu(x) = x / (1 + e^-x) (Shazeer 2020, SwiGLU).
// Bound by bytes: 3 numbers an output.
//
// Grid [rows, chunks of 256 vectors], 256 threads; `inner` is a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) silu_mul(
    element* __restrict__ out,            // [rows, inner]
    const element* __restrict__ gate_up,  // [rows, 2, inner]
    u32 inner) {
    u32 at = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (at >= inner) return;
    const element* row = gate_up + (u64)blockIdx.x * 2 * inner;
    float gate[8], up[8];
    load8(gate, row + at);
    load8(up, row + inner + at);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        // e^-x overflows to infinity for large negative x, and the quotient is 0 as it should be.
        gate[i] = __fdividef(gate[i], 1.0f + exp2_fast(-1.44269504f * gate[i])) * up[i];
    }
    store8(out + (u64)blockIdx.x * inner + at, gate);
}
