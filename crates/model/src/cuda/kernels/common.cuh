// What several kernels share: number formats, 16-byte access, sums over warps and blocks.
//
// ELEMENT is the format of weights and activations, KV that of cached keys and values.

#define BF16 1
#define F16 2
#define E4M3 3

#define FULL_WARP 0xffffffffu

#if defined(KV) && KV == E4M3 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
#error "8-bit keys and values need a GPU of compute capability 8.9 or later"
#endif

__device__ inline float bf16_to_float(u16 bits) {
    return __uint_as_float((u32)bits << 16);
}

#ifdef ELEMENT
// A number of weights and activations.
struct element {
    u16 bits;
};

#if ELEMENT == BF16
__device__ inline float to_float(element x) { return bf16_to_float(x.bits); }
__device__ inline u32 pack(float low, float high) { return pack_bf16(low, high); }
__device__ inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_bf16(c, a, b0, b1);
}
#else
__device__ inline float to_float(element x) { return f16_to_float(x.bits); }
__device__ inline u32 pack(float low, float high) { return pack_f16(low, high); }
__device__ inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_f16(c, a, b0, b1);
}
#endif

__device__ inline element to_element(float x) {
    return element{(u16)pack(x, 0.0f)};
}

// Both numbers of a register.
__device__ inline float low_float(u32 packed) { return to_float(element{(u16)packed}); }
__device__ inline float high_float(u32 packed) { return to_float(element{(u16)(packed >> 16)}); }

// 8 numbers, 16 bytes, aligned.
__device__ inline void load8(float (&to)[8], const element* from) {
    uint4 packed = *(const uint4*)from;
    u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = low_float(words[i]);
        to[2 * i + 1] = high_float(words[i]);
    }
}

__device__ inline void store8(element* to, const float (&from)[8]) {
    uint4 packed;
    packed.x = pack(from[0], from[1]);
    packed.y = pack(from[2], from[3]);
    packed.z = pack(from[4], from[5]);
    packed.w = pack(from[6], from[7]);
    *(uint4*)to = packed;
}
#endif

// The same for f32, 32 bytes.
__device__ inline void load8(float (&to)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 part = ((const float4*)from)[i];
        to[4 * i] = part.x;
        to[4 * i + 1] = part.y;
        to[4 * i + 2] = part.z;
        to[4 * i + 3] = part.w;
    }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

// The sum over all threads of a block, in every thread. `scratch` is shared, one float a warp.
template <int THREADS_OF_BLOCK>
__device__ inline float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS_OF_BLOCK / 32; warp++) total += scratch[warp];
    return total;
}

// The KV cache of one layer is [blocks, 2, kv_heads, BLOCK_SIZE, HEAD_DIM]: for each block all keys, then
// all values, and of each head the tokens one after the other. So what one block of threads reads of a
// block of the cache is contiguous.
#ifdef KV
#if KV == E4M3
typedef u8 kv_element;
#else
typedef element kv_element;
#endif

// Index of a key head's first number; values stand kv_heads * BLOCK_SIZE * HEAD_DIM further.
__device__ inline u64 key_index(u32 block, u32 kv_head, u32 kv_heads) {
    return ((u64)block * 2 * kv_heads + kv_head) * (BLOCK_SIZE * HEAD_DIM);
}
#endif
