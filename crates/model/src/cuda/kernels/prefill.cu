// Attention of prompt chunks over the paged KV cache.
extern "C" __global__ void prefill_attention(
    element* __restrict__ out,              // [rows, kv_heads, GROUP, HEAD_DIM]
    const element* __restrict__ queries,    // [rows, kv_heads, GROUP, HEAD_DIM]
    const kv_element* __restrict__ cache,   // of this layer, see common.cuh
    const u32* __restrict__ items,          // [grid.x, 8]: geometry.rs, PrefillItem
    const u32* __restrict__ block_tables,   // [tables, table_width]
    u32 table_width,
    u32 kv_heads,
    u32 window,                             // 0: none
    float scale,
    float key_scale,
    float value_scale) {
}
