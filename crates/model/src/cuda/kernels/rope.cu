// From the fused QKV product to queries and the KV cache, in one pass: the norm of each query and key head
// (Qwen 3), the rotation of queries and keys by their position (Su et al. 2021, RoFormer; the first half of
// a head is paired with the second, as Hugging Face lays the weights out), and the write of keys and
// values to their slot.
//
// Angles are computed from the model's frequencies, so that no table bounds the context and every way of
// scaling works. position * frequency is rounded to f32 as transformers rounds it.
//
// Grid [tokens, parts of the heads]; warps take heads in turn; lanes hold pairs of neighbouring dimensions of
// both halves. Bound by bytes: each number of the product is read once and written once.

#define HALF (HEAD_DIM / 2)
// Pairs of neighbours of one half that a lane holds.
#define PAIRS ((HALF / 2 + 31) / 32)

struct rotated {
    float first[PAIRS][2];
    float second[PAIRS][2];
};

// Sine and cosine of an angle up to 2^24. The quadrant is taken off in f64, the rest is at most pi / 4;
// polynomials of Cephes (Moshier), sinf.c and cosf.c.
__device__ inline void sine_cosine(float angle, float& sine, float& cosine) {
    double quadrants = rint((double)angle * 0.63661977236758134308);
    float x = (float)((double)angle - quadrants * 1.57079632679489661923);
    int quadrant = (int)quadrants & 3;
    float z = x * x;
    float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
    float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z
        - 0.5f * z + 1.0f;
    sine = quadrant & 1 ? c : s;
    cosine = quadrant & 1 ? s : c;
    if (quadrant == 2 || quadrant == 3) sine = -sine;
    if (quadrant == 1 || quadrant == 2) cosine = -cosine;
}

__device__ inline rotated load_head(const element* head) {
    rotated x;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int at = 2 * (threadIdx.x % 32 + 32 * i);
        bool mine = at < HALF;
        u32 first = mine ? *(const u32*)(head + at) : 0;
        u32 second = mine ? *(const u32*)(head + HALF + at) : 0;
        x.first[i][0] = low_float(first);
        x.first[i][1] = high_float(first);
        x.second[i][0] = low_float(second);
        x.second[i][1] = high_float(second);
    }
    return x;
}

__device__ inline void norm_head(rotated& x, const float* weight, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            squares += x.first[i][j] * x.first[i][j] + x.second[i][j] * x.second[i][j];
        }
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int at = 2 * (threadIdx.x % 32 + 32 * i);
        if (at < HALF) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                x.first[i][j] *= scale * weight[at + j];
                x.second[i][j] *= scale * weight[HALF + at + j];
            }
        }
    }
}

__device__ inline void rotate(rotated& x, const float* sine, const float* cosine) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int at = 2 * (threadIdx.x % 32 + 32 * i);
        if (at < HALF) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float a = x.first[i][j], b = x.second[i][j];
                x.first[i][j] = a * cosine[at + j] - b * sine[at + j];
                x.second[i][j] = b * cosine[at + j] + a * sine[at + j];
            }
        }
    }
}

__device__ inline void store_pair(element* to, float low, float high) {
    *(u32*)to = pack(low, high);
}

#if KV == E4M3
__device__ inline void store_pair(u8* to, float low, float high) {
    *(u16*)to = pack_e4m3(low, high);
}
#endif

template <typename Number>
__device__ inline void store_head(Number* to, const rotated& x, float factor) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int at = 2 * (threadIdx.x % 32 + 32 * i);
        if (at < HALF) {
            store_pair(to + at, x.first[i][0] * factor, x.first[i][1] * factor);
            store_pair(to + HALF + at, x.second[i][0] * factor, x.second[i][1] * factor);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) rope_and_cache(
    element* __restrict__ queries,           // [tokens, heads, HEAD_DIM]
    kv_element* __restrict__ cache,          // of this layer, see common.cuh
    const element* __restrict__ qkv,         // [tokens, heads + 2 * kv_heads, HEAD_DIM]
    const u32* __restrict__ positions,       // [tokens]
    const u32* __restrict__ slots,           // [tokens]: block * BLOCK_SIZE + offset; 0xffffffff: padding
    const float* __restrict__ frequencies,   // [HEAD_DIM / 2]
    const float* __restrict__ query_norm,    // [HEAD_DIM]; read if HEAD_NORMS
    const float* __restrict__ key_norm,      // [HEAD_DIM]; read if HEAD_NORMS
    u32 heads,
    u32 kv_heads,
    float amplitude,                         // multiplies sines and cosines (YaRN)
    float eps,
    float key_scale,                         // a cached key times this is the key; 1 for 16-bit caches
    float value_scale) {
    __shared__ float sine[HALF], cosine[HALF];
    u32 slot = slots[blockIdx.x];
    if (slot == 0xffffffff) return;
    for (u32 i = threadIdx.x; i < HALF; i += blockDim.x) {
        float s, c;
        sine_cosine(__fmul_rn((float)positions[blockIdx.x], frequencies[i]), s, c);
        sine[i] = s * amplitude;
        cosine[i] = c * amplitude;
    }
    __syncthreads();

    const element* row = qkv + (u64)blockIdx.x * (heads + 2 * kv_heads) * HEAD_DIM;
    queries += (u64)blockIdx.x * heads * HEAD_DIM;
    u32 warps = blockDim.x / 32;
    for (u32 head = blockIdx.y * warps + threadIdx.x / 32; head < heads + 2 * kv_heads; head += gridDim.y * warps) {
        rotated x = load_head(row + head * HEAD_DIM);
        bool is_query = head < heads, is_value = head >= heads + kv_heads;
        if (!is_value) {
            if (HEAD_NORMS) norm_head(x, is_query ? query_norm : key_norm, eps);
            rotate(x, sine, cosine);
        }
        if (is_query) {
            store_head(queries + head * HEAD_DIM, x, 1.0f);
        } else {
            // Value heads follow key heads in the block as they do in the row.
            u64 at = key_index(slot / BLOCK_SIZE, head - heads, kv_heads) + slot % BLOCK_SIZE * HEAD_DIM;
            store_head(cache + at, x, KV == E4M3 ? 1.0f / (is_value ? value_scale : key_scale) : 1.0f);
        }
    }
}
