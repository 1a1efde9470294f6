// Attention of prompt chunks over the paged KV cache: causal, of several sequences in one launch, earlier blocks
// read through the block table (FlashAttention-2, Dao 2023).
//
// A block of threads computes a tile of ROWS queries of one sequence and key head, KEYS keys at a time. Queries are
// the chunk's tokens times the heads that share the key head, so that a short chunk fills a tile too and each
// loaded key serves all its heads. Bound by the matrix instructions for long chunks (4 * HEAD_DIM operations
// a query and key), by bytes for short ones.
//
// Each warp owns ROWS / WARPS queries, 32 where registers allow: every matrix load of keys then serves two
// products, without which shared memory would be the limit. The next keys and values are loaded while
// a tile is computed; one barrier a tile.
//
// Grid [items, kv_heads], 32 * WARPS threads.

#define THREADS (32 * WARPS)
#define STEPS (HEAD_DIM / 16)
// Tiles of 16 queries of a warp.
#define QUERY_TILES (ROWS / WARPS / 16)

#define QUERY_STRIDE (16 * ((HEAD_DIM * 2 / 16) | 1))
#define ROW_BYTES (HEAD_DIM * (int)sizeof(kv_element))
#define UNITS (ROW_BYTES / 16)
#define STRIDE (16 * (UNITS | 1))
// Keys, then values.
#define STAGE_BYTES (2 * KEYS * STRIDE)

#if KV == E4M3
// 8-bit numbers are widened to f16, which holds them exactly, and multiplied as such.
#define PACK pack_f16
#define MULTIPLY multiply_f16
#else
#define PACK pack
#define MULTIPLY multiply
#endif

// geometry.rs, PrefillItem
struct work_item {
    u32 first_row, tokens, context_len, table, tile;
};

__device__ inline work_item load_item(const u32* items, u32 index) {
    uint4 first = ((const uint4*)items)[2 * index];
    return {first.x, first.y, first.z, first.w, items[8 * index + 4]};
}

// The tile's queries, as the matrix loads want them; rows beyond the chunk are zeros.
__device__ inline void load_queries(u8* to, const element* queries, const work_item& item, u32 kv_heads) {
    u32 rows = item.tokens * GROUP, units = HEAD_DIM * 2 / 16;
    for (u32 unit = threadIdx.x; unit < ROWS * units; unit += THREADS) {
        u32 row = unit / units, part = unit % units, of_chunk = item.tile * ROWS + row;
        bool exists = of_chunk < rows;
        u32 token = exists ? of_chunk / GROUP : 0, head = exists ? of_chunk % GROUP : 0;
        u64 at = (((u64)(item.first_row + token) * kv_heads + blockIdx.y) * GROUP + head) * HEAD_DIM + part * 8;
        u8* place = to + row * QUERY_STRIDE + part * 16;
#if KV == E4M3
        // In f16, and within 16 dimensions in the order in which widening 8-bit keys gives theirs: the pair
        // 4c, 4c+1 stands at 2c, the pair 4c+2, 4c+3 at 2c+8.
        float x[8] = {};
        if (exists) load8(x, queries + at);
        u8* step = place - part % 2 * 16;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 pair = part % 2 * 4 + i;
            *(u32*)(step + pair / 2 * 4 + pair % 2 * 16) = pack_f16(x[2 * i], x[2 * i + 1]);
        }
#else
        copy_async(place, queries + at, exists);
#endif
    }
}

// Asks for a tile of keys and values; positions outside [begin, end) become zeros.
__device__ inline void request_tile(
    u8* to, const kv_element* cache, const u32* table, u32 kv_heads, u32 start, u32 begin, u32 end) {
    u64 to_values = (u64)kv_heads * BLOCK_SIZE * ROW_BYTES;
#pragma unroll
    for (u32 unit = threadIdx.x; unit < KEYS * UNITS; unit += THREADS) {
        u32 row = unit / UNITS, part = unit % UNITS, position = start + row;
        bool seen = position >= begin && position < end;
        u32 block = seen ? table[position / BLOCK_SIZE] : 0;
        const u8* from =
            (const u8*)(cache + key_index(block, blockIdx.y, kv_heads) + position % BLOCK_SIZE * HEAD_DIM) + part * 16;
        u8* place = to + row * STRIDE + part * 16;
        copy_async(place, from, seen);
        copy_async(place + KEYS * STRIDE, from + to_values, seen);
    }
    commit_copies();
}

// scores[tile][8 keys][..] += queries * transposed(keys), for the warp's queries.
__device__ inline void score(float (&scores)[QUERY_TILES][KEYS / 8][4], const u8* queries, const u8* keys) {
    u32 lane = threadIdx.x % 32;
    const u8* query_row = queries + (lane % 16) * QUERY_STRIDE + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[QUERY_TILES][4];
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; tile++) {
            load_matrices(a[tile], query_row + tile * 16 * QUERY_STRIDE + step * 32);
        }
#if KV == E4M3
        // A matrix row of 16 bytes is a whole step of one key: four matrices are 32 keys.
#pragma unroll
        for (int key = 0; key < KEYS; key += 32) {
            u32 m[4];
            load_matrices(m, keys + (key + lane) * STRIDE + step * 16);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 b0 = e4m3_to_f16((u16)m[i]), b1 = e4m3_to_f16((u16)(m[i] >> 16));
#pragma unroll
                for (int tile = 0; tile < QUERY_TILES; tile++) {
                    MULTIPLY(scores[tile][key / 8 + i], a[tile], b0, b1);
                }
            }
        }
#else
        const u8* key_row = keys + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 16 + step * 32;
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            u32 b[4];
            load_matrices(b, key_row + key * STRIDE);
#pragma unroll
            for (int tile = 0; tile < QUERY_TILES; tile++) {
                MULTIPLY(scores[tile][key / 8], a[tile], b[0], b[1]);
                MULTIPLY(scores[tile][key / 8 + 1], a[tile], b[2], b[3]);
            }
        }
#endif
    }
}

// sums[tile][8 dimensions][..] += weights * values.
__device__ inline void add_values(
    float (&sums)[QUERY_TILES][2 * STEPS][4], const float (&weights)[QUERY_TILES][KEYS / 8][4], const u8* values) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int key = 0; key < KEYS; key += 16) {
        // Scores come out of the matrix instruction in the layout in which it takes its left side.
        u32 a[QUERY_TILES][4];
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; tile++) {
            const float(&left)[4] = weights[tile][key / 8], (&right)[4] = weights[tile][key / 8 + 1];
            a[tile][0] = PACK(left[0], left[1]);
            a[tile][1] = PACK(left[2], left[3]);
            a[tile][2] = PACK(right[0], right[1]);
            a[tile][3] = PACK(right[2], right[3]);
        }
        const u8* row = values + (key + lane % 16) * STRIDE;
#if KV == E4M3
#pragma unroll
        for (int step = 0; step < STEPS; step += 2) {
            u32 m[4];
            load_matrices_transposed(m, row + 16 * min(step + (int)lane / 16, STEPS - 1));
#pragma unroll
            for (int i = 0; i < 2 && step + i < STEPS; i++) {
                // Each register holds two neighbouring dimensions of two keys: even ones first, then odd ones.
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    u32 selector = odd ? 0x4431 : 0x4420;
                    u32 b0 = e4m3_to_f16((u16)select_bytes(m[2 * i], 0, selector));
                    u32 b1 = e4m3_to_f16((u16)select_bytes(m[2 * i + 1], 0, selector));
#pragma unroll
                    for (int tile = 0; tile < QUERY_TILES; tile++) {
                        MULTIPLY(sums[tile][2 * (step + i) + odd], a[tile], b0, b1);
                    }
                }
            }
        }
#else
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 b[4];
            load_matrices_transposed(b, row + step * 32 + lane / 16 * 16);
#pragma unroll
            for (int tile = 0; tile < QUERY_TILES; tile++) {
                MULTIPLY(sums[tile][2 * step], a[tile], b[0], b[1]);
                MULTIPLY(sums[tile][2 * step + 1], a[tile], b[2], b[3]);
            }
        }
#endif
    }
}

// Scores of keys that a row does not see become minus infinity. `position` is that of the rows g and g + 8 of each
// tile; the first key is `start`.
__device__ inline void hide(
    float (&scores)[QUERY_TILES][KEYS / 8][4], const u32 (&position)[QUERY_TILES][2], u32 start, u32 window) {
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (int n = 0; n < KEYS / 2; n++) {
            u32 at = position[tile][n / 2 % 2], key = start + n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2;
            bool hidden = key > at || (window && key + window <= at);
            if (hidden) scores[tile][n / 4][n % 4] = __uint_as_float(0xff800000u);
        }
    }
}

// What is known of the rows g and g + 8 of each tile so far.
struct row_state {
    float largest[QUERY_TILES][2];  // score, before it is scaled
    float weights[QUERY_TILES][2];  // this lane's part of their sum
    float sums[QUERY_TILES][2 * STEPS][4];
};

// Turns scores into weights relative to the largest score so far, and scales what was summed up to it.
__device__ inline void soften(float (&scores)[QUERY_TILES][KEYS / 8][4], row_state& state, float factor) {
    float shrink[QUERY_TILES][2];
    bool shrinks = false;
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float old_top = state.largest[tile][i], top = old_top;
#pragma unroll
            for (int n = 0; n < KEYS / 4; n++) top = fmaxf(top, scores[tile][n / 2][2 * i + n % 2]);
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            state.largest[tile][i] = top;
            shrinks = shrinks || top > old_top;
            shrink[tile][i] = exp2_fast((old_top - top) * factor);
            state.weights[tile][i] *= shrink[tile][i];
#pragma unroll
            for (int n = 0; n < KEYS / 4; n++) {
                float& score = scores[tile][n / 2][2 * i + n % 2];
                // One instruction scales and subtracts.
                score = exp2_fast(score * factor - top * factor);
                state.weights[tile][i] += score;
            }
        }
    }
    // After the first few tiles the largest scores are mostly known.
    if (__any_sync(FULL_WARP, shrinks)) {
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
            for (int dims = 0; dims < 2 * STEPS; dims++) {
#pragma unroll
                for (int i = 0; i < 4; i++) state.sums[tile][dims][i] *= shrink[tile][i / 2];
            }
        }
    }
}

// The warp's finished rows, through the memory of its own queries, so that they are written in whole units.
__device__ inline void store_rows(
    element* out, u8* memory, const row_state& state, const work_item& item, u32 kv_heads, float scale) {
    u32 lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = state.weights[tile][i];
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            float share = scale / sum;
            u8* row = memory + (tile * 16 + i * 8 + g) * QUERY_STRIDE;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const float(&first)[4] = state.sums[tile][2 * step], (&second)[4] = state.sums[tile][2 * step + 1];
#if KV == E4M3
                // Dimensions 4c and 4c+2 of this step, then 4c+1 and 4c+3.
                uint2 four = make_uint2(
                    pack(first[2 * i] * share, second[2 * i] * share),
                    pack(first[2 * i + 1] * share, second[2 * i + 1] * share));
                *(uint2*)(row + step * 32 + c * 8) = four;
#else
                *(u32*)(row + step * 32 + c * 4) = pack(first[2 * i] * share, first[2 * i + 1] * share);
                *(u32*)(row + step * 32 + 16 + c * 4) = pack(second[2 * i] * share, second[2 * i + 1] * share);
#endif
            }
        }
    }
    __syncwarp();
    u32 units = HEAD_DIM * 2 / 16, first_row = item.tile * ROWS + threadIdx.x / 32 * (ROWS / WARPS);
    for (u32 unit = lane; unit < ROWS / WARPS * units; unit += 32) {
        u32 row = unit / units, part = unit % units, of_chunk = first_row + row;
        if (of_chunk >= item.tokens * GROUP) break;
        u32 token = of_chunk / GROUP, head = of_chunk % GROUP;
        u64 at = (((u64)(item.first_row + token) * kv_heads + blockIdx.y) * GROUP + head) * HEAD_DIM + part * 8;
        *(uint4*)(out + at) = *(const uint4*)(memory + row * QUERY_STRIDE + part * 16);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) prefill_attention(
    element* __restrict__ out,             // [rows, kv_heads, GROUP, HEAD_DIM]
    const element* __restrict__ queries,   // [rows, kv_heads, GROUP, HEAD_DIM]
    const kv_element* __restrict__ cache,  // of this layer, see common.cuh
    const u32* __restrict__ items,         // [grid.x, 8]: geometry.rs, PrefillItem
    const u32* __restrict__ block_tables,  // [tables, table_width]
    u32 table_width,
    u32 kv_heads,
    u32 window,                            // a token sees that many, itself included; 0: all
    float scale,                           // of the scores
    float key_scale,                       // what a cached key is multiplied by
    float value_scale) {
    work_item item = load_item(items, blockIdx.x);
    u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    u8* query_tile = dynamic_shared();
    u8* stages = query_tile + ROWS * QUERY_STRIDE;
    const u32* table = block_tables + (u64)item.table * table_width;
    u32 rows = item.tokens * GROUP, first_row = item.tile * ROWS;
    u32 last_row = min(first_row + ROWS, rows) - 1;
    float factor = scale * key_scale * 1.44269504f;

    // Positions of the tile's first and last token, and what any of them sees.
    u32 chunk_start = item.context_len - item.tokens;
    u32 first_position = chunk_start + first_row / GROUP, last_position = chunk_start + last_row / GROUP;
    u32 begin = window && first_position >= window ? first_position - window + 1 : 0, end = last_position + 1;
    u32 start = begin / KEYS * KEYS;

    load_queries(query_tile, queries, item, kv_heads);
    request_tile(stages, cache, table, kv_heads, start, begin, end);

    u8* my_queries = query_tile + warp * (ROWS / WARPS) * QUERY_STRIDE;
    u32 position[QUERY_TILES][2];
    row_state state = {};
#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 row = first_row + warp * (ROWS / WARPS) + tile * 16 + i * 8 + g;
            position[tile][i] = chunk_start + min(row, last_row) / GROUP;
            state.largest[tile][i] = -1e30f;
        }
    }

    for (u32 stage = 0; start < end; start += KEYS, stage ^= 1) {
        wait_copies<0>();
        // This tile is there, and everyone is done with the one before, whose memory is free.
        __syncthreads();
        if (start + KEYS < end) {
            request_tile(stages + (stage ^ 1) * STAGE_BYTES, cache, table, kv_heads, start + KEYS, begin, end);
        }
        const u8* keys = stages + stage * STAGE_BYTES;
        float scores[QUERY_TILES][KEYS / 8][4] = {};
        score(scores, my_queries, keys);
        bool some_hidden = start + KEYS - 1 > first_position || (window && start + window <= last_position);
        if (some_hidden) hide(scores, position, start, window);
        soften(scores, state, factor);
        add_values(state.sums, scores, keys + KEYS * STRIDE);
    }
    store_rows(out, my_queries, state, item, kv_heads, value_scale);
}
