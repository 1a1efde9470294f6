// Attention of decoding sequences, one token each, over the paged KV cache, split over the context
// (Flash-Decoding, Dao et al. 2023).
//
// Bound by bytes: every cached key and value is read once, 2 * context * kv_heads * HEAD_DIM numbers a
// sequence, and there are only a few products for each. So all that matters is to keep enough reads
// under way and to read nothing twice:
//
// - The query heads that share a key head are computed together. The matrix instructions take 16 cached
//   tokens as rows and up to 8 heads as columns; scores come out as [tokens x heads], and their transpose is
//   what the product with the values needs: transposed(output) = transposed(values) * weights.
// - Each warp runs a pipeline of its own over every WARPS-th tile of 16 tokens, STAGES deep, without a barrier
//   of the block. Rows in shared memory are padded to an odd number of 16-byte units, so that the 8 rows of a
//   matrix load lie in different banks.
// - An item is a few hundred positions of one sequence (geometry.rs, plan_decode); blocks take item and head
//   in turn, so the grid is the same for every batch. Lengths are in the items: a recorded graph serves all.
// - The last block to finish a sequence and head joins its splits, in their order (the pattern of CUDA's
//   threadFenceReduction sample): no second launch.
//
// Softmax is online (Milakov and Gimelshein 2018), in powers of 2. The result of a sequence depends on its own
// length only, not on the batch.
//
// Grid [what the GPU holds], 32 * WARPS threads.

#define TILE 16
#define HEAD_TILES ((GROUP + 7) / 8)
// Heads of a tile; the last tile may have fewer.
#define HEADS ((GROUP + HEAD_TILES - 1) / HEAD_TILES)
#define THREADS (32 * WARPS)
#define STEPS (HEAD_DIM / 16)

#define ROW_BYTES (HEAD_DIM * (int)sizeof(kv_element))
#define UNITS (ROW_BYTES / 16)
#define STRIDE (16 * (UNITS | 1))
#define TILE_BYTES (TILE * STRIDE)
// A warp's result, afterwards in the same memory: [8 heads][RESULT_STRIDE] sums, [8] maxima, [8] sums of weights.
#define RESULT_STRIDE (HEAD_DIM + 4)
#define RESULT_BYTES ((8 * RESULT_STRIDE + 16) * 4)
#define PIPELINE_BYTES (STAGES * 2 * TILE_BYTES)
#define WARP_BYTES (PIPELINE_BYTES > RESULT_BYTES ? PIPELINE_BYTES : RESULT_BYTES)

#if KV == E4M3
// 8-bit numbers are widened to f16, which holds them exactly, and multiplied as such.
#define PACK pack_f16
#define MULTIPLY multiply_f16
#else
#define PACK pack
#define MULTIPLY multiply
#endif

// geometry.rs, DecodeItem
struct work_item {
    u32 row, table, begin, end, split, splits;
};

__device__ inline work_item load_item(const u32* items, u32 index) {
    uint4 first = ((const uint4*)items)[2 * index];
    uint2 second = ((const uint2*)items)[4 * index + 2];
    return {first.x, first.y, first.z, first.w, second.x, second.y};
}

// The columns of the product with the keys: b[step] of head g. With 8-bit keys the 16 dimensions of a step are
// taken in the order in which widening the bytes 4c .. 4c+3 gives them.
__device__ inline void load_queries(u32 (&b)[STEPS][2], const element* heads, u32 count) {
    u32 g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 packed = 0;
            if (g < count) {
#if KV == E4M3
                u32 pair = *(const u32*)(heads + g * HEAD_DIM + 16 * step + 4 * c + 2 * half);
                packed = pack_f16(low_float(pair), high_float(pair));
#else
                packed = *(const u32*)(heads + g * HEAD_DIM + 16 * step + 8 * half + 2 * c);
#endif
            }
            b[step][half] = packed;
        }
    }
}

// scores[token g or g + 8][head 2c or 2c + 1] of a tile of keys.
__device__ inline void score(float (&scores)[4], const u8* keys, const u32 (&queries)[STEPS][2]) {
    u32 lane = threadIdx.x % 32;
    // Two sums, so that one product need not wait for the other.
    float sums[2][4] = {};
#if KV == E4M3
    // A matrix row of 16 bytes is a whole step; four matrices are both halves of the tokens for two steps.
    const u8* row = keys + (lane % 16) * STRIDE;
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
        u32 m[4];
        load_matrices(m, row + 16 * min(step + (int)lane / 16, STEPS - 1));
#pragma unroll
        for (int i = 0; i < 2 && step + i < STEPS; i++) {
            u32 a[4] = {
                e4m3_to_f16((u16)m[2 * i]), e4m3_to_f16((u16)m[2 * i + 1]),
                e4m3_to_f16((u16)(m[2 * i] >> 16)), e4m3_to_f16((u16)(m[2 * i + 1] >> 16))};
            MULTIPLY(sums[i], a, queries[step + i][0], queries[step + i][1]);
        }
    }
#else
    const u8* row = keys + (lane % 16) * STRIDE + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        load_matrices(a, row + 32 * step);
        MULTIPLY(sums[step % 2], a, queries[step][0], queries[step][1]);
    }
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) scores[i] = sums[0][i] + sums[1][i];
}

// sums += transposed(values of a tile) * weights. sums[step][0, 1] belong to one dimension, [2, 3] to another
// (see dimension()), and to heads 2c and 2c + 1.
__device__ inline void add_values(float (&sums)[STEPS][4], const u8* values, u32 b0, u32 b1) {
    u32 lane = threadIdx.x % 32;
#if KV == E4M3
    const u8* row = values + (lane % 16) * STRIDE;
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
        u32 m[4];
        load_matrices_transposed(m, row + 16 * min(step + (int)lane / 16, STEPS - 1));
#pragma unroll
        for (int i = 0; i < 2 && step + i < STEPS; i++) {
            // Each register holds two neighbouring dimensions of two tokens.
            u32 a[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                a[2 * j] = e4m3_to_f16((u16)select_bytes(m[2 * i + j], 0, 0x4420));
                a[2 * j + 1] = e4m3_to_f16((u16)select_bytes(m[2 * i + j], 0, 0x4431));
            }
            MULTIPLY(sums[step + i], a, b0, b1);
        }
    }
#else
    const u8* row = values + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        load_matrices_transposed(a, row + 32 * step);
        MULTIPLY(sums[step], a, b0, b1);
    }
#endif
}

// Which dimension sums[step][2 * half] belongs to.
__device__ inline u32 dimension(int step, int half) {
    u32 g = threadIdx.x % 32 / 4;
#if KV == E4M3
    return 16 * step + 2 * g + half;
#else
    return 16 * step + g + 8 * half;
#endif
}

// A warp's result into its part of the shared memory: sums of values, largest scores in powers of 2, sums of weights.
__device__ inline void store_result(
    float* result, const float (&sums)[STEPS][4], const float (&largest)[2], float (&weights)[2], float factor) {
    u32 lane = threadIdx.x % 32, c = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) weights[i] += __shfl_xor_sync(FULL_WARP, weights[i], step);
        u32 head = 2 * c + i;
        if (lane < 4) {
            result[8 * RESULT_STRIDE + head] = largest[i] * factor;
            result[8 * RESULT_STRIDE + 8 + head] = weights[i];
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            result[head * RESULT_STRIDE + dimension(step, 0)] = sums[step][i];
            result[head * RESULT_STRIDE + dimension(step, 1)] = sums[step][i + 2];
        }
    }
}

// Largest score, sum of weights and weighted sum of one dimension of a head's values.
struct partial {
    float top, sum, value;
};

// Of all warps of the block. What a warp without tiles left counts nothing: its largest score is far below all.
__device__ inline partial join_warps(u32 head, u32 dim) {
    partial all = {-1e30f, 0.0f, 0.0f};
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        const float* result = (const float*)(dynamic_shared() + warp * WARP_BYTES);
        all.top = fmaxf(all.top, result[8 * RESULT_STRIDE + head]);
    }
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        const float* result = (const float*)(dynamic_shared() + warp * WARP_BYTES);
        float share = exp2_fast(result[8 * RESULT_STRIDE + head] - all.top);
        all.sum += result[8 * RESULT_STRIDE + 8 + head] * share;
        all.value += result[head * RESULT_STRIDE + dim] * share;
    }
    return all;
}

// Of all splits of a sequence, in their order; slots of neighbouring splits are `step` apart.
__device__ inline partial join_splits(
    const float* values, const float* sums, u64 slot, u64 step, u32 splits, u32 dim) {
    partial all = {-1e30f, 0.0f, 0.0f};
#pragma unroll 4
    for (u32 split = 0; split < splits; split++, slot += step) {
        float top = load_shared_result(sums + 2 * slot), sum = load_shared_result(sums + 2 * slot + 1);
        float value = load_shared_result(values + slot * HEAD_DIM + dim);
        float higher = fmaxf(all.top, top);
        float old_share = exp2_fast(all.top - higher), share = exp2_fast(top - higher);
        all = {higher, all.sum * old_share + sum * share, all.value * old_share + value * share};
    }
    return all;
}

// Wider heads take more registers (geometry.rs, decode_most_resident).
#define LEAST_RESIDENT (HEAD_DIM <= 128 ? 3 : 2)

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_RESIDENT) decode_attention(
    element* __restrict__ out,             // [rows, kv_heads, GROUP, HEAD_DIM]
    const element* __restrict__ queries,   // [rows, kv_heads, GROUP, HEAD_DIM]
    const kv_element* __restrict__ cache,  // of this layer, see common.cuh
    const u32* __restrict__ items,         // [capacity, 8]: geometry.rs, DecodeItem
    const u32* __restrict__ item_count,    // [1]
    const u32* __restrict__ block_tables,  // [tables, table_width]
    float* partial_values,                 // [capacity, kv_heads, HEAD_TILES, HEADS, HEAD_DIM]
    float* partial_sums,                   // [capacity, kv_heads, HEAD_TILES, HEADS, 2]: maximum, sum of weights
    u32* arrivals,                         // [rows, kv_heads, HEAD_TILES], 0 before and after
    u32 table_width,
    u32 kv_heads,
    float scale,                           // of the scores
    float key_scale,                       // what a cached key is multiplied by
    float value_scale) {
    __shared__ bool is_last;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u8* memory = dynamic_shared() + warp * WARP_BYTES;
    u32 columns = kv_heads * HEAD_TILES;
    u32 works = *item_count * columns;
    float factor = scale * key_scale * 1.44269504f;

    for (u32 work = blockIdx.x; work < works; work += gridDim.x) {
        work_item item = load_item(items, work / columns);
        u32 kv_head = work % columns / HEAD_TILES, first_head = work % HEAD_TILES * HEADS;
        u32 heads = min((u32)HEADS, GROUP - first_head);
        u32 head_row = (item.row * kv_heads + kv_head) * GROUP + first_head;
        const u32* table = block_tables + (u64)item.table * table_width;

        // Tiles are counted from the start of the sequence; this warp takes `count`, from `first` in steps of WARPS.
        u32 tile_begin = item.begin / TILE, tile_end = (item.end + TILE - 1) / TILE;
        u32 first = tile_begin + (warp + WARPS - tile_begin % WARPS) % WARPS;
        u32 count = first < tile_end ? (tile_end - first + WARPS - 1) / WARPS : 0;

        // Each lane keeps the block of one tile, of 32 at a time.
        u32 blocks = 0;
        auto request = [&](u32 index) {
            if (index < count) {
                if (index % 32 == 0) {
                    u32 mine = index + lane;
                    blocks = mine < count ? table[(first + mine * WARPS) * TILE / BLOCK_SIZE] : 0;
                }
                u32 start = (first + index * WARPS) * TILE;
                u32 block = __shfl_sync(FULL_WARP, blocks, index % 32);
                const u8* from =
                    (const u8*)(cache + key_index(block, kv_head, kv_heads) + start % BLOCK_SIZE * HEAD_DIM);
                u64 to_values = (u64)kv_heads * BLOCK_SIZE * ROW_BYTES;
                u8* to = memory + index % STAGES * (2 * TILE_BYTES);
#pragma unroll
                for (u32 unit = lane; unit < TILE * UNITS; unit += 32) {
                    u32 token = unit / UNITS, place = token * STRIDE + unit % UNITS * 16;
                    // What is not seen becomes zeros: the cache may hold anything there, NaN too.
                    bool seen = start + token >= item.begin && start + token < item.end;
                    copy_async(to + place, from + unit * 16, seen);
                    copy_async(to + TILE_BYTES + place, from + to_values + unit * 16, seen);
                }
            }
            commit_copies();
        };

#pragma unroll
        for (u32 stage = 0; stage < STAGES - 1; stage++) request(stage);
        u32 query[STEPS][2];
        load_queries(query, queries + (u64)head_row * HEAD_DIM, heads);

        // Of heads 2c and 2c + 1: the largest score before it is scaled, this lane's part of the sum of weights.
        float largest[2] = {-1e30f, -1e30f}, weights[2] = {};
        float sums[STEPS][4] = {};
        for (u32 index = 0; index < count; index++) {
            wait_copies<STAGES - 2>();
            __syncwarp();
            request(index + STAGES - 1);
            const u8* keys = memory + index % STAGES * (2 * TILE_BYTES);

            float scores[4];
            score(scores, keys, query);
            u32 token = (first + index * WARPS) * TILE + lane / 4;
            bool seen[2] = {token >= item.begin && token < item.end, token + 8 >= item.begin && token + 8 < item.end};
#pragma unroll
            for (int i = 0; i < 4; i++) scores[i] = seen[i / 2] ? scores[i] : __uint_as_float(0xff800000u);

#pragma unroll
            for (int i = 0; i < 2; i++) {
                float top = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
                for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
                top = fmaxf(top, largest[i]);
                float shrink = exp2_fast((largest[i] - top) * factor);
                largest[i] = top;
                scores[i] = exp2_fast(scores[i] * factor - top * factor);
                scores[i + 2] = exp2_fast(scores[i + 2] * factor - top * factor);
                weights[i] = weights[i] * shrink + scores[i] + scores[i + 2];
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    sums[step][i] *= shrink;
                    sums[step][i + 2] *= shrink;
                }
            }
            u32 b0 = transpose_matrix(PACK(scores[0], scores[1]));
            u32 b1 = transpose_matrix(PACK(scores[2], scores[3]));
            add_values(sums, keys + TILE_BYTES, b0, b1);
        }

        // Nobody reads the last tile any more; its memory takes the result.
        __syncwarp();
        store_result((float*)memory, sums, largest, weights, factor);
        __syncthreads();
        element* to = out + (u64)head_row * HEAD_DIM;
        for (u32 i = threadIdx.x; i < heads * HEAD_DIM; i += THREADS) {
            u32 head = i / HEAD_DIM, dim = i % HEAD_DIM;
            partial all = join_warps(head, dim);
            if (item.splits == 1) {
                to[i] = to_element(all.value / all.sum * value_scale);
                continue;
            }
            u64 slot = (u64)work * HEADS + head;
            store_shared_result(partial_values + slot * HEAD_DIM + dim, all.value);
            if (dim == 0) {
                store_shared_result(partial_sums + 2 * slot, all.top);
                store_shared_result(partial_sums + 2 * slot + 1, all.sum);
            }
        }
        if (item.splits > 1) {
            // What this block wrote must be seen before its arrival is.
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) {
                u32* arrived = arrivals + item.row * columns + work % columns;
                is_last = atomicAdd(arrived, 1) == item.splits - 1;
                if (is_last) *arrived = 0;
            }
            __syncthreads();
            if (is_last) {
                __threadfence();
                u64 first_slot = ((u64)work - (u64)item.split * columns) * HEADS;
                for (u32 i = threadIdx.x; i < heads * HEAD_DIM; i += THREADS) {
                    u32 head = i / HEAD_DIM, dim = i % HEAD_DIM;
                    partial all = join_splits(
                        partial_values, partial_sums, first_slot + head, (u64)columns * HEADS, item.splits, dim);
                    to[i] = to_element(all.value / all.sum * value_scale);
                }
            }
        }
        // The memory is the pipeline's again.
        __syncthreads();
    }
}
