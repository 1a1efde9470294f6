// Attention of decoding sequences over the paged KV cache, split over the context.
extern "C" __global__ void decode_attention(
    element* __restrict__ out,              // [rows, kv_heads, GROUP, HEAD_DIM]
    const element* __restrict__ queries,    // [rows, kv_heads, GROUP, HEAD_DIM]
    const kv_element* __restrict__ cache,   // of this layer, see common.cuh
    const u32* __restrict__ items,          // [capacity, 8]: geometry.rs, DecodeItem
    const u32* __restrict__ item_count,     // [1]
    const u32* __restrict__ block_tables,   // [tables, table_width]
    float* partial_values,                  // workspace, geometry.rs, DecodeWorkspace
    float* partial_sums,
    u32* arrivals,
    u32 table_width,
    u32 kv_heads,
    float scale,
    float key_scale,
    float value_scale) {
}
