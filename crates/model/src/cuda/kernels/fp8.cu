// 8-bit floats (e4m3) with one scale a row: for the weights of a layer, whose rows are its output channels, and
// for activations, whose rows are tokens. A product of the two is scaled back by
// row_scales[token] * column_scales[channel].

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
#error "8-bit floats need a GPU of compute capability 8.9 or later"
#endif

#define LARGEST_E4M3 448.0f

// out = x / scale with scale = max|x| / 448, so that the largest number of a row is used in full. A row of
// zeros has the scale 1.
//
// Grid [rows], 256 threads; `width` is a multiple of 8. Bound by bytes: 2 read, 1 written; the second
// read of the row comes from the cache.
extern "C" __global__ void __launch_bounds__(256) quantise_rows(
    u8* __restrict__ out,            // [rows, width]
    float* __restrict__ scales,      // [rows]
    const element* __restrict__ x,   // [rows, width]
    u32 width) {
    __shared__ float scratch[8];
    x += (u64)blockIdx.x * width;
    out += (u64)blockIdx.x * width;
    float largest = 0.0f;
    for (u32 at = threadIdx.x * 8; at < width; at += 256 * 8) {
        float part[8];
        load8(part, x + at);
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(part[i]));
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < 8; warp++) largest = fmaxf(largest, scratch[warp]);
    float scale = largest > 0.0f ? largest / LARGEST_E4M3 : 1.0f;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (u32 at = threadIdx.x * 8; at < width; at += 256 * 8) {
        float part[8];
        load8(part, x + at);
        u32 words[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 low = pack_e4m3(part[4 * i] / scale, part[4 * i + 1] / scale);
            u32 high = pack_e4m3(part[4 * i + 2] / scale, part[4 * i + 3] / scale);
            words[i] = low | high << 16;
        }
        *(uint2*)(out + at) = make_uint2(words[0], words[1]);
    }
}

// out = product * row_scale * column_scale + bias.
//
// Grid [rows, chunks of 2048 columns], 256 threads; `columns` is a multiple of 8. Bound by bytes: 4 read,
// 2 written.
extern "C" __global__ void __launch_bounds__(256) scale_product(
    element* __restrict__ out,                // [rows, columns]
    const float* __restrict__ product,        // [rows, columns]
    const float* __restrict__ row_scales,     // [rows]
    const float* __restrict__ column_scales,  // [columns]
    const element* __restrict__ bias,         // [columns], or null
    u32 columns) {
    u32 at = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (at >= columns) return;
    u64 row = (u64)blockIdx.x * columns;
    float row_scale = row_scales[blockIdx.x];
    float value[8], scale[8], shift[8] = {};
    load8(value, product + row + at);
    load8(scale, column_scales + at);
    if (bias) load8(shift, bias + at);
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] = value[i] * (row_scale * scale[i]) + shift[i];
    store8(out + row + at, value);
}
